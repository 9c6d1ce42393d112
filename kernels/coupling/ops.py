"""The momentum coupling as `torch.library` operators `torch.ops.r3mem.*`, with fake implementations.

An operator takes and returns plain values: `bits` is 0 where the functions of `__init__.py` take None, and a tensor
that is absent is an empty one.
"""

from collections.abc import Callable
from types import ModuleType

import torch

from ..common.dispatch import choose
from . import reference

_library = torch.library.Library("r3mem", "FRAGMENT")


def _implementation(dtype: torch.dtype, first: torch.Tensor, *others: torch.Tensor | None) -> ModuleType:
    """Return the module whose functions run for these tensors and an output of `dtype`."""
    dtypes = (dtype, *(tensor.dtype for tensor in (first, *others) if tensor is not None))
    if choose(first.device, dtypes).implementation == "reference":
        return reference
    from . import triton

    return triton


def _or_empty(tensor: torch.Tensor | None, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor, or for None an empty one."""
    return like.new_empty(0, dtype=dtype) if tensor is None else tensor


def _or_none(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the tensor, or None for an empty one."""
    return tensor if tensor.numel() else None


def _operator(schema: str) -> Callable[[Callable], torch._ops.OpOverload]:
    """Define an operator by its schema; the decorated function is its implementation on every device."""
    name = schema.split("(")[0]

    def define(function: Callable) -> torch._ops.OpOverload:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.r3mem, name).default

    return define


