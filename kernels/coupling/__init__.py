"""Momentum coupling: the reversible residual update on int32 fixed-point streams.

`reference.py` is the specification, formulas and sources stand there; `triton.py` implements the same for GPUs, bit
for bit. The functions below validate and call the operators `torch.ops.r3mem.*`, which run one of the two
(`kernels/common/dispatch.py`).
Streams are contiguous int32 tensors of one shape (usually `[batch, tokens, hidden]`), updated in place; `branch` is
bfloat16, float16 or float32 of the same shape; `flags` is int32 `[3]`, indexed by `NON_FINITE`, `OUT_OF_RANGE` and
`CHECKSUM_MISMATCH`, and only ever set. Nothing synchronises with a GPU. Autograd does not see through these functions.
"""

from typing import NamedTuple

import torch

from . import ops, reference
from .reference import CHECKSUM_MISMATCH, NON_FINITE, OUT_OF_RANGE, TILE, num_tiles, side_bits_size

__all__ = [
    "CHECKSUM_MISMATCH",
    "FLOAT_DTYPES",
    "MAX_FRACTION_BITS",
    "NON_FINITE",
    "OUT_OF_RANGE",
    "SIDE_BITS",
    "TILE",
    "Kept",
    "inverse_backward",
    "inverse_forward",
    "inverse_gradient",
    "inverse_rewind",
    "kept_bytes",
    "momentum_backward",
    "momentum_enter",
    "momentum_forward",
    "momentum_gradient",
    "momentum_rewind",
    "new_flags",
    "side_bits_size",
]

SIDE_BITS = (1, 2, 4, 8)
MAX_FRACTION_BITS = 24
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Kept(NamedTuple):
    """What one layer's forward pass leaves for its backward pass.

    side: packed side bits, uint8 `[side_bits_size(numel, bits)]`, empty with `bits=None`. branch_sums: checksums of
    the branch, int32 `[ceil(numel / TILE)]`. entry_sums: checksums of the streams before the layer, int64
    `[ceil(numel / TILE)]`; empty unless asked for.
    """

    side: torch.Tensor
    branch_sums: torch.Tensor
    entry_sums: torch.Tensor


def kept_bytes(numel, bits):
    """Bytes of a layer's `Kept` without `entry_sums`, which one layer of a stack has."""
    return (0 if bits is None else side_bits_size(numel, bits)) + 4 * num_tiles(numel)


def new_flags(device):
    """A cleared `flags` tensor, int32 `[3]`."""
    return torch.zeros(3, dtype=torch.int32, device=device)


def momentum_enter(hidden, *, fraction_bits, flags) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Open a stack: `(position, velocity, hidden')`, new tensors of the shape of `hidden`.

    `position = round_half_even(hidden * 2**fraction_bits)`, `velocity = 0`, and hidden' is the position in hidden's
    dtype. Raises TypeError for a dtype that is no supported float, ValueError for `fraction_bits` outside 0..24.
    """
    _check_float("hidden", hidden)
    _check_flags(flags, hidden)
    _check_fraction_bits(fraction_bits)
    return ops.momentum_enter(hidden, flags, fraction_bits)


def momentum_forward(
    position, velocity, branch, *, bits, fraction_bits, flags, dtype, keep=True, sum_streams=False
) -> tuple[torch.Tensor, Kept | None]:
    """One layer forward: `position` becomes x', `velocity` v'.

    bits: side bits per element, 1, 2, 4 or 8 (`m = 2**-bits`), or None for the first layer (`m = 0`, no side bits; v
    counts as 0). keep: whether the layer will be run backward. sum_streams: take `Kept.entry_sums`, for the layer that
    the backward pass ends at.
    Returns `(hidden, kept)`: x' in `dtype`, and what the backward pass needs, or None without `keep`.
    Raises TypeError or ValueError for dtypes, shapes or settings that do not fit.
    """
    _check_layer(position, velocity, branch, bits, fraction_bits, flags, dtype)
    hidden, *kept = ops.momentum_forward(
        position, velocity, branch, flags, bits or 0, fraction_bits, dtype, keep, sum_streams
    )
    return hidden, Kept(*kept) if keep else None


def momentum_rewind(position, velocity, *, fraction_bits, dtype) -> torch.Tensor:
    """`position -= velocity`: from a layer's output to its input, returned in `dtype`. Opens a backward pass."""
    _check_streams(position, velocity)
    _check_fraction_bits(fraction_bits)
    _check_dtype(dtype)
    return ops.momentum_rewind(position, velocity, fraction_bits, dtype)


