"""`R3MemConfig`: what an `R3MemModel` is made of beside its base model."""

import dataclasses
from collections.abc import Sequence

from .memory.memory import PLACEMENTS, MemoryLayout
from .reversible import MomentumCoupling
from .reversible.direction import FORMS, core_of, momentum_bits
from .reversible.replay import check_bptt_segments

KEPT_SEGMENTS = ("none", "device", "host")
# How a model is trained, and nothing about what it computes.
TRAINING_SETTINGS = (
    "bptt_segments",
    "kept_segments",
    "offload_side_bits",
    "memory_dropout",
    "distillation_weight",
    "compress_weight",
    "expand_weight",
    "cycle_weight",
)


@dataclasses.dataclass(frozen=True)
class R3MemConfig:
    """Settings of an `R3MemModel`; saved with it.

    lora_r, lora_alpha, lora_dropout: of the LoRA adapter, as PEFT's LoraConfig names them. target_modules: the linear
        modules of a layer that are adapted, by the ends of their names, or "all-linear". None of the four is of use
        if the base model is a PeftModel already.
    first_adapted_layer: layers from this one to the last are adapted; None: all if there are memory tokens, whose
        embeddings are learned below them, else from the core on. What lies below then needs no backward pass, and is
        as before in both directions.
    bits, fraction_bits: of the momentum coupling, see `MomentumCoupling`.
    backward: how the core is read backward. "reversed": the momentum update in reversed order, by the
        same kernels; "inverse": the coupling's own inverse, which amplifies by `1 / backward_momentum` a layer.
    core: the layers `(first, end)` that are read backward, or "all"; None: a third of the depth above its middle, as
        (16, 26) of 30, which learned fast and disturbed the forward direction least of those that were measured; in
        the inverse form (16, 22), beyond which it leaves the range of the streams.
    backward_momentum: of the inverse form: 1/2, 1/4, 1/16 or 1/256.
    num_memory_tokens: virtual memory tokens that are written after each segment, 1 to 1024; 0: none.
    segment_length: of the segments that a history is compressed in, in tokens. segment_overlap: of the tokens before a
        segment that many, the last, are read again with it, as they are, behind the memory; `Memory` carries them.
        What was said last matters most, and a memory need not hold it then. max_memory_segments: of how many
        segments, the last ones, the memory is kept and read; 1 is a recurrent memory. None: of all, up to half of
        the model's positions; beyond it compressing raises.
    memory_placement: what a memory is. "every_layer": the memory tokens' keys and values in every layer, read by that
        layer's attention. "input": their last hidden states, read as embeddings before the next segment.
    adapter_rows: which rows of the forward direction the adapters change. "all", or "memory": the memory tokens alone,
        so that without a memory the model is its base model, bit for bit. Backward they change all in either case.
    bptt_segments: in training over several segments, gradients pass through the memories of at most so many of them,
        counted from the first; None: of all. kept_segments: what is kept of each segment until the backward pass.
        "none": nothing but its memory, and of the last one all; the others are run again then. "device":
        the last streams and the side bits, which saves that; "host": the same in host memory.
    offload_side_bits: of training, let them wait in host memory, see `make_reversible`.
    memory_dropout: in training over several segments, the probability with which a row does not see the memory before
        a segment, only its overlap: so that what can be known without a memory is not learned as a part of it.
    distillation_weight: in training over several segments the loss is `(1 - w) * cross-entropy + w * divergence`: the
        Kullback-Leibler divergence, in nats a token, from the base model with the full context. 0 to 1; 0: without.
    compress_weight, expand_weight, cycle_weight: of the terms of the objective: the query from its
        context (with memory tokens: from the memory of it) in the forward direction; the context from its query, and
        the context from its memory, in the backward direction. The third only with memory tokens.

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
    num_memory_tokens: int = 0
    segment_length: int = 256
    segment_overlap: int = 0
    max_memory_segments: int | None = 1
    memory_placement: str = "every_layer"
    adapter_rows: str = "all"
    bptt_segments: int | None = None
    kept_segments: str = "none"
    offload_side_bits: bool = False
    memory_dropout: float = 0.0
    distillation_weight: float = 0.0
    compress_weight: float = 1.0
    expand_weight: float = 1.0
    cycle_weight: float = 1.0

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
        for name, least, most in (
            ("num_memory_tokens", 0, 1024),
            ("segment_length", 1, float("inf")),
            ("segment_overlap", 0, float("inf")),
            ("max_memory_segments", 1, float("inf")),
        ):
            value = getattr(self, name)
            if value is None and name == "max_memory_segments":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ValueError(f"{name} must be an integer from {least} to {most}, got {value!r}")
        check_bptt_segments(self.bptt_segments)
        for name, choices in (
            ("memory_placement", PLACEMENTS),
            ("adapter_rows", ("all", "memory")),
            ("kept_segments", KEPT_SEGMENTS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("memory_dropout", "distillation_weight", "bptt_segments"):
            if getattr(self, name) and not self.num_memory_tokens:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is for models with memory tokens (num_memory_tokens)"
                )
        for name in ("memory_dropout", "distillation_weight"):
            if not (isinstance(getattr(self, name), (int, float)) and 0 <= getattr(self, name) <= 1):
                raise ValueError(f"{name} must be a number from 0 to 1, got {getattr(self, name)!r}")
        for name in ("compress_weight", "expand_weight", "cycle_weight"):
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
        first = self.first_adapted_layer
        if first is None:
            first = 0 if self.num_memory_tokens else reach.start
        if not 0 <= first < num_layers:
            raise ValueError(f"first_adapted_layer must lie in 0..{num_layers - 1}, got {first!r}")
        return dataclasses.replace(self, core=(reach.start, reach.stop), first_adapted_layer=first)

    def memory_layout(self, max_tokens: int | None) -> MemoryLayout | None:
        """Layout of the memories of a model with so many positions; None without memory tokens.

        Raises ValueError if memory and segment do not fit into the positions.
        """
        written, segments = self.num_memory_tokens, self.max_memory_segments
        if not written:
            return None
        rest = self.segment_overlap + self.segment_length + written
        if segments is None:
            if max_tokens is None:
                raise ValueError("max_memory_segments=None needs a model that names its positions; give a number")
            segments = (max_tokens - max(rest, max_tokens // 2)) // written
        if segments < 1 or (max_tokens is not None and segments * written + rest > max_tokens):
            raise ValueError(
                f"{max(segments, 1)} segments of memory of {written} tokens, a segment of {self.segment_length} with "
                f"{self.segment_overlap} from before it and {written} to write do not fit into the model's "
                f"{max_tokens} positions"
            )
        return MemoryLayout(
            written,
            self.segment_length,
            segments,
            self.max_memory_segments is None,
            self.memory_placement,
            self.segment_overlap,
        )

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "R3MemConfig":
        """Raises ValueError for a setting that this version does not know."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown settings {unknown}: written by a newer version of r3mem_fast?")
        return cls(**values)