@_operator("momentum_enter(Tensor hidden, Tensor(a!) flags, int fraction_bits) -> (Tensor, Tensor, Tensor)")
def momentum_enter(
    hidden: torch.Tensor, flags: torch.Tensor, fraction_bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Open a stack; see `momentum_enter` in `__init__.py`, as for every operator below."""
    return _implementation(hidden.dtype, hidden).momentum_enter(hidden, fraction_bits=fraction_bits, flags=flags)


@torch.library.register_fake("r3mem::momentum_enter", lib=_library)
def _fake_momentum_enter(hidden, flags, fraction_bits):
    stream = torch.empty_like(hidden, dtype=torch.int32, memory_format=torch.contiguous_format)
    return stream, torch.empty_like(stream), torch.empty_like(stream, dtype=hidden.dtype)


@_operator(
    "momentum_forward(Tensor(a!) position, Tensor(b!) velocity, Tensor branch, Tensor(c!) flags, int bits, "
    "int fraction_bits, ScalarType dtype, bool keep, bool sum_streams, float gain) -> (Tensor, Tensor, Tensor, Tensor)"
)
def momentum_forward(
    position: torch.Tensor,
    velocity: torch.Tensor,
    branch: torch.Tensor,
    flags: torch.Tensor,
    bits: int,
    fraction_bits: int,
    dtype: torch.dtype,
    keep: bool,
    sum_streams: bool,
    gain: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run one layer forward; returns the hidden state and the fields of `Kept`, empty without `keep`."""
    hidden, side, sums, entry_sums = _implementation(dtype, position, branch).momentum_forward(
        position,
        velocity,
        branch,
        bits=bits or None,
        fraction_bits=fraction_bits,
        flags=flags,
        dtype=dtype,
        keep=keep,
        sum_streams=sum_streams,
        gain=gain,
    )
    return (
        hidden,
        _or_empty(side, position, torch.uint8),
        _or_empty(sums, position, torch.int32),
        _or_empty(entry_sums, position, torch.int64),
    )


@torch.library.register_fake("r3mem::momentum_forward", lib=_library)
def _fake_momentum_forward(position, velocity, branch, flags, bits, fraction_bits, dtype, keep, sum_streams, gain):
    numel = position.numel()
    side = reference.side_bits_size(numel, bits) if keep and bits else 0
    tiles = reference.num_tiles(numel)
    return (
        torch.empty_like(position, dtype=dtype),
        position.new_empty(side, dtype=torch.uint8),
        position.new_empty(tiles if keep else 0, dtype=torch.int32),
        position.new_empty(tiles if sum_streams else 0, dtype=torch.int64),
    )


@_operator("momentum_rewind(Tensor(a!) position, Tensor velocity, int fraction_bits, ScalarType dtype) -> Tensor")
def momentum_rewind(
    position: torch.Tensor, velocity: torch.Tensor, fraction_bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """Take the position back from a layer's output to its input."""
    return _implementation(dtype, position).momentum_rewind(
        position, velocity, fraction_bits=fraction_bits, dtype=dtype
    )


@torch.library.register_fake("r3mem::momentum_rewind", lib=_library)
def _fake_momentum_rewind(position, velocity, fraction_bits, dtype):
    return torch.empty_like(position, dtype=dtype)


@_operator(
    "momentum_gradient(Tensor grad_output, Tensor(a!) grad_velocity, Tensor branch, Tensor sums, Tensor(b!) flags, "
    "int bits, int bits_above, ScalarType dtype, float gain) -> Tensor"
)
def momentum_gradient(
    grad_output: torch.Tensor,
    grad_velocity: torch.Tensor,
    branch: torch.Tensor,
    sums: torch.Tensor,
    flags: torch.Tensor,
    bits: int,
    bits_above: int,
    dtype: torch.dtype,
    gain: float,
) -> torch.Tensor:
    """Compute the gradient of a branch below the top; `grad_velocity` is updated in place."""
    gradient, _ = _implementation(dtype, grad_velocity, grad_output, branch).momentum_gradient(
        grad_output,
        grad_velocity,
        branch,
        sums,
        bits=bits or None,
        bits_above=bits_above or None,
        flags=flags,
        dtype=dtype,
        gain=gain,
    )
    return gradient


@torch.library.register_fake("r3mem::momentum_gradient", lib=_library)
def _fake_momentum_gradient(grad_output, grad_velocity, branch, sums, flags, bits, bits_above, dtype, gain):
    return torch.empty_like(grad_velocity, dtype=dtype)


@_operator(
    "momentum_gradient_top(Tensor grad_output, Tensor branch, Tensor sums, Tensor(a!) flags, int bits, "
    "ScalarType dtype, float gain) -> (Tensor, Tensor)"
)
def momentum_gradient_top(
    grad_output: torch.Tensor,
    branch: torch.Tensor,
    sums: torch.Tensor,
    flags: torch.Tensor,
    bits: int,
    dtype: torch.dtype,
    gain: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradient of the topmost branch, and a new gradient of the velocity."""
    return _implementation(dtype, grad_output, branch).momentum_gradient(
        grad_output, None, branch, sums, bits=bits or None, bits_above=None, flags=flags, dtype=dtype, gain=gain
    )


@torch.library.register_fake("r3mem::momentum_gradient_top", lib=_library)
def _fake_momentum_gradient_top(grad_output, branch, sums, flags, bits, dtype, gain):
    grad_velocity = torch.empty_like(grad_output, dtype=torch.float32, memory_format=torch.contiguous_format)
    return torch.empty_like(grad_velocity, dtype=dtype), grad_velocity


@_operator(
    "momentum_backward(Tensor(a!) position, Tensor(b!) velocity, Tensor branch, Tensor side, Tensor entry_sums, "
    "Tensor? grad_output, Tensor? grad_branch, Tensor(c!) flags, int bits, int fraction_bits, ScalarType dtype, "
    "bool last, float gain) -> (Tensor, Tensor)"
)
def momentum_backward(
    position: torch.Tensor,
    velocity: torch.Tensor,
    branch: torch.Tensor,
    side: torch.Tensor,
    entry_sums: torch.Tensor,
    grad_output: torch.Tensor | None,
    grad_branch: torch.Tensor | None,
    flags: torch.Tensor,
    bits: int,
    fraction_bits: int,
    dtype: torch.dtype,
    last: bool,
    gain: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross one layer boundary backward; returns the hidden state below and g_x, empty where there is none."""
    hidden, grad = _implementation(dtype, position, branch, grad_branch).momentum_backward(
        position,
        velocity,
        branch,
        _or_none(side),
        _or_none(entry_sums),
        grad_output,
        grad_branch,
        bits=bits or None,
        fraction_bits=fraction_bits,
        flags=flags,
        dtype=dtype,
        last=last,
        gain=gain,
    )
    return _or_empty(hidden, position, dtype), _or_empty(grad, position, dtype)


@torch.library.register_fake("r3mem::momentum_backward", lib=_library)
def _fake_momentum_backward(
    position,
    velocity,
    branch,
    side,
    entry_sums,
    grad_output,
    grad_branch,
    flags,
    bits,
    fraction_bits,
    dtype,
    last,
    gain,
):
    hidden = position.new_empty(0, dtype=dtype) if last else torch.empty_like(position, dtype=dtype)
    if grad_branch is None:
        return hidden, position.new_empty(0, dtype=dtype)
    return hidden, torch.empty_like(position, dtype=torch.result_type(grad_output, grad_branch))
