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

Momentum residual networks: Sander et al. 2021, arXiv 2102.07870, eq. 4; the bits that a lossy `>>` drops: MacKay et
al. 2018, arXiv 1810.10999, section 4. Every function here is exact and deterministic, and does not synchronise.
Streams are updated in place; operations are in place wherever the operand is ours.
"""

import torch

# The largest float32 below 2**31: what a quantised value is clamped to, so that the cast to int32 is defined.
QUANTIZED_MAX = 2147483520.0

# Slots of the `flags` tensor (int32 [3]). Separate slots, because a kernel can set one with a plain store.
NON_FINITE, OUT_OF_RANGE, CHECKSUM_MISMATCH = 0, 1, 2

# int64 temporaries of the checksum stay this small, whatever the length of the stream.
_CHECKSUM_CHUNK = 1 << 20
_VELOCITY_SALT = -7046029254386353131  # an odd 64-bit constant: position and velocity cannot trade places


def quantize(value, fraction_bits, flags=None, *, gain=1.0):
    """`Q(gain * value) = round_half_even(gain * value * 2**fraction_bits)`, int32, clamped to ±QUANTIZED_MAX.

    The product is one float32 multiplication. NaN becomes 0. A NaN or an infinity sets `flags[NON_FINITE]`, a clamped
    value (an infinity too) `flags[OUT_OF_RANGE]`. Without `flags` nothing is reported.
    """
    scaled = value.to(torch.float32) * (gain * 2.0**fraction_bits)
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


def side_bits_size(numel, bits):
    """Bytes that `bits` side bits of `numel` elements take: `ceil(numel / (8 / bits))`, rounded up to 16."""
    per_byte = 8 // bits
    return (numel + 16 * per_byte - 1) // (16 * per_byte) * 16


def pack_side_bits(velocity, bits):
    """The low `bits` bits of every element, packed: uint8 `[side_bits_size(numel, bits)]`.

    Planar: with P bytes in all, byte i holds elements i, i + P, i + 2P, ... from its low bits up. Every plane is
    contiguous, so that packing needs no shuffle and both sides use the widest accesses.
    """
    flat = velocity.view(-1)
    packed = torch.zeros(side_bits_size(flat.numel(), bits), dtype=torch.uint8, device=flat.device)
    for index, plane in enumerate(flat.split(packed.numel())):
        low = plane.to(torch.uint8).bitwise_and_((1 << bits) - 1).bitwise_left_shift_(index * bits)
        packed[: plane.numel()].bitwise_or_(low)
    return packed


def unpack_side_bits_(velocity, packed, bits):
    """`velocity |= r`, in place: the inverse of `pack_side_bits` on a velocity whose low `bits` bits are 0."""
    mask = (1 << bits) - 1
    for index, plane in enumerate(velocity.view(-1).split(packed.numel())):
        plane.bitwise_or_((packed[: plane.numel()] >> (index * bits)).bitwise_and_(mask))
    return velocity


def _momentum(bits):
    return 0.0 if bits is None else 2.0**-bits


def _add_checked_(stream, addend, flags):
    """`stream += addend` with wrap-around, in place; sets `flags[OUT_OF_RANGE]` where the true sum does not fit."""
    if stream.device.type == "cpu":
        (low, high), (low_addend, high_addend) = torch.aminmax(stream), torch.aminmax(addend)
        if low.item() + low_addend.item() >= -(2**31) and high.item() + high_addend.item() < 2**31:
            return stream.add_(addend)
    total = stream + addend
    # Overflow: both summands differ in sign from the sum.
    stream.bitwise_xor_(total).bitwise_and_(addend ^ total)
    flags[OUT_OF_RANGE] |= torch.amin(stream) < 0
    return stream.copy_(total)


def momentum_forward(position, velocity, branch, *, bits, fraction_bits, flags, dtype, keep_side_bits=True):
    """One layer forward, in place on both streams; returns (x' dequantised to `dtype`, packed side bits or None)."""
    increment = quantize(branch, fraction_bits, flags, gain=1.0 - _momentum(bits))
    side = None
    if bits is None:
        velocity.copy_(increment)
    else:
        if keep_side_bits:
            side = pack_side_bits(velocity, bits)
        _add_checked_(velocity.bitwise_right_shift_(bits), increment, flags)
    _add_checked_(position, velocity, flags)
    return dequantize(position, fraction_bits, dtype), side


def momentum_rewind(position, velocity, *, fraction_bits, dtype):
    """`x = x' - v'` in place: the position that entered the layer; returns it dequantised to `dtype`."""
    position -= velocity
    return dequantize(position, fraction_bits, dtype)


def momentum_gradient(grad_output, grad_velocity, *, bits, bits_above, dtype):
    """Gradient of the branch: `g_v' = m_above g_v'_above + g_x'` in place, float32; returns `(1 - m) g_v'`.

    `grad_velocity` holds the `g_v'` of the layer above (so `g_v = m_above g_v'_above` arrives here), or zeros.
    """
    grad_velocity.mul_(_momentum(bits_above)).add_(grad_output)
    return (grad_velocity * (1.0 - _momentum(bits))).to(dtype)


def momentum_backward(position, velocity, branch, side, grad_output, grad_branch, *, bits, fraction_bits, dtype, last):
    """One layer boundary backward, in place on both streams; returns (hidden, g_x).

    On entry `position` is this layer's x and `velocity` its v'. On exit `velocity` is v, and `position` is the x of
    the layer *below*, `x - v`, whose dequantised value is `hidden`; with `last` there is no layer below: `position`
    stays and `hidden` is None. `g_x = g_x' + grad_branch`, or None where a gradient is None.
    """
    velocity -= quantize(branch, fraction_bits, gain=1.0 - _momentum(bits))  # the forward pass set the flags
    if bits is not None:
        unpack_side_bits_(velocity.bitwise_left_shift_(bits), side, bits)
    hidden = None if last else momentum_rewind(position, velocity, fraction_bits=fraction_bits, dtype=dtype)
    grad = None if grad_branch is None else grad_output + grad_branch
    return hidden, grad


def checksum(position, velocity):
    """A 64-bit checksum of both streams, int64 0-d: `sum_i (2i + 1) (x_i + salt v_i) mod 2**64`.

    Integer sums do not depend on the order of additions, so any implementation gives the same. An odd weight is
    invertible modulo 2**64: one changed element always changes the sum.
    """
    total = torch.zeros((), dtype=torch.int64, device=position.device)
    flat_x, flat_v = position.view(-1), velocity.view(-1)
    for start in range(0, flat_x.numel(), _CHECKSUM_CHUNK):
        x, v = flat_x[start : start + _CHECKSUM_CHUNK], flat_v[start : start + _CHECKSUM_CHUNK]
        weight = torch.arange(2 * start + 1, 2 * (start + x.numel()), 2, dtype=torch.int64, device=x.device)
        total += v.to(torch.int64).mul_(_VELOCITY_SALT).add_(x).mul_(weight).sum()
    return total


def branch_checksum(branch):
    """The sum of a branch's bit patterns as integers, modulo 2**64, int64 0-d: the same for any order of additions."""
    flat = branch.reshape(-1)
    if flat.numel() * flat.element_size() % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0:
        return flat.view(torch.int64).sum()
    return flat.view(torch.int16 if flat.element_size() == 2 else torch.int32).sum(dtype=torch.int64)
