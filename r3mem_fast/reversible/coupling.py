"""Settings of the coupling, by which a residual branch joins the two streams; the arithmetic is in the kernels."""

from collections.abc import Sequence
from dataclasses import dataclass

from r3mem_fast.kernels.coupling import MAX_FRACTION_BITS, SIDE_BITS


@dataclass(frozen=True)
class MomentumCoupling:
    """Momentum residual coupling with `m = 2**-bits` (Sander et al. 2021, eq. 4), bit-exact.

    Attributes:
        bits: Side bits kept for each element and layer: 1, 2, 4 or 8, or a sequence of one such number for each layer.
            Fewer bits cost less memory and take the network further from the pretrained one; 4 is within noise of it.
        fraction_bits: Binary places of the int32 streams, 0 to 24; the streams then reach `±2**(31 - fraction_bits)`.
            The default reaches ±131072, five times what SmolLM2-135M's residual stream does (25,000, at its first
            token). `"auto"`, for models whose stream goes further, chooses them in the first forward pass, from one
            pass of the plain network over the same input, with two bits of headroom. A model that leaves the range
            raises or gives NaN.

    Raises:
        ValueError: A setting has another value.
    """

    bits: int | Sequence[int] = 4
    fraction_bits: int | str = 14

    def __post_init__(self) -> None:
        """Check the settings."""
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
        """Return the side bits of every layer.

        Args:
            num_layers: Number of layers of the model.

        Returns:
            One number for each layer.

        Raises:
            ValueError: `bits` is a sequence for another number of layers.
        """
        if isinstance(self.bits, int):
            return [self.bits] * num_layers
        if len(self.bits) != num_layers:
            raise ValueError(f"bits names {len(self.bits)} layers, the model has {num_layers}")
        return list(self.bits)
