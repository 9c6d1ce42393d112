"""Settings of couplings, by which a residual branch joins the two streams; the arithmetic is in the kernels.

`MomentumCoupling` is the one to use. The others are there to compare with, and for models that are trained reversible
from scratch; they run in plain PyTorch on every device.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field

from r3mem_fast.kernels.coupling import MAX_FRACTION_BITS, SIDE_BITS

from .forms import Update


def balanced_gains(bits: Sequence[int | None]) -> list[float]:
    """Compute the gain of every branch with which the momentum coupling adds it once in all.

    A branch with the gain c is added c times by its layer, c m times by the next one with its momentum m, and so on:
    c (1 + m' (1 + m'' (1 + ...))) = 1.

    Args:
        bits: Side bits of every layer, in the order in which they run; None for m = 0.

    Returns:
        A gain for each layer: 1 for the last one.
    """
    gains, passed_on = [1.0] * len(bits), 0.0
    for index in reversed(range(len(bits))):
        gains[index] = 1.0 / (1.0 + passed_on)
        own = bits[index]
        passed_on = 0.0 if own is None else 2.0**-own * (1.0 + passed_on)
    return gains


@dataclass(frozen=True, kw_only=True)
class Coupling(abc.ABC):
    """Base of all couplings.

    Attributes:
        fraction_bits: Binary places of the int32 streams, 0 to 24; the streams then reach `±2**(31 - fraction_bits)`.
            The default reaches ±131072, five times what SmolLM2-135M's residual stream does (25,000, at its first
            token). `"auto"`, for models whose stream goes further, chooses them in the first forward pass, from one
            pass of the plain network over the same input, with two bits of headroom. A model that leaves the range
            raises or gives NaN.

    Raises:
        ValueError: A setting has another value.
    """

    fraction_bits: int | str = 14

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.fraction_bits != "auto" and not (
            isinstance(self.fraction_bits, int) and 0 <= self.fraction_bits <= MAX_FRACTION_BITS
        ):
            raise ValueError(
                f"fraction_bits must be 'auto' or an integer in 0..{MAX_FRACTION_BITS}, got {self.fraction_bits!r}"
            )

    @property
    def adapter_rank(self) -> int | None:
        """Rank of the adapter that each layer gets; None: it gets none."""
        return None

    def bits_of_layers(self, num_layers: int) -> list[int]:
        """Return the side bits that every layer keeps for an element.

        Args:
            num_layers: Number of layers of the model.

        Raises:
            ValueError: They are set for another number of layers.
        """
        return [0] * num_layers

    @abc.abstractmethod
    def updates(self, num_layers: int) -> list[Update]:
        """Return how every layer's branch joins the streams, from the first layer to the last.

        Args:
            num_layers: Number of layers of the model.

        Raises:
            ValueError: A setting is for another number of layers.
        """


@dataclass(frozen=True)
class UniformCoupling(Coupling):
    """Base of couplings with the same side bits in all layers, and in some an adapter G in each.

    Attributes:
        bits: Side bits kept for each element and layer: 1, 2, 4 or 8.
        rank: Rank of G, see `BottleneckAdapter`; None: there is none.
        fraction_bits: See `Coupling`.

    Raises:
        ValueError: A setting has another value.
    """

    bits: int = 4
    rank: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if self.bits not in SIDE_BITS:
            raise ValueError(f"bits must be one of {SIDE_BITS}, got {self.bits!r}")
        if self.rank is not None and not (isinstance(self.rank, int) and self.rank >= 1):
            raise ValueError(f"rank must be a positive integer, got {self.rank!r}")

    @property
    def adapter_rank(self) -> int | None:
        """Rank of G."""
        return self.rank

    def bits_of_layers(self, num_layers: int) -> list[int]:
        """Return the side bits of every layer, see `Coupling.bits_of_layers`."""
        return [self.bits] * num_layers


@dataclass(frozen=True)
class MomentumCoupling(Coupling):
    """Momentum residual coupling with `m = 2**-bits` (Sander et al. 2021, eq. 4), bit-exact.

    Attributes:
        bits: Side bits kept for each element and layer: 1, 2, 4 or 8, or a sequence of one such number for each layer,
            such as `calibrate` chooses. Fewer bits cost less memory and take the network further from the pretrained
            one; 4 is within noise of it.
        balanced: Whether each branch has the gain with which it is added once in all. A velocity hands a branch on to
            the layers above, m of it to the next one. With the gain 1 - m the first branch is added 1 / (1 - m) times,
            the last one 1 - m times, and those where m changes are off, too. Balancing costs nothing, and brings the
            network nearer to the pretrained one, the more so the fewer the bits.
        fraction_bits: See `Coupling`.

    Raises:
        ValueError: A setting has another value.
    """

    bits: int | Sequence[int] = 4
    balanced: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        per_layer = [self.bits] if isinstance(self.bits, int) else list(self.bits)
        if not per_layer or any(b not in SIDE_BITS for b in per_layer):
            raise ValueError(f"bits must be one of {SIDE_BITS}, or a sequence of them, one a layer; got {self.bits!r}")
        if not isinstance(self.bits, int):
            object.__setattr__(self, "bits", tuple(per_layer))

    def bits_of_layers(self, num_layers: int) -> list[int]:
        """Return the side bits of every layer, see `Coupling.bits_of_layers`."""
        if isinstance(self.bits, int):
            return [self.bits] * num_layers
        if len(self.bits) != num_layers:
            raise ValueError(f"bits names {len(self.bits)} layers, the model has {num_layers}")
        return list(self.bits)

    def updates(self, num_layers: int) -> list[Update]:
        """Return how every layer's branch joins the streams, see `Coupling.updates`."""
        bits = [None, *self.bits_of_layers(num_layers)[1:]]
        gains = balanced_gains(bits) if self.balanced else [None] * num_layers
        return [Update("momentum", own, gain=gain) for own, gain in zip(bits, gains, strict=True)]


