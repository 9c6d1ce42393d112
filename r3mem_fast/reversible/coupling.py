"""Couplings: how a residual branch joins the two streams. Settings only; the arithmetic is in the kernels."""

from collections.abc import Sequence
from dataclasses import dataclass

from r3mem_fast.kernels.coupling import MAX_FRACTION_BITS, SIDE_BITS


@dataclass(frozen=True)
class MomentumCoupling:
    """Momentum residual coupling with `m = 2**-bits` (Sander et al. 2021, eq. 4), bit-exact.

    bits: side bits kept per element and layer: 1, 2, 4 or 8, or one such number for every layer. Fewer bits cost less
        memory and take the network further from the pretrained one; 4 is within noise of it.
    fraction_bits: binary places of the int32 streams, which then reach `±2**(31 - fraction_bits)`; 0 to 24. The
        default reaches ±131072, five times what SmolLM2-135M's residual stream does (25,000, at its first token).
        `"auto"` chooses them in the first forward pass, from one pass of the plain network over the same input, with
        two bits of headroom; for models whose stream goes further. A model that leaves the range raises or gives NaN.

    Raises ValueError for other values.
    """

    bits: int | Sequence[int] = 4
    fraction_bits: int | str = 14

    def __post_init__(self):
        per_layer = [self.bits] if isinstance(self.bits, int) else list(self.bits)
        if not per_layer or any(b not in SIDE_BITS for b in per_layer):
            raise ValueError(f"bits must be one of {SIDE_BITS}, or a sequence of them, one a layer; got {self.bits!r}")
        if self.fraction_bits != "auto" and not (
            isinstance(self.fraction_bits, int) and 0 <= self.fraction_bits <= MAX_FRACTION_BITS
        ):
            raise ValueError(
                f"fraction_bits must be 'auto' or an integer in 0..{MAX_FRACTION_BITS}, got {self.fraction_bits!r}"
            )
        if not isinstance(self.bits, int):
            object.__setattr__(self, "bits", tuple(per_layer))

    def bits_of_layers(self, num_layers: int) -> list[int]:
        """Side bits of every layer. Raises ValueError if a sequence was given for another number of layers."""
        if isinstance(self.bits, int):
            return [self.bits] * num_layers
        if len(self.bits) != num_layers:
            raise ValueError(f"bits names {len(self.bits)} layers, the model has {num_layers}")
        return list(self.bits)
