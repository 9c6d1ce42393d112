"""Other couplings, to compare with: plain PyTorch on every device, exact, with no kernel.

Streams, side bits, flags and checksums are those of `reference.py`; so are m = 2**-bits, Q, f (a layer's residual
branch), the prime for what stands behind the layer, and g_z for the gradient of the loss by z.

*BDIA* draws a sign s = ±1 for each row and layer in training, and takes s = 0 in evaluation, which is the plain
network (Zhang et al. 2024, bit-level reversible transformers, gamma = -s m):

    forward   v' = s (v >> bits) + Q((1 - s m) f);   x' = x + v'
    inverse   x  = x' - v';   v >> bits = s (v' - Q((1 - s m) f)), and the side bits give v
    gradient  g_v' += g_x';   g_f = (1 - s m) g_v';   g_x = g_x' + J_f^T g_f;   g_v = s m g_v'

*Two-step* couplings hand on the layer's input, too: the second stream w is the position one layer before, so that F
and G of RevNet (Gomez et al. 2017), y1 = x1 + F(x2), y2 = x2 + G(y1), are consecutive layers. With r = 0 and no bits
that is RevNet, and with r = 1 and lambda = 2**-bits the first form of MEFT (Liao et al. 2023), whose F is the whole
layer:

    forward   w' = x;   x' = (w >> bits) + r x + Q(f)
    inverse   x  = w';  w >> bits = x' - r x - Q(f), and the side bits give w
    gradient  g_f = g_x';   g_x = g_w' + r g_x' + J_f^T g_f;   g_w = lambda g_x'

An *adapter* G, a small network, adds to one stream what it computes of the other, which the layer leaves as it is: its
inverse subtracts the same (`add_quantized_`). In the momentum coupling that is x'' = x' + Q(G(v')), in MEFT
w'' = w' + Q(G(x')).

None of these functions takes a step to the layer below, as `momentum_backward` does.
"""

import torch

from .checks import check_gradient, check_kept, check_layer
from .fixed_point import CHECKSUM_MISMATCH, add_checked_, dequantize, momentum_of, quantize
from .kept import Kept
from .reference import poison_changed_tiles_
from .tiles import branch_sums, pack_side_bits, stream_sums, unpack_side_bits_


def bdia_forward(
    position: torch.Tensor,
    velocity: torch.Tensor,
    branch: torch.Tensor,
    signs: torch.Tensor,
    *,
    bits: int | None,
    fraction_bits: int,
    flags: torch.Tensor,
    dtype: torch.dtype,
    keep: bool = True,
    sum_streams: bool = False,
) -> tuple[torch.Tensor, Kept | None]:
    """Run one layer of BDIA forward, in place on both streams.

    Args:
        position: x, contiguous int32 `[B, ...]`; becomes x'.
        velocity: v, contiguous int32 of the same shape; becomes v'.
        branch: f(x), bfloat16, float16 or float32 of the same shape.
        signs: s, int32 `[B]`: 1 or -1, or 0 in evaluation, which cannot be run backward.
        bits: Side bits of an element, 1, 2, 4 or 8; None for the first layer, where m = 0 and v counts as 0.
        fraction_bits: Bits behind the binary point of the streams, 0 to 24.
        flags: int32 `[3]`, as `new_flags` makes it.
        dtype: Dtype of the hidden state that is returned.
        keep: Whether the layer will be run backward.
        sum_streams: Whether to take `Kept.entry_sums`.

    Returns:
        `(hidden, kept)`: x' in `dtype`, and what the backward pass needs, or None without `keep`.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape, a device or a setting does not fit.
    """
    check_layer(position, velocity, branch, bits, fraction_bits, flags, dtype)
    kept = _kept(position, velocity, branch, bits, sum_streams) if keep else None
    sign, gain = _by_row(signs, position, bits)
    increment = quantize(branch, fraction_bits, flags, gain=gain)
    velocity.copy_(increment if bits is None else add_checked_((velocity >> bits).mul_(sign), increment, flags))
    add_checked_(position, velocity, flags)
    return dequantize(position, fraction_bits, dtype), kept


