"""Momentum coupling on int32 fixed-point streams: the specification, in plain PyTorch.

A stream element `i` stands for the real number `i * 2**-fraction_bits`. With `m = 2**-bits` and the residual branch
`f`, one layer maps (position x, velocity v) to (x', v'):

    forward   r  = v & (2**bits - 1)                       # side bits, stored packed
              v' = (v >> bits) + Q((1 - m) f)
              x' = x + v'
    inverse   x  = x' - v'
              v  = ((v' - Q((1 - m) f)) << bits) | r

int32 addition wraps and is therefore always invertible; float addition is not. The first layer starts from v = 0
with m = 0 (`bits=None`), so that its whole branch is applied at once and no side bits exist.

The vector-Jacobian product, with gradients g of the loss (Q and its inverse pass gradients straight through):

    g_v' += g_x';   g_f = (1 - m) g_v';   g_x = g_x' + J_f^T g_f;   g_v = m g_v'

Reading backward in the coupling's own inverse form, with u = -v and u = 0 at its first layer, needs no
side bits, since what is shifted out on the way back is what was shifted in:

    forward   u' = (u + Q((1 - m) f)) << bits
              x' = x + u'
    inverse   x  = x' - u'
              u  = (u' >> bits) - Q((1 - m) f)
    gradient  g_u' += g_x';   g_f = (1 - m) / m g_u';   g_x = g_x' + J_f^T g_f;   g_u = g_u' / m

It amplifies u by 1 / m a layer; leaving the range sets a flag.

Momentum residual networks: Sander et al. 2021, arXiv 2102.07870, eq. 4; the bits that a lossy `>>` drops: MacKay et
al. 2018, arXiv 1810.10999, section 4.

`fixed_point.py` specifies Q, and `tiles.py` the format of side bits and checksums. Every function here is exact and
deterministic, and synchronises with no GPU. Streams are contiguous int32 tensors of one shape, usually
`[batch, tokens, hidden]`, updated in place; branches and gradients have the same shape.
"""

import torch

from .fixed_point import (
    CHECKSUM_MISMATCH,
    NON_FINITE,
    OUT_OF_RANGE,
    QUANTIZED_MAX,
    add_checked_,
    dequantize,
    gain_of,
    momentum_of,
    quantize,
)
from .tiles import (
    TILE,
    branch_sums,
    num_tiles,
    pack_side_bits,
    side_bits_plane,
    side_bits_size,
    stream_sums,
    unpack_side_bits_,
)

__all__ = [
    "CHECKSUM_MISMATCH",
    "NON_FINITE",
    "OUT_OF_RANGE",
    "QUANTIZED_MAX",
    "TILE",
    "branch_sums",
    "dequantize",
    "inverse_backward",
    "inverse_forward",
    "inverse_gradient",
    "momentum_backward",
    "momentum_enter",
    "momentum_forward",
    "momentum_gradient",
    "momentum_of",
    "momentum_rewind",
    "num_tiles",
    "pack_side_bits",
    "poison_changed_tiles_",
    "quantize",
    "side_bits_plane",
    "side_bits_size",
    "stream_sums",
    "unpack_side_bits_",
]