def momentum_gradient(
    grad_output, grad_velocity, branch, kept, *, bits, bits_above, flags, dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `(gradient, grad_velocity)`: the gradient of the branch, `(1 - m) g_v'`, in `dtype`, and `g_v'`.

    grad_output: `g_x'`, any supported float. grad_velocity: float32, contiguous, the `g_v'` of the layer above, which
    is updated in place; None at the top, where a new one is made. branch: f(x), recomputed: a tile whose checksum
    differs from `kept.branch_sums` sets `flags[CHECKSUM_MISMATCH]`, and its gradient is NaN. bits, bits_above: of this
    layer and of the one above (None: m = 0). Raises TypeError or ValueError for what does not fit.
    """
    _check_bits(bits)
    _check_bits(bits_above)
    _check_gradient(grad_output, branch, kept, flags, dtype)
    if grad_velocity is None:
        return ops.momentum_gradient_top(grad_output, branch, kept.branch_sums, flags, bits or 0, dtype)
    _check_alike(branch=branch, grad_velocity=grad_velocity)
    if grad_velocity.dtype != torch.float32 or not grad_velocity.is_contiguous():
        raise TypeError(f"grad_velocity must be a contiguous float32 tensor, got {_describe(grad_velocity)}")
    gradient = ops.momentum_gradient(
        grad_output, grad_velocity, branch, kept.branch_sums, flags, bits or 0, bits_above or 0, dtype
    )
    return gradient, grad_velocity


def momentum_backward(
    position, velocity, branch, kept, grad_output, grad_branch, *, bits, fraction_bits, flags, dtype, last
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """One layer boundary backward: `velocity` becomes v, `position` the x of the layer below (`x - v`).

    branch: f(x), recomputed, bit for bit what the forward pass saw. kept: of this layer's forward pass. grad_output:
    `g_x'`; grad_branch: `J_f^T g_f`; both None where no gradient is wanted. last: no layer lies below; `position`
    stays, and streams that differ from `kept.entry_sums` set `flags[CHECKSUM_MISMATCH]`.
    Returns `(hidden, grad)`: the new position in `dtype` (None with `last`), and `g_x = g_x' + J_f^T g_f` (or None).
    Raises TypeError or ValueError for what does not fit.
    """
    _check_layer(position, velocity, branch, bits, fraction_bits, flags, dtype)
    _check_kept(kept, velocity, bits=bits, side=True, entry_sums=last)
    _check_gradients(branch, grad_output, grad_branch)
    hidden, grad = ops.momentum_backward(
        position,
        velocity,
        branch,
        kept.side,
        kept.entry_sums,
        grad_output,
        grad_branch,
        flags,
        bits or 0,
        fraction_bits,
        dtype,
        last,
    )
    return None if last else hidden, None if grad_branch is None else grad


def inverse_forward(
    position, velocity, branch, *, bits, fraction_bits, flags, dtype, keep=True, sum_streams=False
) -> tuple[torch.Tensor, Kept | None]:
    """One layer of the inverse form (see `reference.py`): `position` becomes x', `velocity` u'.

    Arguments, results and errors as of `momentum_forward`, but `bits` is always a number, and `kept` has no side bits.
    The four functions of this form run in PyTorch on every device: it is not the default, and has no kernel.
    """
    _check_layer(position, velocity, branch, bits, fraction_bits, flags, dtype, required=True)
    hidden, branch_sums, entry_sums = reference.inverse_forward(
        position,
        velocity,
        branch,
        bits=bits,
        fraction_bits=fraction_bits,
        flags=flags,
        dtype=dtype,
        keep=keep,
        sum_streams=sum_streams,
    )
    if not keep:
        return hidden, None
    side = torch.empty(0, dtype=torch.uint8, device=position.device)
    entry_sums = torch.empty(0, dtype=torch.int64, device=position.device) if entry_sums is None else entry_sums
    return hidden, Kept(side, branch_sums, entry_sums)


inverse_rewind = momentum_rewind


def inverse_gradient(
    grad_output, grad_velocity, branch, kept, *, bits, bits_above, flags, dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `momentum_gradient` does, for the inverse form: the gradient of the branch is `(1 - m) / m g_u'`."""
    _check_bits(bits, required=True)
    _check_bits(bits_above, required=grad_velocity is not None)
    _check_gradient(grad_output, branch, kept, flags, dtype)
    return reference.inverse_gradient(
        grad_output,
        grad_velocity,
        branch,
        kept.branch_sums,
        bits=bits,
        bits_above=bits_above,
        flags=flags,
        dtype=dtype,
    )


def inverse_backward(
    position, velocity, branch, kept, grad_output, grad_branch, *, bits, fraction_bits, flags, dtype, last
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Do what `momentum_backward` does, for a layer of the inverse form: `velocity` becomes u, `position` `x - u`."""
    _check_layer(position, velocity, branch, bits, fraction_bits, flags, dtype, required=True)
    _check_kept(kept, velocity, entry_sums=last)
    _check_gradients(branch, grad_output, grad_branch)
    return reference.inverse_backward(
        position,
        velocity,
        branch,
        kept.entry_sums,
        grad_output,
        grad_branch,
        bits=bits,
        fraction_bits=fraction_bits,
        flags=flags,
        dtype=dtype,
        last=last,
    )


def _describe(value):
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(type(value).__name__)


def _check_dtype(dtype):
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be torch.bfloat16, float16 or float32, got {dtype}")


def _check_float(name, value):
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be bfloat16, float16 or float32, got {_describe(value)}")


def _check_alike(**tensors):
    (first, left), (second, right) = tensors.items()
    if left.shape != right.shape:
        raise ValueError(f"{second} {list(right.shape)} and {first} {list(left.shape)} must agree")
    if left.device != right.device:
        raise ValueError(f"{second} on {right.device} and {first} on {left.device} must be on one device")


def _check_layer(position, velocity, branch, bits, fraction_bits, flags, dtype, *, required=False):
    _check_streams(position, velocity, branch)
    _check_flags(flags, position)
    _check_bits(bits, required=required)
    _check_fraction_bits(fraction_bits)
    _check_dtype(dtype)


def _check_gradient(grad_output, branch, kept, flags, dtype):
    _check_float("branch", branch)
    _check_float("grad_output", grad_output)
    _check_flags(flags, branch)
    _check_dtype(dtype)
    _check_kept(kept, branch)
    _check_alike(branch=branch, grad_output=grad_output)


def _check_gradients(branch, grad_output, grad_branch):
    if (grad_output is None) != (grad_branch is None):
        raise ValueError("grad_output and grad_branch must both be given, or neither")
    if grad_branch is not None:
        for name, gradient in (("grad_output", grad_output), ("grad_branch", grad_branch)):
            _check_float(name, gradient)
            _check_alike(branch=branch, **{name: gradient})


def _check_flags(flags, like):
    if flags.dtype != torch.int32 or flags.shape != (3,) or not flags.is_contiguous() or flags.device != like.device:
        raise ValueError(
            f"flags must be contiguous int32 [3] on {like.device}, got {_describe(flags)} on {flags.device}"
        )


def _check_kept(kept, like, *, bits=None, side=False, entry_sums=False):
    """The fields that a function reads: of the right dtype, size and device, since a kernel does not look."""
    numel = like.numel()
    wanted = [("branch_sums", torch.int32, num_tiles(numel), "")]
    if side:
        wanted = [("side", torch.uint8, 0 if bits is None else side_bits_size(numel, bits), f" for {bits} side bits")]
    if entry_sums:
        wanted.append(("entry_sums", torch.int64, num_tiles(numel), ", of a forward pass with sum_streams=True"))
    for name, dtype, size, note in wanted:
        value = getattr(kept, name)
        if value.dtype != dtype or value.shape != (size,) or value.device != like.device or not value.is_contiguous():
            raise ValueError(
                f"kept.{name} must be contiguous {dtype} [{size}] on {like.device}{note}, "
                f"got {_describe(value)} on {value.device}"
            )


def _check_streams(position, velocity, branch=None):
    for name, stream in (("position", position), ("velocity", velocity)):
        if stream.dtype != torch.int32 or not stream.is_contiguous():
            raise TypeError(f"{name} must be a contiguous int32 tensor, got {_describe(stream)}")
    _check_alike(position=position, velocity=velocity)
    if branch is not None:
        _check_float("branch", branch)
        _check_alike(position=position, branch=branch)


def _check_bits(bits, *, required=False):
    if bits is None and required:
        raise ValueError(f"bits must be one of {SIDE_BITS}: no layer of the inverse form has m = 0")
    if bits is not None and bits not in SIDE_BITS:
        raise ValueError(f"bits must be one of {SIDE_BITS}, or None for a layer with m = 0, got {bits!r}")


def _check_fraction_bits(fraction_bits):
    if not 0 <= fraction_bits <= MAX_FRACTION_BITS:
        raise ValueError(f"fraction_bits must lie in 0..{MAX_FRACTION_BITS}, got {fraction_bits}")
