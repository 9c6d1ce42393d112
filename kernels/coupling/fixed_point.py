"""Fixed-point numbers: an int32 `i` stands for the real number `i * 2**-fraction_bits`."""

import torch

# The largest float32 below 2**31: what a quantised value is clamped to, so that the cast to int32 is defined.
QUANTIZED_MAX = 2147483520.0

# Slots of the `flags` tensor (int32 [3]). Separate slots, because a kernel can set one with a plain store.
NON_FINITE, OUT_OF_RANGE, CHECKSUM_MISMATCH = 0, 1, 2


def momentum_of(bits: int | None) -> float:
    """Return m: `2**-bits`, or 0 for the first layer (None)."""
    return 0.0 if bits is None else 2.0**-bits


def gain_of(gain: float | None, bits: int | None) -> float:
    """Return the factor of a branch: the one that is given, or `1 - m`."""
    return 1.0 - momentum_of(bits) if gain is None else gain


def quantize(
    value: torch.Tensor, fraction_bits: int, flags: torch.Tensor | None = None, *, gain: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """Compute `Q(gain * value) = round_half_even(gain * value * 2**fraction_bits)`, clamped to ±QUANTIZED_MAX.

    The product is one float32 multiplication. NaN becomes 0.

    Args:
        value: Any tensor in bfloat16, float16 or float32.
        fraction_bits: Bits behind the binary point, 0 to 24.
        flags: int32 `[3]`. A NaN or an infinity sets `flags[NON_FINITE]`, a clamped value (an infinity too)
            `flags[OUT_OF_RANGE]`. With None nothing is reported.
        gain: Factor of the value: a number, or a float32 tensor that broadcasts to it.

    Returns:
        int32, of the shape of `value`.
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


def _is_true_on_cpu(condition: torch.Tensor) -> bool:
    """Read a condition on the CPU, where that saves passes; False elsewhere, where reading would synchronise."""
    return condition.device.type == "cpu" and bool(condition)


def dequantize(stream: torch.Tensor, fraction_bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Compute `stream * 2**-fraction_bits`, rounded once from int32 to float32 and once to `dtype`.

    Args:
        stream: int32 tensor.
        fraction_bits: Bits behind the binary point, 0 to 24.
        dtype: bfloat16, float16 or float32.

    Returns:
        A new tensor of the shape of `stream` in `dtype`.
    """
    return stream.to(torch.float32).mul_(2.0**-fraction_bits).to(dtype)


def add_checked_(stream: torch.Tensor, addend: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
    """Add in place, with wrap-around; set `flags[OUT_OF_RANGE]` where the true sum does not fit."""
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
