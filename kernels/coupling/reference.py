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

Elements are taken in tiles of `TILE` consecutive ones. Side bits are packed, and checksums summed, tile by tile, so
that one program of a kernel owns a tile and needs no other. Every function here is exact and deterministic, and
synchronises with no GPU. Streams are updated in place; operations are in place wherever the operand is ours.
"""

import torch

# Elements of a tile. Part of the format of side bits and checksums.
TILE = 4096

# The largest float32 below 2**31: what a quantised value is clamped to, so that the cast to int32 is defined.
QUANTIZED_MAX = 2147483520.0

# Slots of the `flags` tensor (int32 [3]). Separate slots, because a kernel can set one with a plain store.
NON_FINITE, OUT_OF_RANGE, CHECKSUM_MISMATCH = 0, 1, 2

# Odd 32-bit constants, signed, unlike each other: position and velocity, or two elements, cannot trade places.
POSITION_WEIGHT, VELOCITY_WEIGHT = -1640531535, -2048144777

# int64 temporaries of the stream checksum stay this small, whatever the length of the stream.
_TILES_AT_ONCE = 256


def num_tiles(numel):
    """Tiles of `numel` elements, the last of which may be short."""
    return -(-numel // TILE)


def side_bits_plane(numel, bits):
    """Bytes of the last tile's side bits, if `numel` elements leave a short one: 0 or a multiple of 16."""
    rest = numel % TILE
    per_byte = 8 // bits
    return -(-rest // (16 * per_byte)) * 16


def side_bits_size(numel, bits):
    """Bytes that `bits` side bits of `numel` elements take: `numel * bits / 8`, rounded up by less than 16."""
    return numel // TILE * (TILE * bits // 8) + side_bits_plane(numel, bits)


def momentum_of(bits):
    """`m`: `2**-bits`, or 0 for the first layer (None)."""
    return 0.0 if bits is None else 2.0**-bits


def quantize(value, fraction_bits, flags=None, *, gain=1.0):
    """`Q(gain * value) = round_half_even(gain * value * 2**fraction_bits)`, int32, clamped to ±QUANTIZED_MAX.

    The product is one float32 multiplication. NaN becomes 0. A NaN or an infinity sets `flags[NON_FINITE]`, a clamped
    value (an infinity too) `flags[OUT_OF_RANGE]`. Without `flags` nothing is reported.
    """
    scale = gain * 2.0**fraction_bits
    scaled = value * scale if value.dtype == torch.float32 else value.to(torch.float32).mul_(scale)
    if scaled.numel() == 0:
        return scaled.to(torch.int32)
    low, high = torch.aminmax(scaled)  # NaN if any element is
    in_range = (low >= -QUANTIZED_MAX) & (high <= QUANTIZED_MAX)
    if _is_true_on_cpu(in_range):
        return scaled.round_().to(torch.int32)
    if flags is not None:
        flags[NON_FINITE] |= ~scaled.isfinite().all()
        flags[OUT_OF_RANGE] |= (scaled.abs() > QUANTIZED_MAX).any()
    scaled.round_().nan_to_num_(nan=0.0).clamp_(-QUANTIZED_MAX, QUANTIZED_MAX)
    return scaled.to(torch.int32)


def _is_true_on_cpu(condition):
    """Reading a condition costs nothing on the CPU, where it saves passes; elsewhere it would synchronise."""
    return condition.device.type == "cpu" and bool(condition)


def dequantize(stream, fraction_bits, dtype):
    """`stream * 2**-fraction_bits` in float32, rounded once to int -> float32 and once to `dtype`."""
    return stream.to(torch.float32).mul_(2.0**-fraction_bits).to(dtype)


def pack_side_bits(velocity, bits):
    """The low `bits` bits of every element, packed: uint8 `[side_bits_size(numel, bits)]`.

    Planar within a tile: with P bytes a tile (TILE * bits / 8; `side_bits_plane` in a short last one), its byte i
    holds its elements i, i + P, i + 2P, ... from the byte's low bits up. A plane is contiguous, so that packing needs
    no shuffle, and both sides use wide accesses.
    """
    packed = torch.zeros(side_bits_size(velocity.numel(), bits), dtype=torch.uint8, device=velocity.device)
    for index, low, target in _planes(velocity.to(torch.uint8), packed, bits):
        target.bitwise_or_(low.bitwise_and((1 << bits) - 1).bitwise_left_shift_(index * bits))
    return packed


def unpack_side_bits_(velocity, packed, bits):
    """`velocity |= r`, in place: the inverse of `pack_side_bits` on a velocity whose low `bits` bits are 0."""
    mask = (1 << bits) - 1
    for index, plane, source in _planes(velocity, packed, bits):
        plane.bitwise_or_((source >> (index * bits)).bitwise_and_(mask))
    return velocity


def _planes(elements, packed, bits):
    """`(index, elements of this plane, their bytes)` for every plane: views, of all full tiles and of a short one."""
    flat = elements.view(-1)
    full = flat.numel() // TILE * TILE
    per_byte = 8 // bits
    if full:
        tiles = flat[:full].view(-1, per_byte, TILE // per_byte)
        for index in range(per_byte):
            yield index, tiles[:, index], packed[: full // per_byte].view(-1, TILE // per_byte)
    if full < flat.numel():
        rest = packed[full // per_byte :]
        for index, plane in enumerate(flat[full:].split(rest.numel())):
            yield index, plane, rest[: plane.numel()]


def _add_checked_(stream, addend, flags):
    """`stream += addend` with wrap-around, in place; sets `flags[OUT_OF_RANGE]` where the true sum does not fit."""
    if stream.numel() == 0:
        return stream
    if stream.device.type == "cpu":
        (low, high), (low_addend, high_addend) = torch.aminmax(stream), torch.aminmax(addend)
        if low.item() + low_addend.item() >= -(2**31) and high.item() + high_addend.item() < 2**31:
            return stream.add_(addend)
    total = stream + addend
    # Overflow: both summands differ in sign from the sum.
    stream.bitwise_xor_(total).bitwise_and_(addend ^ total)
    flags[OUT_OF_RANGE] |= torch.amin(stream) < 0
    return stream.copy_(total)


def momentum_enter(hidden, *, fraction_bits, flags):
    """Open a stack: `(position, velocity, hidden')` with x = Q(hidden), v = 0, and x dequantised to hidden's dtype."""
    position = quantize(hidden, fraction_bits, flags).contiguous()
    return position, torch.zeros_like(position), dequantize(position, fraction_bits, hidden.dtype)


def momentum_forward(position, velocity, branch, *, bits, fraction_bits, flags, dtype, keep=True, sum_streams=False):
    """One layer forward, in place on both streams; returns (hidden, side, sums, stream sums).

    hidden: x' dequantised to `dtype`. With `keep`: the packed side bits (None if `bits` is) and `branch_sums`, else
    None. With `sum_streams`: `stream_sums` of the streams on entry, else None.
    """
    stream_sums_before = stream_sums(position, velocity) if sum_streams else None
    increment = quantize(branch, fraction_bits, flags, gain=1.0 - momentum_of(bits))
    side = None
    if bits is None:
        velocity.copy_(increment)
    else:
        if keep:
            side = pack_side_bits(velocity, bits)
        _add_checked_(velocity.bitwise_right_shift_(bits), increment, flags)
    _add_checked_(position, velocity, flags)
    sums = branch_sums(branch) if keep else None
    return dequantize(position, fraction_bits, dtype), side, sums, stream_sums_before


def momentum_rewind(position, velocity, *, fraction_bits, dtype):
    """`x = x' - v'` in place: the position that entered the layer; returns it dequantised to `dtype`."""
    position -= velocity
    return dequantize(position, fraction_bits, dtype)


def momentum_gradient(grad_output, grad_velocity, branch, sums, *, bits, bits_above, flags, dtype):
    """Gradient of the branch: `g_v' = m_above g_v'_above + g_x'` in place; returns (`(1 - m) g_v'` in `dtype`, g_v').

    `grad_velocity`, float32, holds the `g_v'` of the layer above, so that `g_v = m_above g_v'_above` arrives here;
    None at the top, where it is 0. `branch` is the recomputed value: a tile whose checksum is not that of the forward
    pass, `sums`, sets `flags[CHECKSUM_MISMATCH]` and its gradient is NaN.
    """
    carried, gain = momentum_of(bits_above), 1.0 - momentum_of(bits)
    return _gradient(grad_output, grad_velocity, branch, sums, carried, gain, flags, dtype)


def _gradient(grad_output, grad_velocity, branch, sums, carried, gain, flags, dtype):
    if grad_velocity is None:
        wide = torch.promote_types(grad_output.dtype, torch.float32)
        grad_velocity = grad_output.to(wide, copy=True, memory_format=torch.contiguous_format)
    else:
        grad_velocity.mul_(carried).add_(grad_output)
    gradient = (grad_velocity * gain).to(dtype)
    found = branch_sums(branch)
    if branch.device.type != "cpu" or not torch.equal(found, sums):
        differs = found != sums
        flags[CHECKSUM_MISMATCH] |= differs.any()
        of_element = differs.repeat_interleave(TILE, output_size=differs.numel() * TILE)[: gradient.numel()]
        gradient.masked_fill_(of_element.view(gradient.shape), torch.nan)
    return gradient, grad_velocity


def momentum_backward(
    position, velocity, branch, side, entry_sums, grad_output, grad_branch, *, bits, fraction_bits, flags, dtype, last
):
    """One layer boundary backward, in place on both streams; returns (hidden, g_x).

    On entry `position` is this layer's x and `velocity` its v'. On exit `velocity` is v, and `position` is the x of
    the layer *below*, `x - v`, whose dequantised value is `hidden`. With `last` there is no layer below: `position`
    stays, `hidden` is None, and streams whose checksums are not `entry_sums`, taken when the forward pass stood here,
    set `flags[CHECKSUM_MISMATCH]`. `g_x = g_x' + grad_branch`, or None where a gradient is None.
    """
    velocity -= quantize(branch, fraction_bits, gain=1.0 - momentum_of(bits))  # the forward pass set the flags
    if bits is not None:
        unpack_side_bits_(velocity.bitwise_left_shift_(bits), side, bits)
    return _step_down(position, velocity, entry_sums, grad_output, grad_branch, fraction_bits, flags, dtype, last)


def _step_down(position, velocity, entry_sums, grad_output, grad_branch, fraction_bits, flags, dtype, last):
    if last:
        hidden = None
        flags[CHECKSUM_MISMATCH] |= (stream_sums(position, velocity) != entry_sums).any()
    else:
        hidden = momentum_rewind(position, velocity, fraction_bits=fraction_bits, dtype=dtype)
    grad = None if grad_branch is None else (grad_output + grad_branch).contiguous()
    return hidden, grad


def inverse_forward(position, velocity, branch, *, bits, fraction_bits, flags, dtype, keep=True, sum_streams=False):
    """One layer of the inverse form, in place on both streams; returns (hidden, sums, stream sums).

    hidden: x' dequantised to `dtype`. `branch_sums` with `keep`, `stream_sums` of the streams on entry with
    `sum_streams`, else None.
    """
    stream_sums_before = stream_sums(position, velocity) if sum_streams else None
    _add_checked_(velocity, quantize(branch, fraction_bits, flags, gain=1.0 - momentum_of(bits)), flags)
    shifted = velocity << bits
    flags[OUT_OF_RANGE] |= (velocity != shifted >> bits).any()
    velocity.copy_(shifted)
    _add_checked_(position, velocity, flags)
    sums = branch_sums(branch) if keep else None
    return dequantize(position, fraction_bits, dtype), sums, stream_sums_before


def inverse_gradient(grad_output, grad_velocity, branch, sums, *, bits, bits_above, flags, dtype):
    """Do what `momentum_gradient` does, for a layer of the inverse form: `g_u' = g_u'_above / m_above + g_x'`."""
    carried = None if bits_above is None else 1.0 / momentum_of(bits_above)
    gain = (1.0 - momentum_of(bits)) / momentum_of(bits)
    return _gradient(grad_output, grad_velocity, branch, sums, carried, gain, flags, dtype)


def inverse_backward(
    position, velocity, branch, entry_sums, grad_output, grad_branch, *, bits, fraction_bits, flags, dtype, last
):
    """Do what `momentum_backward` does, for a layer of the inverse form; `position` becomes `x - u`."""
    velocity.bitwise_right_shift_(bits)
    velocity -= quantize(branch, fraction_bits, gain=1.0 - momentum_of(bits))
    return _step_down(position, velocity, entry_sums, grad_output, grad_branch, fraction_bits, flags, dtype, last)


def stream_sums(position, velocity):
    """Checksums of both streams, int64 `[num_tiles]`: of a tile `sum_i p_i x_i + w_i v_i mod 2**64`.

    p_i = int32((2i + 1) POSITION_WEIGHT), w_i = int32((2i + 1) VELOCITY_WEIGHT), where i counts the elements of the
    tile from 0. Integer sums do not depend on the order of additions, so any implementation gives the same. An odd
    weight is invertible modulo 2**64: one changed element always changes a sum.
    """
    flat_x, flat_v = position.view(-1), velocity.view(-1)
    sums = torch.empty(num_tiles(flat_x.numel()), dtype=torch.int64, device=position.device)
    odd = torch.arange(1, 2 * TILE, 2, dtype=torch.int32, device=position.device)
    of_x, of_v = (odd * POSITION_WEIGHT).to(torch.int64), (odd * VELOCITY_WEIGHT).to(torch.int64)
    chunk = _TILES_AT_ONCE * TILE
    for start in range(0, flat_x.numel(), chunk):
        x, v = flat_x[start : start + chunk], flat_v[start : start + chunk]
        full = x.numel() // TILE
        target = sums[start // TILE :]
        mixed = x[: full * TILE].view(-1, TILE) * of_x
        torch.sum(mixed.addcmul_(v[: full * TILE].view(-1, TILE), of_v), dim=1, out=target[:full])
        if rest := x.numel() - full * TILE:
            target[full] = (x[full * TILE :] * of_x[:rest] + v[full * TILE :] * of_v[:rest]).sum()
    return sums


def branch_sums(branch):
    """A weaker and cheaper checksum of a branch value: int32 `[num_tiles]`, of each tile the sum of its bit patterns.

    Patterns are signed integers of the element's width; sums are modulo 2**32. Values that agree bit for bit agree in
    it, and one changed bit always changes it.
    """
    flat = branch.reshape(-1)
    flat = flat.view(torch.int16 if flat.element_size() == 2 else torch.int32)
    full = flat.numel() // TILE
    sums = flat[: full * TILE].view(-1, TILE).sum(1, dtype=torch.int32)
    if full * TILE == flat.numel():
        return sums
    return torch.cat([sums, flat[full * TILE :].sum(dtype=torch.int32).view(1)])
