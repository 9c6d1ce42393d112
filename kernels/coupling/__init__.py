"""Momentum coupling: the reversible residual update on int32 fixed-point streams.

`reference.py` is the specification, where formulas and their sources stand; `triton.py` implements the same for GPUs,
bit for bit. The functions below validate their arguments and call the operators `torch.ops.r3mem.*`, which run one of
the two (`kernels/common/dispatch.py`).

The streams, position x and velocity v, are contiguous int32 tensors of one shape (usually `[batch, tokens, hidden]`),
updated in place. f is a layer's residual branch, g a gradient of the loss, and m the momentum of a layer. Nothing
synchronises with a GPU. Autograd does not see through these functions.
"""

import torch

from . import ops, others
from .checks import (
    FLOAT_DTYPES,
    MAX_FRACTION_BITS,
    SIDE_BITS,
    check_bits,
    check_dtype,
    check_flags,
    check_float,
    check_fraction_bits,
    check_gradient,
    check_gradients,
    check_kept,
    check_layer,
    check_streams,
)
from .fixed_point import CHECKSUM_MISMATCH, NON_FINITE, OUT_OF_RANGE, dequantize, gain_of
from .inverse import inverse_backward, inverse_forward, inverse_gradient
from .kept import Kept, kept_bytes
from .tiles import TILE, side_bits_size

__all__ = [
    "CHECKSUM_MISMATCH",
    "FLOAT_DTYPES",
    "MAX_FRACTION_BITS",
    "NON_FINITE",
    "OUT_OF_RANGE",
    "SIDE_BITS",
    "TILE",
    "Kept",
    "dequantize",
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
    "others",
    "side_bits_size",
]


def new_flags(device: torch.device | str) -> torch.Tensor:
    """Make a cleared `flags` tensor.

    The functions below only ever set flags: to 1, at the indices `NON_FINITE`, `OUT_OF_RANGE` and `CHECKSUM_MISMATCH`.

    Args:
        device: Device of the streams.

    Returns:
        int32 `[3]`, all zeros.
    """
    return torch.zeros(3, dtype=torch.int32, device=device)