def momentum_enter(
    hidden: torch.Tensor, *, fraction_bits: int, flags: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Open a stack with x = Q(hidden) and v = 0.

    Args:
        hidden: Hidden state that enters the first layer, in bfloat16, float16 or float32.
        fraction_bits: Bits behind the binary point, 0 to 24.
        flags: int32 `[3]`; see `quantize`.

    Returns:
        `(position, velocity, hidden')`: the streams, int32, and the position dequantised to hidden's dtype.
    """
    position = quantize(hidden, fraction_bits, flags).contiguous()
    return position, torch.zeros_like(position), dequantize(position, fraction_bits, hidden.dtype)


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
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Run one layer forward, in place on both streams.

    Args:
        position: x, int32; becomes x'.
        velocity: v, int32; becomes v'.
        branch: f(x), in bfloat16, float16 or float32.
        bits: Side bits of an element; None for the first layer (m = 0).
        fraction_bits: Bits behind the binary point, 0 to 24.
        flags: int32 `[3]`. Values that leave the range of int32 set `flags[OUT_OF_RANGE]`; see also `quantize`.
        dtype: Dtype of the hidden state that is returned.
        keep: Whether the layer will be run backward.
        sum_streams: Whether to take the streams' checksums on entry.
        gain: Factor of the branch; None: 1 - m.

    Returns:
        `(hidden, side, branch sums, stream sums)`: x' dequantised to `dtype`; with `keep` the packed side bits (None
        if `bits` is) and `branch_sums`, else None; with `sum_streams` the `stream_sums` on entry, else None.
    """
    stream_sums_before = stream_sums(position, velocity) if sum_streams else None
    increment = quantize(branch, fraction_bits, flags, gain=gain_of(gain, bits))
    side = None
    if bits is None:
        velocity.copy_(increment)
    else:
        if keep:
            side = pack_side_bits(velocity, bits)
        add_checked_(velocity.bitwise_right_shift_(bits), increment, flags)
    add_checked_(position, velocity, flags)
    sums = branch_sums(branch) if keep else None
    return dequantize(position, fraction_bits, dtype), side, sums, stream_sums_before


def momentum_rewind(
    position: torch.Tensor, velocity: torch.Tensor, *, fraction_bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """Compute `x = x' - v'` in place: the position that entered the layer.

    Args:
        position: x', int32; becomes x.
        velocity: v', int32.
        fraction_bits: Bits behind the binary point, 0 to 24.
        dtype: Dtype of the hidden state that is returned.

    Returns:
        x dequantised to `dtype`.
    """
    position -= velocity
    return dequantize(position, fraction_bits, dtype)


def momentum_gradient(
    grad_output: torch.Tensor,
    grad_velocity: torch.Tensor | None,
    branch: torch.Tensor,
    sums: torch.Tensor,
    *,
    bits: int | None,
    bits_above: int | None,
    flags: torch.Tensor,
    dtype: torch.dtype,
    gain: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradient of a branch: `g_f = gain g_v'` with `g_v' = m_above g_v'_above + g_x'`.

    Args:
        grad_output: `g_x'`, in any supported float.
        grad_velocity: `g_v'` of the layer above, float32, so that `g_v = m_above g_v'_above` arrives here; becomes
            `g_v'` of this layer in place. None at the top, where it counts as 0.
        branch: f(x), recomputed. A tile whose checksum is not that of the forward pass sets
            `flags[CHECKSUM_MISMATCH]`, and its gradient is NaN.
        sums: `branch_sums` of the forward pass.
        bits: Side bits of this layer; None for m = 0.
        bits_above: Side bits of the layer above; None for m = 0.
        flags: int32 `[3]`.
        dtype: Dtype of the gradient that is returned.
        gain: Factor of the branch in the forward pass; None: 1 - m.

    Returns:
        `(g_f, g_v')`: the gradient of the branch in `dtype`, and that of the velocity in float32.
    """
    carried = momentum_of(bits_above)
    return _gradient(grad_output, grad_velocity, branch, sums, carried, gain_of(gain, bits), flags, dtype)


def _gradient(
    grad_output: torch.Tensor,
    grad_velocity: torch.Tensor | None,
    branch: torch.Tensor,
    sums: torch.Tensor,
    carried: float,
    gain: float,
    flags: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `gain * g` with `g = carried * grad_velocity + grad_output`; check the branch's checksums."""
    if grad_velocity is None:
        wide = torch.promote_types(grad_output.dtype, torch.float32)
        grad_velocity = grad_output.to(wide, copy=True, memory_format=torch.contiguous_format)
    else:
        grad_velocity.mul_(carried).add_(grad_output)
    gradient = (grad_velocity * gain).to(dtype)
    return poison_changed_tiles_(gradient, branch, sums, flags), grad_velocity


def poison_changed_tiles_(
    gradient: torch.Tensor, branch: torch.Tensor, sums: torch.Tensor, flags: torch.Tensor
) -> torch.Tensor:
    """Let the gradient of a branch be NaN where the branch's checksums are not those of the forward pass.

    Args:
        gradient: The gradient, of the branch's shape; changed in place.
        branch: f(x), recomputed.
        sums: `branch_sums` of the forward pass.
        flags: int32 `[3]`. A tile that differs sets `flags[CHECKSUM_MISMATCH]`.

    Returns:
        `gradient`.
    """
    found = branch_sums(branch)
    if branch.device.type != "cpu" or not torch.equal(found, sums):
        differs = found != sums
        flags[CHECKSUM_MISMATCH] |= differs.any()
        of_element = differs.repeat_interleave(TILE, output_size=differs.numel() * TILE)[: gradient.numel()]
        gradient.masked_fill_(of_element.view(gradient.shape), torch.nan)
    return gradient


def momentum_backward(
    position: torch.Tensor,
    velocity: torch.Tensor,
    branch: torch.Tensor,
    side: torch.Tensor | None,
    entry_sums: torch.Tensor | None,
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
        position: x of this layer, int32; becomes the x of the layer *below*, `x - v`, and stays with `last`.
        velocity: v' of this layer, int32; becomes v.
        branch: f(x), recomputed, bit for bit what the forward pass saw.
        side: Packed side bits of the forward pass; None if `bits` is.
        entry_sums: `stream_sums` taken when the forward pass stood here; read with `last` only.
        grad_output: `g_x'`, in any supported float; None where no gradient is wanted.
        grad_branch: `J_f^T g_f`, in any supported float; None where `grad_output` is.
        bits: Side bits of this layer; None for m = 0.
        fraction_bits: Bits behind the binary point, 0 to 24.
        flags: int32 `[3]`. With `last`, streams whose checksums are not `entry_sums` set
            `flags[CHECKSUM_MISMATCH]`.
        dtype: Dtype of the hidden state that is returned.
        last: Whether there is no layer below.
        gain: Factor of the branch in the forward pass; None: 1 - m.

    Returns:
        `(hidden, g_x)`: the new position dequantised to `dtype`, None with `last`; and `g_x = g_x' + J_f^T g_f`, or
        None.
    """
    velocity -= quantize(branch, fraction_bits, gain=gain_of(gain, bits))  # the forward pass set the flags
    if bits is not None:
        assert side is not None
        unpack_side_bits_(velocity.bitwise_left_shift_(bits), side, bits)
    return _step_down(position, velocity, entry_sums, grad_output, grad_branch, fraction_bits, flags, dtype, last)


def _step_down(
    position: torch.Tensor,
    velocity: torch.Tensor,
    entry_sums: torch.Tensor | None,
    grad_output: torch.Tensor | None,
    grad_branch: torch.Tensor | None,
    fraction_bits: int,
    flags: torch.Tensor,
    dtype: torch.dtype,
    last: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Go to the layer below with a velocity that is already v, or with `last` compare the streams' checksums."""
    if last:
        assert entry_sums is not None
        hidden = None
        flags[CHECKSUM_MISMATCH] |= (stream_sums(position, velocity) != entry_sums).any()
    else:
        hidden = momentum_rewind(position, velocity, fraction_bits=fraction_bits, dtype=dtype)
    grad = None if grad_output is None or grad_branch is None else (grad_output + grad_branch).contiguous()
    return hidden, grad


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
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Run one layer of the inverse form forward, in place on both streams.

    Args:
        position: x, int32; becomes x'.
        velocity: u, int32; becomes u'.
        branch: f(x), in bfloat16, float16 or float32.
        bits: Bits that u is shifted by.
        fraction_bits: Bits behind the binary point, 0 to 24.
        flags: int32 `[3]`. Values that leave the range of int32 set `flags[OUT_OF_RANGE]`; see also `quantize`.
        dtype: Dtype of the hidden state that is returned.
        keep: Whether the layer will be run backward.
        sum_streams: Whether to take the streams' checksums on entry.

    Returns:
        `(hidden, branch sums, stream sums)`: x' dequantised to `dtype`; with `keep` the `branch_sums`, else None; with
        `sum_streams` the `stream_sums` on entry, else None.
    """
    stream_sums_before = stream_sums(position, velocity) if sum_streams else None
    add_checked_(velocity, quantize(branch, fraction_bits, flags, gain=1.0 - momentum_of(bits)), flags)
    shifted = velocity << bits
    flags[OUT_OF_RANGE] |= (velocity != shifted >> bits).any()
    velocity.copy_(shifted)
    add_checked_(position, velocity, flags)
    sums = branch_sums(branch) if keep else None
    return dequantize(position, fraction_bits, dtype), sums, stream_sums_before


def inverse_gradient(
    grad_output: torch.Tensor,
    grad_velocity: torch.Tensor | None,
    branch: torch.Tensor,
    sums: torch.Tensor,
    *,
    bits: int,
    bits_above: int | None,
    flags: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradient of a branch: `g_f = (1 - m) / m g_u'` with `g_u' = g_u'_above / m_above + g_x'`.

    Args:
        grad_output: `g_x'`, in any supported float.
        grad_velocity: `g_u'` of the layer above, float32; becomes `g_u'` of this layer in place. None at the top,
            where it counts as 0.
        branch: f(x), recomputed. A tile whose checksum is not that of the forward pass sets
            `flags[CHECKSUM_MISMATCH]`, and its gradient is NaN.
        sums: `branch_sums` of the forward pass.
        bits: Bits that u is shifted by in this layer.
        bits_above: The same for the layer above; None at the top.
        flags: int32 `[3]`.
        dtype: Dtype of the gradient that is returned.

    Returns:
        `(g_f, g_u')`: the gradient of the branch in `dtype`, and that of u in float32.
    """
    carried = 0.0 if grad_velocity is None else 1.0 / momentum_of(bits_above)  # at the top nothing is carried
    gain = (1.0 - momentum_of(bits)) / momentum_of(bits)
    return _gradient(grad_output, grad_velocity, branch, sums, carried, gain, flags, dtype)


def inverse_backward(
    position: torch.Tensor,
    velocity: torch.Tensor,
    branch: torch.Tensor,
    entry_sums: torch.Tensor | None,
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
        position: x of this layer, int32; becomes the x of the layer *below*, `x - u`, and stays with `last`.
        velocity: u' of this layer, int32; becomes u.
        branch: f(x), recomputed, bit for bit what the forward pass saw.
        entry_sums: `stream_sums` taken when the forward pass stood here; read with `last` only.
        grad_output: `g_x'`, in any supported float; None where no gradient is wanted.
        grad_branch: `J_f^T g_f`, in any supported float; None where `grad_output` is.
        bits: Bits that u is shifted by.
        fraction_bits: Bits behind the binary point, 0 to 24.
        flags: int32 `[3]`. With `last`, streams whose checksums are not `entry_sums` set
            `flags[CHECKSUM_MISMATCH]`.
        dtype: Dtype of the hidden state that is returned.
        last: Whether there is no layer below.

    Returns:
        `(hidden, g_x)`: the new position dequantised to `dtype`, None with `last`; and `g_x = g_x' + J_f^T g_f`, or
        None.
    """
    velocity.bitwise_right_shift_(bits)
    velocity -= quantize(branch, fraction_bits, gain=1.0 - momentum_of(bits))
    return _step_down(position, velocity, entry_sums, grad_output, grad_branch, fraction_bits, flags, dtype, last)
