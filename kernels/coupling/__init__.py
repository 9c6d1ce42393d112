"""Momentum coupling: the reversible residual update on int32 fixed-point streams.

`reference.py` is the specification: formulas and sources stand there. The functions below validate, then run it.
Streams are contiguous int32 tensors of one shape (usually `[batch, tokens, hidden]`), updated in place; `branch` is
bfloat16, float16 or float32 of the same number of elements; `flags` is int32 `[3]`, indexed by `NON_FINITE`,
`OUT_OF_RANGE` and `CHECKSUM_MISMATCH`, and only ever set. Nothing synchronises with a GPU.
"""

import torch

from . import reference
from .reference import CHECKSUM_MISMATCH, NON_FINITE, OUT_OF_RANGE, side_bits_size

__all__ = [
    "CHECKSUM_MISMATCH",
    "FLOAT_DTYPES",
    "MAX_FRACTION_BITS",
    "NON_FINITE",
    "OUT_OF_RANGE",
    "SIDE_BITS",
    "branch_checksum",
    "checksum",
    "dequantize",
    "momentum_backward",
    "momentum_forward",
    "momentum_gradient",
    "momentum_rewind",
    "new_flags",
    "quantize",
    "side_bits_size",
]

SIDE_BITS = (1, 2, 4, 8)
MAX_FRACTION_BITS = 24
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def new_flags(device):
    """A cleared `flags` tensor, int32 `[3]`."""
    return torch.zeros(3, dtype=torch.int32, device=device)


def quantize(value, *, fraction_bits, flags):
    """`round_half_even(value * 2**fraction_bits)`: a new int32 stream of the shape of `value`.

    Raises TypeError for a dtype that is no supported float, ValueError for `fraction_bits` outside 0..24.
    """
    _check_float("value", value)
    _check_fraction_bits(fraction_bits)
    return reference.quantize(value, fraction_bits, flags).contiguous()


def dequantize(stream, *, fraction_bits, dtype):
    """`stream * 2**-fraction_bits` in `dtype`, a new tensor."""
    _check_fraction_bits(fraction_bits)
    return reference.dequantize(stream, fraction_bits, dtype)


def momentum_forward(
    position, velocity, branch, *, bits, fraction_bits, flags, dtype, keep_side_bits=True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One layer forward: `position` becomes x', `velocity` v'.

    bits: side bits per element, 1, 2, 4 or 8 (`m = 2**-bits`), or None for the first layer (`m = 0`, no side bits).
    Returns `(hidden, side)`: x' in `dtype`, and the packed side bits, uint8 `[side_bits_size(numel, bits)]`, or None
    where there are none or `keep_side_bits` is False.
    Raises TypeError or ValueError for dtypes, shapes or settings that do not fit.
    """
    _check_streams(position, velocity, branch)
    _check_bits(bits)
    _check_fraction_bits(fraction_bits)
    return reference.momentum_forward(
        position,
        velocity,
        branch,
        bits=bits,
        fraction_bits=fraction_bits,
        flags=flags,
        dtype=dtype,
        keep_side_bits=keep_side_bits,
    )


def momentum_rewind(position, velocity, *, fraction_bits, dtype) -> torch.Tensor:
    """`position -= velocity`: from a layer's output to its input, returned in `dtype`. Opens a backward pass."""
    _check_streams(position, velocity)
    _check_fraction_bits(fraction_bits)
    return reference.momentum_rewind(position, velocity, fraction_bits=fraction_bits, dtype=dtype)


def momentum_gradient(grad_output, grad_velocity, *, bits, bits_above, dtype) -> torch.Tensor:
    """The gradient of the branch, `(1 - m) g_v'`, in `dtype`; `grad_velocity` becomes this layer's `g_v'`.

    grad_output: `g_x'`, any float dtype. grad_velocity: float32, on entry the `g_v'` of the layer above, zeros at the
    top. bits, bits_above: of this layer and of the one above (None: m = 0).
    """
    _check_bits(bits)
    _check_bits(bits_above)
    return reference.momentum_gradient(grad_output, grad_velocity, bits=bits, bits_above=bits_above, dtype=dtype)


def momentum_backward(
    position, velocity, branch, side, grad_output, grad_branch, *, bits, fraction_bits, dtype, last
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """One layer boundary backward: `velocity` becomes v, `position` the x of the layer below (`x - v`).

    branch: f(x), recomputed, bit for bit what the forward pass saw. side: the packed side bits (None with
    `bits=None`). grad_output: `g_x'`; grad_branch: `J_f^T g_f`; both None where no gradient is wanted.
    last: no layer lies below; `position` stays.
    Returns `(hidden, grad)`: the new position in `dtype` (None with `last`), and `g_x = g_x' + J_f^T g_f` (or None).
    """
    _check_streams(position, velocity, branch)
    _check_bits(bits)
    _check_fraction_bits(fraction_bits)
    if bits is not None:
        expected = side_bits_size(velocity.numel(), bits)
        if side is None or side.dtype != torch.uint8 or side.numel() != expected:
            raise ValueError(f"side must be uint8 [{expected}] for {bits} side bits, got {_describe(side)}")
    return reference.momentum_backward(
        position,
        velocity,
        branch,
        side,
        grad_output,
        grad_branch,
        bits=bits,
        fraction_bits=fraction_bits,
        dtype=dtype,
        last=last,
    )


def checksum(position, velocity) -> torch.Tensor:
    """A 64-bit checksum of both streams, int64 0-d; any single changed element changes it."""
    _check_streams(position, velocity)
    return reference.checksum(position, velocity)


def branch_checksum(branch) -> torch.Tensor:
    """A weaker and cheaper one of a branch value, int64 0-d: two evaluations that agree bit for bit agree in it."""
    _check_float("branch", branch)
    return reference.branch_checksum(branch)


def _describe(value):
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(type(value).__name__)


def _check_float(name, value):
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be bfloat16, float16 or float32, got {_describe(value)}")


def _check_streams(position, velocity, branch=None):
    for name, stream in (("position", position), ("velocity", velocity)):
        if stream.dtype != torch.int32 or not stream.is_contiguous():
            raise TypeError(f"{name} must be a contiguous int32 tensor, got {_describe(stream)}")
    if position.shape != velocity.shape:
        raise ValueError(f"position {list(position.shape)} and velocity {list(velocity.shape)} must agree")
    if branch is not None:
        _check_float("branch", branch)
        if branch.shape != position.shape:
            raise ValueError(f"branch {list(branch.shape)} and position {list(position.shape)} must agree")


def _check_bits(bits):
    if bits is not None and bits not in SIDE_BITS:
        raise ValueError(f"bits must be one of {SIDE_BITS}, or None for a layer with m = 0, got {bits!r}")


def _check_fraction_bits(fraction_bits):
    if not 0 <= fraction_bits <= MAX_FRACTION_BITS:
        raise ValueError(f"fraction_bits must lie in 0..{MAX_FRACTION_BITS}, got {fraction_bits}")
