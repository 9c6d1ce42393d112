"""The inverse form of the coupling: the functions to call. More on the formulas in `reference.py`.

A layer with the residual branch f takes the streams, position x and velocity u, to

    u' = (u + (1 - m) f(x)) / m        x' = x + u'        m = 2**-bits

A prime marks what stands behind the layer, and g_z is the gradient of the loss by z.

These functions run in PyTorch on every device: the form is not the default, and has no kernel.
"""

import torch

from . import reference
from .checks import check_bits, check_gradient, check_gradients, check_kept, check_layer
from .kept import Kept


def inverse_forward(
    position: torch.Tensor,
    velocity: torch.Tensor,
    branch: torch.Tensor,
    *,
    bits: int,
    fraction_bits: int,
    flags: torch.Tensor,
    dtype: torch.dtype,
    keep: bool = True,
    sum_streams: bool = False,
) -> tuple[torch.Tensor, Kept | None]:
    """Run one layer of the inverse form forward, in place on both streams; formulas in `reference.py`.

    Args:
        position: x, contiguous int32; becomes x'.
        velocity: u, contiguous int32 of the same shape; becomes u'.
        branch: f(x), bfloat16, float16 or float32 of the same shape.
        bits: Bits that u is shifted by, 1, 2, 4 or 8 (`m = 2**-bits`); no layer of this form has m = 0.
        fraction_bits: Bits behind the binary point of the streams, 0 to 24.
        flags: int32 `[3]`, as `new_flags` makes it.
        dtype: Dtype of the hidden state that is returned: bfloat16, float16 or float32.
        keep: Whether the layer will be run backward.
        sum_streams: Whether to take `Kept.entry_sums`, which the layer needs that the backward pass ends at.

    Returns:
        `(hidden, kept)`: x' in `dtype`, and what the backward pass needs, without side bits; None without `keep`.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape, a device or a setting does not fit.
    """
    check_layer(position, velocity, branch, bits, fraction_bits, flags, dtype, required=True)
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
    if branch_sums is None:
        return hidden, None
    side = torch.empty(0, dtype=torch.uint8, device=position.device)
    entry_sums = torch.empty(0, dtype=torch.int64, device=position.device) if entry_sums is None else entry_sums
    return hidden, Kept(side, branch_sums, entry_sums)


def inverse_gradient(
    grad_output: torch.Tensor,
    grad_velocity: torch.Tensor | None,
    branch: torch.Tensor,
    kept: Kept,
    *,
    bits: int,
    bits_above: int | None,
    flags: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradient of a branch in the inverse form, `(1 - m) / m g_u'`.

    Args:
        grad_output: `g_x'`, of the streams' shape, bfloat16, float16 or float32.
        grad_velocity: `g_u'` of the layer above, float32; becomes that of this layer in place. None at the top, where
            a new one is made.
        branch: f(x), recomputed. A tile whose checksum differs from `kept.branch_sums` sets
            `flags[CHECKSUM_MISMATCH]`, and its gradient is NaN.
        kept: What `inverse_forward` returned for this layer.
        bits: Bits that u is shifted by in this layer.
        bits_above: The same for the layer above; None at the top only.
        flags: int32 `[3]`, as `new_flags` makes it.
        dtype: Dtype of the branch's gradient: bfloat16, float16 or float32.

    Returns:
        `(gradient, grad_velocity)`: the gradient of the branch in `dtype`, and `g_u'` in float32.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape, a device or a setting does not fit.
    """
    check_bits(bits, required=True)
    check_bits(bits_above, required=grad_velocity is not None)
    check_gradient(grad_output, branch, kept, flags, dtype, grad_velocity)
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
    position: torch.Tensor,
    velocity: torch.Tensor,
    branch: torch.Tensor,
    kept: Kept,
    grad_output: torch.Tensor | None,
    grad_branch: torch.Tensor | None,
    *,
    bits: int,
    fraction_bits: int,
    flags: torch.Tensor,
    dtype: torch.dtype,
    last: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Cross one layer boundary of the inverse form backward, in place on both streams.

    Args:
        position: x of this layer, contiguous int32; becomes the x of the layer below, `x - u`, and stays with `last`.
        velocity: u' of this layer, contiguous int32; becomes u.
        branch: f(x), recomputed, bit for bit what the forward pass saw.
        kept: What `inverse_forward` returned for this layer; with `last`, with its `entry_sums`.
        grad_output: `g_x'`, bfloat16, float16 or float32; None where no gradient is wanted.
        grad_branch: `J_f^T g_f`, bfloat16, float16 or float32; None where `grad_output` is.
        bits: Bits that u is shifted by.
        fraction_bits: Bits behind the binary point of the streams, 0 to 24.
        flags: int32 `[3]`, as `new_flags` makes it.
        dtype: Dtype of the hidden state that is returned: bfloat16, float16 or float32.
        last: Whether no layer lies below. Then streams that differ from `kept.entry_sums` set
            `flags[CHECKSUM_MISMATCH]`.

    Returns:
        `(hidden, grad)`: the new position in `dtype` (None with `last`), and `g_x = g_x' + J_f^T g_f` (or None).

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape, a device, a setting or `kept` does not fit.
    """
    check_layer(position, velocity, branch, bits, fraction_bits, flags, dtype, required=True)
    check_kept(kept, velocity, entry_sums=last)
    check_gradients(branch, grad_output, grad_branch)
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
