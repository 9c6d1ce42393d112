"""`R3MemConfig`: what an `R3MemModel` is made of beside its base model."""

import dataclasses
from collections.abc import Sequence

from .reversible import MomentumCoupling
from .reversible.direction import FORMS, core_of, momentum_bits


@dataclasses.dataclass(frozen=True)
class R3MemConfig:
    """Settings of an `R3MemModel`; saved with it.

    lora_r, lora_alpha, lora_dropout: of the LoRA adapter, as PEFT's LoraConfig names them. target_modules: the linear
        modules of a layer that are adapted, by the ends of their names, or "all-linear". None of the four is of use
        if the base model is a PeftModel already.
    first_adapted_layer: layers from this one to the last are adapted; None: from the core on. What lies below
        needs no backward pass, and is as before in both directions.
    bits, fraction_bits: of the momentum coupling, see `MomentumCoupling`.
    backward: how the core is read backward (DESIGN 2.6). "reversed": the momentum update in reversed order, by the
        same kernels; "inverse": the coupling's own inverse, which amplifies by `1 / backward_momentum` a layer.
    core: the layers `(first, end)` that are read backward, or "all"; None: a third of the depth above its middle, as
        (16, 26) of 30, which learned fast and disturbed the forward direction least of those that were measured; in
        the inverse form (16, 22), beyond which it leaves the range of the streams.
    backward_momentum: of the inverse form: 1/2, 1/4, 1/16 or 1/256.
    compress_weight, expand_weight: of the two terms of the objective (DESIGN 2.7): the query from its context in the
        forward direction, and the context from its query in the backward direction.

    Raises ValueError for settings out of range.
    """

    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    first_adapted_layer: int | None = None
    bits: int | Sequence[int] = 4
    fraction_bits: int = 14
    backward: str = "reversed"
    core: str | tuple[int, int] | None = None
    backward_momentum: float = 0.5
    compress_weight: float = 1.0
    expand_weight: float = 1.0

    def __post_init__(self):
        if self.fraction_bits == "auto":
            raise ValueError("fraction_bits must be a number here: what was learned depends on it, so it is saved")
        self.coupling()
        momentum_bits(self.backward_momentum)
        if self.backward not in FORMS:
            raise ValueError(f"backward must be one of {FORMS}, got {self.backward!r}")
        for name in ("lora_r", "lora_alpha"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        for name in ("compress_weight", "expand_weight"):
            weight = getattr(self, name)
            if not (isinstance(weight, (int, float)) and 0 <= weight < float("inf")):
                raise ValueError(f"{name} must be a number that is not negative, got {weight!r}")
        for name in ("core", "target_modules", "bits"):  # JSON gives lists
            if isinstance(getattr(self, name), (list, set, frozenset)):
                object.__setattr__(self, name, tuple(getattr(self, name)))

    def coupling(self) -> MomentumCoupling:
        return MomentumCoupling(bits=self.bits, fraction_bits=self.fraction_bits)

    def resolved(self, num_layers: int) -> "R3MemConfig":
        """The same with a core that fits a model of this depth. Raises ValueError if none does."""
        core = self.core
        if core is None:
            first = num_layers * 16 // 30
            end = num_layers * (22 if self.backward == "inverse" else 26) // 30
            core = (first, max(first + 1, end))
        reach = core_of(core, num_layers)
        first = reach.start if self.first_adapted_layer is None else self.first_adapted_layer
        if not 0 <= first < num_layers:
            raise ValueError(f"first_adapted_layer must lie in 0..{num_layers - 1}, got {first!r}")
        return dataclasses.replace(self, core=(reach.start, reach.stop), first_adapted_layer=first)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "R3MemConfig":
        """Raises ValueError for a setting that this version does not know."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown settings {unknown}: written by a newer version of r3mem_fast?")
        return cls(**values)