@dataclass(frozen=True)
class AdaptedCoupling(UniformCoupling):
    """Momentum coupling with a bottleneck adapter G on the velocity: `x' = x + v' + G(v')`, the paper's adapter.

    Each layer gets a submodule `reversible_adapter` (`BottleneckAdapter`), which changes nothing at first and is
    trained with the model; `restore` takes it off. Put PEFT's adapters on before: PEFT freezes what is there already.

    Attributes:
        bits: Side bits kept for each element and layer: 1, 2, 4 or 8.
        rank: Rank of G.
        fraction_bits: See `Coupling`.

    Raises:
        ValueError: A setting has another value.
    """

    rank: int | None = 64

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if self.rank is None:
            raise ValueError("rank must be a positive integer, got None; MomentumCoupling has no adapters")

    def updates(self, num_layers: int) -> list[Update]:
        """Return how every layer's branch joins the streams, see `Coupling.updates`."""
        return [Update("adapted", None if index == 0 else self.bits) for index in range(num_layers)]


@dataclass(frozen=True)
class BDIACoupling(UniformCoupling):
    """Momentum with a random sign for each row and layer in training, and none in evaluation (Zhang et al. 2024).

    `v' = s m v + (1 - s m) f` with `m = 2**-bits` and s = ±1 in `train()` mode, of mean 0; in `eval()` mode the
    network is the plain one, and has no inverse.

    Attributes:
        bits: Side bits kept for each element and layer: 1, 2, 4 or 8.
        fraction_bits: See `Coupling`.

    Raises:
        ValueError: A setting has another value.
    """

    def updates(self, num_layers: int) -> list[Update]:
        """Return how every layer's branch joins the streams, see `Coupling.updates`."""
        return [Update("bdia", None if index == 0 else self.bits) for index in range(num_layers)]


@dataclass(frozen=True)
class AdditiveCoupling(Coupling):
    """RevNet's coupling of layers in pairs: `y1 = x1 + F(x2)`, `y2 = x2 + G(y1)` (Gomez et al. 2017, eq. 6).

    F and G are the branches of consecutive layers, and both streams begin with the input; the output is the stream
    that the last layer changed. It keeps no side bits. A pretrained Transformer made of it is not a language model any
    more: it is for models that are trained so from scratch.

    Attributes:
        fraction_bits: See `Coupling`.

    Raises:
        ValueError: A setting has another value.
    """

    def updates(self, num_layers: int) -> list[Update]:
        """Return how every layer's branch joins the streams, see `Coupling.updates`."""
        return [Update("additive", None)] * num_layers


@dataclass(frozen=True)
class ScaledCoupling(UniformCoupling):
    """MEFT's first coupling: `y1 = lambda x1 + F(x2)`, `y2 = x2 + G(y1)`, then both change places (Liao et al. 2023).

    F is a whole layer, with its residual connection, and G an adapter, or nothing. lambda = `2**-bits`, so that side
    bits make the inverse exact, where a division by lambda loses more with each layer. The first layer finds x1 = 0,
    and so computes what it did; MEFT begins with a copy of the input.

    Attributes:
        bits: Side bits kept for each element and layer: 1, 2, 4 or 8.
        rank: Rank of the adapter G, which each layer then gets as a submodule `reversible_adapter`; None: there is
            none, and y2 = x2.
        fraction_bits: See `Coupling`.

    Raises:
        ValueError: A setting has another value.
    """

    bits: int = 8
    rank: int | None = None

    def updates(self, num_layers: int) -> list[Update]:
        """Return how every layer's branch joins the streams, see `Coupling.updates`."""
        return [Update("scaled", self.bits)] * num_layers