def momentum_enter(
    hidden: torch.Tensor, *, fraction_bits: int, flags: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Open a stack: `position = round_half_even(hidden * 2**fraction_bits)` and `velocity = 0`.

    Args:
        hidden: Hidden state that enters the first layer, in bfloat16, float16 or float32.
        fraction_bits: Bits behind the binary point of the streams, 0 to 24.
        flags: int32 `[3]`, as `new_flags` makes it.

    Returns:
        `(position, velocity, hidden')`, new tensors of the shape of `hidden`: the streams, int32, and the position
        converted back to hidden's dtype.

    Raises:
        TypeError: If the dtype is no supported float.
        ValueError: If `flags` or `fraction_bits` do not fit.
    """
    check_float("hidden", hidden)
    check_flags(flags, hidden)
    check_fraction_bits(fraction_bits)
    return ops.momentum_enter(hidden, flags, fraction_bits)


def momentum_forward(
    position: torch.Tensor,
    velocity: torch.Tensor,
    branch: torch.Tensor,
    *,
    bits: int | None,
    fraction_bits: int,
    flags: torch.Tensor,
    dtype: torch.dtype,
    keep: bool = True,
    sum_streams: bool = False,
    gain: float | None = None,
) -> tuple[torch.Tensor, Kept | None]:
    """Run one layer forward, in place on both streams.

    Args:
        position: x, contiguous int32; becomes x'.
        velocity: v, contiguous int32 of the same shape; becomes v'.
        branch: f(x), bfloat16, float16 or float32 of the same shape.
        bits: Side bits of an element, 1, 2, 4 or 8 (`m = 2**-bits`); None for the first layer, where m = 0, v counts
            as 0, and there are no side bits.
        fraction_bits: Bits behind the binary point of the streams, 0 to 24.
        flags: int32 `[3]`, as `new_flags` makes it.
        dtype: Dtype of the hidden state that is returned: bfloat16, float16 or float32.
        keep: Whether the layer will be run backward.
        sum_streams: Whether to take `Kept.entry_sums`, which the layer needs that the backward pass ends at.
        gain: Factor of the branch; None: 1 - m.

    Returns:
        `(hidden, kept)`: x' in `dtype`, and what the backward pass needs, or None without `keep`.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape, a device or a setting does not fit.
    """
    check_layer(position, velocity, branch, bits, fraction_bits, flags, dtype)
    hidden, *kept = ops.momentum_forward(
        position, velocity, branch, flags, bits or 0, fraction_bits, dtype, keep, sum_streams, gain_of(gain, bits)
    )
    return hidden, Kept(*kept) if keep else None


def momentum_rewind(
    position: torch.Tensor, velocity: torch.Tensor, *, fraction_bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """Open a backward pass: take the position from the last layer's output back to its input, `x = x' - v'`.

    Args:
        position: x', contiguous int32; becomes x.
        velocity: v', contiguous int32 of the same shape.
        fraction_bits: Bits behind the binary point of the streams, 0 to 24.
        dtype: Dtype of the hidden state that is returned: bfloat16, float16 or float32.

    Returns:
        x in `dtype`.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape, a device or a setting does not fit.
    """
    check_streams(position, velocity)
    check_fraction_bits(fraction_bits)
    check_dtype(dtype)
    return ops.momentum_rewind(position, velocity, fraction_bits, dtype)


def momentum_gradient(
    grad_output: torch.Tensor,
    grad_velocity: torch.Tensor | None,
    branch: torch.Tensor,
    kept: Kept,
    *,
    bits: int | None,
    bits_above: int | None,
    flags: torch.Tensor,
    dtype: torch.dtype,
    gain: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradient of a layer's branch, `gain g_v'`.

    Args:
        grad_output: `g_x'`, of the streams' shape, bfloat16, float16 or float32.
        grad_velocity: `g_v'` of the layer above, contiguous float32; becomes that of this layer in place. None at the
            top, where a new one is made.
        branch: f(x), recomputed. A tile whose checksum differs from `kept.branch_sums` sets
            `flags[CHECKSUM_MISMATCH]`, and its gradient is NaN.
        kept: What `momentum_forward` returned for this layer.
        bits: Side bits of this layer, as `momentum_forward` took them; None for m = 0.
        bits_above: Side bits of the layer above; None for m = 0.
        flags: int32 `[3]`, as `new_flags` makes it.
        dtype: Dtype of the branch's gradient: bfloat16, float16 or float32.
        gain: Factor of the branch in the forward pass; None: 1 - m.

    Returns:
        `(gradient, grad_velocity)`: the gradient of the branch in `dtype`, and `g_v'` in float32.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape, a device or a setting does not fit.
    """
    check_bits(bits)
    check_bits(bits_above)
    check_gradient(grad_output, branch, kept, flags, dtype, grad_velocity)
    if grad_velocity is None:
        return ops.momentum_gradient_top(
            grad_output, branch, kept.branch_sums, flags, bits or 0, dtype, gain_of(gain, bits)
        )
    gradient = ops.momentum_gradient(
        grad_output,
        grad_velocity,
        branch,
        kept.branch_sums,
        flags,
        bits or 0,
        bits_above or 0,
        dtype,
        gain_of(gain, bits),
    )
    return gradient, grad_velocity


def momentum_backward(
    position: torch.Tensor,
    velocity: torch.Tensor,
    branch: torch.Tensor,
    kept: Kept,
    grad_output: torch.Tensor | None,
    grad_branch: torch.Tensor | None,
    *,
    bits: int | None,
    fraction_bits: int,
    flags: torch.Tensor,
    dtype: torch.dtype,
    last: bool,
    gain: float | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Cross one layer boundary backward, in place on both streams.

    Args:
        position: x of this layer, contiguous int32; becomes the x of the layer below, `x - v`, and stays with `last`.
        velocity: v' of this layer, contiguous int32; becomes v.
        branch: f(x), recomputed, bit for bit what the forward pass saw.
        kept: What `momentum_forward` returned for this layer; with `last`, with its `entry_sums`.
        grad_output: `g_x'`, bfloat16, float16 or float32; None where no gradient is wanted.
        grad_branch: `J_f^T g_f`, bfloat16, float16 or float32; None where `grad_output` is.
        bits: Side bits of this layer, as `momentum_forward` took them; None for m = 0.
        fraction_bits: Bits behind the binary point of the streams, 0 to 24.
        flags: int32 `[3]`, as `new_flags` makes it.
        dtype: Dtype of the hidden state that is returned: bfloat16, float16 or float32.
        last: Whether no layer lies below. Then streams that differ from `kept.entry_sums` set
            `flags[CHECKSUM_MISMATCH]`.
        gain: Factor of the branch in the forward pass; None: 1 - m.

    Returns:
        `(hidden, grad)`: the new position in `dtype` (None with `last`), and `g_x = g_x' + J_f^T g_f` (or None).

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape, a device, a setting or `kept` does not fit.
    """
    check_layer(position, velocity, branch, bits, fraction_bits, flags, dtype)
    check_kept(kept, velocity, bits=bits, side=True, entry_sums=last)
    check_gradients(branch, grad_output, grad_branch)
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
        gain_of(gain, bits),
    )
    return None if last else hidden, None if grad_branch is None else grad


# Both forms go from a layer's output to its input alike.
inverse_rewind = momentum_rewind