def bdia_gradient(
    grad_output: torch.Tensor,
    grad_velocity: torch.Tensor | None,
    branch: torch.Tensor,
    kept: Kept,
    signs: torch.Tensor,
    *,
    bits: int | None,
    flags: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients of a branch and of the velocity in BDIA.

    Args:
        grad_output: `g_x'`, of the streams' shape, bfloat16, float16 or float32.
        grad_velocity: `g_v'`, float32, without what comes by x'; None at the top, where it is 0.
        branch: f(x), recomputed. A tile whose checksum differs from `kept.branch_sums` sets
            `flags[CHECKSUM_MISMATCH]`, and its gradient is NaN.
        kept: What `bdia_forward` returned for this layer.
        signs: s, as there.
        bits: Side bits of this layer; None for m = 0.
        flags: int32 `[3]`, as `new_flags` makes it.
        dtype: Dtype of the branch's gradient.

    Returns:
        `(g_f, g_v)`: in `dtype`, and in float32.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape, a device or a setting does not fit.
    """
    check_gradient(grad_output, branch, kept, flags, dtype)
    sign, gain = _by_row(signs, branch, bits)
    total = grad_output.float() if grad_velocity is None else grad_velocity + grad_output
    gradient = poison_changed_tiles_((total * gain).to(dtype), branch, kept.branch_sums, flags)
    return gradient, total * (momentum_of(bits) * sign)


def bdia_backward(
    position: torch.Tensor,
    velocity: torch.Tensor,
    branch: torch.Tensor,
    kept: Kept,
    signs: torch.Tensor,
    *,
    bits: int | None,
    fraction_bits: int,
    flags: torch.Tensor,
    last: bool,
) -> None:
    """Recover the velocity before a layer of BDIA, in place.

    Args:
        position: x of this layer, contiguous int32.
        velocity: v', contiguous int32; becomes v.
        branch: f(x), recomputed, bit for bit what the forward pass saw.
        kept: What `bdia_forward` returned for this layer; with `last`, with its `entry_sums`.
        signs: s, as there.
        bits: Side bits of this layer; None for the first, whose v is 0.
        fraction_bits: Bits behind the binary point of the streams, 0 to 24.
        flags: int32 `[3]`, as `new_flags` makes it.
        last: Whether to compare the streams with `kept.entry_sums`.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape, a device, a setting or `kept` does not fit.
    """
    check_layer(position, velocity, branch, bits, fraction_bits, flags, torch.float32)
    check_kept(kept, velocity, bits=bits, side=True, entry_sums=last)
    sign, gain = _by_row(signs, position, bits)
    velocity -= quantize(branch, fraction_bits, gain=gain)
    if bits is not None:
        unpack_side_bits_(velocity.mul_(sign).bitwise_left_shift_(bits), kept.side, bits)
    _compare(position, velocity, kept, flags, last)


def two_step_forward(
    position: torch.Tensor,
    previous: torch.Tensor,
    branch: torch.Tensor,
    *,
    residual: bool,
    bits: int | None,
    fraction_bits: int,
    flags: torch.Tensor,
    dtype: torch.dtype,
    keep: bool = True,
    sum_streams: bool = False,
) -> tuple[torch.Tensor, Kept | None]:
    """Run one layer of a two-step coupling forward, in place on both streams.

    Args:
        position: x, contiguous int32; becomes x'.
        previous: w, contiguous int32 of the same shape; becomes w' = x.
        branch: f(x), bfloat16, float16 or float32 of the same shape.
        residual: Whether r is 1; else 0.
        bits: Side bits of an element, 1, 2, 4 or 8 (`lambda = 2**-bits`); None for lambda = 1, which needs none.
        fraction_bits: Bits behind the binary point of the streams, 0 to 24.
        flags: int32 `[3]`, as `new_flags` makes it.
        dtype: Dtype of the hidden state that is returned.
        keep: Whether the layer will be run backward.
        sum_streams: Whether to take `Kept.entry_sums`.

    Returns:
        `(hidden, kept)`: x' in `dtype`, and what the backward pass needs, or None without `keep`.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape, a device or a setting does not fit.
    """
    check_layer(position, previous, branch, bits, fraction_bits, flags, dtype)
    kept = _kept(position, previous, branch, bits, sum_streams) if keep else None
    following = add_checked_(previous >> (bits or 0), quantize(branch, fraction_bits, flags), flags)
    if residual:
        add_checked_(following, position, flags)
    previous.copy_(position)
    position.copy_(following)
    return dequantize(position, fraction_bits, dtype), kept


def two_step_rewind(
    position: torch.Tensor, previous: torch.Tensor, *, fraction_bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """Let two streams change places: the second one of a layer's output is the layer's input.

    Args:
        position: x', contiguous int32; becomes x.
        previous: w', contiguous int32 of the same shape; becomes x'.
        fraction_bits: Bits behind the binary point of the streams, 0 to 24.
        dtype: Dtype of the hidden state that is returned.

    Returns:
        x in `dtype`.
    """
    output = position.clone()
    position.copy_(previous)
    previous.copy_(output)
    return dequantize(position, fraction_bits, dtype)


def two_step_gradient(
    grad_output: torch.Tensor,
    grad_previous: torch.Tensor | None,
    branch: torch.Tensor,
    kept: Kept,
    *,
    residual: bool,
    bits: int | None,
    flags: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of a two-step layer but for what its branch passes on.

    Args:
        grad_output: `g_x'`, of the streams' shape, bfloat16, float16 or float32.
        grad_previous: `g_w'`, float32; None at the top, where it is 0.
        branch: f(x), recomputed; see `bdia_gradient`.
        kept: What `two_step_forward` returned for this layer.
        residual: Whether r is 1.
        bits: Side bits of this layer; None for lambda = 1.
        flags: int32 `[3]`, as `new_flags` makes it.
        dtype: Dtype of the branch's gradient.

    Returns:
        `(g_f, g_w, g_w' + r g_x')`: in `dtype`, in float32, and in the dtype of `grad_output`.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape, a device or a setting does not fit.
    """
    check_gradient(grad_output, branch, kept, flags, dtype)
    gradient = poison_changed_tiles_(grad_output.to(dtype, copy=True), branch, kept.branch_sums, flags)
    past = torch.zeros_like(grad_output, dtype=torch.float32) if grad_previous is None else grad_previous
    passed_by = past + grad_output if residual else past
    return gradient, grad_output.float() * 2.0 ** -(bits or 0), passed_by.to(grad_output.dtype)


def two_step_backward(
    position: torch.Tensor,
    previous: torch.Tensor,
    branch: torch.Tensor,
    kept: Kept,
    *,
    residual: bool,
    bits: int | None,
    fraction_bits: int,
    flags: torch.Tensor,
    last: bool,
) -> None:
    """Recover the second stream before a two-step layer, in place.

    Args:
        position: x of this layer, contiguous int32.
        previous: x', as `two_step_rewind` leaves it, contiguous int32; becomes w.
        branch: f(x), recomputed, bit for bit what the forward pass saw.
        kept: What `two_step_forward` returned for this layer; with `last`, with its `entry_sums`.
        residual: Whether r is 1.
        bits: Side bits of this layer; None for lambda = 1.
        fraction_bits: Bits behind the binary point of the streams, 0 to 24.
        flags: int32 `[3]`, as `new_flags` makes it.
        last: Whether to compare the streams with `kept.entry_sums`.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape, a device, a setting or `kept` does not fit.
    """
    check_layer(position, previous, branch, bits, fraction_bits, flags, torch.float32)
    check_kept(kept, previous, bits=bits, side=True, entry_sums=last)
    previous -= quantize(branch, fraction_bits)
    if residual:
        previous -= position
    if bits is not None:
        unpack_side_bits_(previous.bitwise_left_shift_(bits), kept.side, bits)
    _compare(position, previous, kept, flags, last)


def add_quantized_(
    stream: torch.Tensor, value: torch.Tensor, *, fraction_bits: int, flags: torch.Tensor | None, sign: int = 1
) -> None:
    """Add what an adapter computed to a stream, in place, or take it away again.

    Args:
        stream: Contiguous int32.
        value: What the adapter computed, in bfloat16, float16 or float32, of the same shape.
        fraction_bits: Bits behind the binary point of the stream, 0 to 24.
        flags: int32 `[3]`, as `new_flags` makes it; None where the forward pass has set them.
        sign: 1 to add, -1 to take away.
    """
    increment = quantize(value, fraction_bits, flags)
    if flags is None:
        stream.add_(increment, alpha=sign)
    else:
        add_checked_(stream, increment if sign == 1 else -increment, flags)


def _by_row(signs, like, bits):
    """The sign s and the gain `1 - s m` of each row, in shapes that broadcast."""
    sign = signs.view(-1, *(1 for _ in like.shape[1:]))
    return sign, 1.0 - momentum_of(bits) * sign.float()


def _kept(position, second, branch, bits, sum_streams):
    side = torch.empty(0, dtype=torch.uint8, device=position.device) if bits is None else pack_side_bits(second, bits)
    sums = stream_sums(position, second) if sum_streams else torch.empty(0, dtype=torch.int64, device=position.device)
    return Kept(side, branch_sums(branch), sums)


def _compare(position, second, kept, flags, last):
    if last:
        flags[CHECKSUM_MISMATCH] |= (stream_sums(position, second) != kept.entry_sums).any()
