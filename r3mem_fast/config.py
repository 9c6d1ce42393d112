"""`R3MemConfig`: what an `R3MemModel` is made of beside its base model. Importing it needs no torch."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .choices import ADAPTER_ROWS, ALLOCATIONS, BEYOND_BUDGET, FORMS, KEPT_SEGMENTS, PLACEMENTS, QUERIES, WRITERS
from .settings import check, described, names_of_group, setting

if TYPE_CHECKING:
    from .memory import MemoryLayout
    from .reversible import MomentumCoupling

ADAPTER, COUPLING, BACKWARD, MEMORY, TRAINING, OBJECTIVE = (
    "adapter",
    "coupling",
    "backward direction",
    "memory",
    "training through segments",
    "objective",
)


@described
@dataclasses.dataclass(frozen=True)
class R3MemConfig:
    """Settings of an `R3MemModel`; saved with it.

    Raises:
        ValueError: A setting is out of range, or does not go with another.
    """

    lora_r: int = setting(
        16,
        "Rank of a new LoRA adapter. Of no use, like the other settings of the adapter, if the base model is a "
        "PeftModel already.",
        group=ADAPTER,
        option="lora-r",
        least=1,
    )
    lora_alpha: int = setting(
        32, "Scale of the adapter: its output is multiplied by `alpha / r`.", group=ADAPTER, least=1
    )
    lora_dropout: float = setting(0.0, "Dropout on the adapter's input.", group=ADAPTER)
    target_modules: str | Sequence[str] = setting(
        "all-linear",
        "Linear modules of a layer that are adapted, by the ends of their names, or `all-linear`.",
        group=ADAPTER,
    )
    first_adapted_layer: int | None = setting(
        None,
        "Layers from this one on are adapted. What lies below needs no backward pass, and is as before in both "
        "directions.",
        group=ADAPTER,
        option="first-adapted-layer",
        metavar="LAYER",
        unset="all if there are memory tokens, whose embeddings are learned below them, else from the core on",
    )
    bits: int | Sequence[int] = setting(
        4, "Side bits of the momentum coupling, see `MomentumCoupling`.", group=COUPLING
    )
    fraction_bits: int = setting(14, "Binary places of the streams, see `MomentumCoupling`.", group=COUPLING)
    backward: str = setting(
        "reversed",
        "How the core is read backward. `reversed`: the momentum update in reversed order, by the same kernels; "
        "`inverse`: the coupling's own inverse, which amplifies by `1 / backward_momentum` a layer.",
        group=BACKWARD,
        option="backward",
        choices=FORMS,
    )
    core: str | tuple[int, int] | None = setting(
        None,
        "Layers FIRST,END that are read backward, or all. The default is (16, 26) of 30 layers, which learned fast "
        "and disturbed the forward direction least of those that were measured; in the inverse form (16, 22), beyond "
        "which it leaves the range of the streams.",
        group=BACKWARD,
        option="core",
        unset="a third of the depth, above its middle",
    )
    backward_momentum: float = setting(0.5, "Momentum of the inverse form: 1/2, 1/4, 1/16 or 1/256.", group=BACKWARD)
    num_memory_tokens: int = setting(
        0,
        "Memory tokens that are written after each segment. 0: none.",
        group=MEMORY,
        option="memory-tokens",
        least=0,
        most=1024,
    )
    memory_writer: str = setting(
        "tokens",
        "How a memory is written. `tokens`: by learned memory tokens behind a segment; `matched`: with no training, "
        "by the keys of a segment that are attended most, with values that match the attention to all of them; "
        "`anchored`: matched, with a change of keys and values that is learned; the base model reads them, as stores "
        "and other engines need it, with `adapter_rows` of `memory`.",
        group=MEMORY,
        option="memory-writer",
        choices=WRITERS,
    )
    memory_budget: int | None = setting(
        None,
        "Slots of a matched memory at most, in each layer.",
        group=MEMORY,
        option="memory-budget",
        least=1,
        unset="`num_memory_tokens` for each of `max_memory_segments`",
    )
    beyond_budget: str = setting(
        "forget",
        "What happens to a matched memory beyond its budget. `forget`: the oldest slots go, but the first; `rematch`: "
        "what is old and what is new are matched again together, and what is older than eight segments goes (or than "
        "twice as many as the budget would hold); `rematch_once`: all slots that positions reach are held until a "
        "text has ended (`finish`), and matched then; `error`: compressing raises.",
        group=MEMORY,
        option="beyond-budget",
        choices=BEYOND_BUDGET,
    )
    memory_allocation: str = setting(
        "uniform",
        "How many slots each head of each layer has of a matched memory. `uniform`: as many; `adaptive`: as many on "
        "average, and more where more is asked for.",
        group=MEMORY,
        option="memory-allocation",
        choices=ALLOCATIONS,
    )
    memory_queries: str = setting(
        "own",
        "Whose queries a matched memory is matched to. `own`: those of the pass that reads the text; `reread`: those "
        "of a second pass over it, behind the first; `pairs`: those of the questions that the hierarchy asks; or "
        "several, such as `own+pairs`.",
        group=MEMORY,
        option="memory-queries",
        choices=QUERIES,
    )
    longest_change: float | None = setting(
        None,
        "Length of the change that anchors make of a slot's keys and values at most, of the mean length of the "
        "segment's. Far from what it was trained on an adapter changes some heads too much.",
        group=MEMORY,
        option="longest-change",
        above=0,
        unset="any",
    )
    segment_length: int = setting(
        256,
        "Tokens of a segment in which a history is compressed.",
        group=MEMORY,
        option="segment-length",
        least=1,
    )
    segment_overlap: int = setting(
        0,
        "Tokens before a segment that are read again with it, behind the memory. What was said last matters most, and "
        "a memory need not hold it then; `Memory` carries them.",
        group=MEMORY,
        option="segment-overlap",
        least=0,
    )
    max_memory_segments: int | None = setting(
        1,
        "Segments, the last ones, whose memory is kept and read. 1 is a recurrent memory; None: all, up to half of "
        "the model's positions, beyond which compressing raises.",
        group=MEMORY,
        option="memory-segments",
        least=1,
        unset="all",
    )
    memory_placement: str = setting(
        "every_layer",
        "What a memory is. `every_layer`: the memory tokens' keys and values in every layer, read by that layer's "
        "attention; `input`: their last hidden states, read as embeddings before the next segment.",
        group=MEMORY,
        option="memory-placement",
        choices=PLACEMENTS,
    )
    adapter_rows: str = setting(
        "all",
        "Tokens that the adapters act on, reading forward. `memory`: memory tokens, or anchors, alone, so that "
        "without a memory the model is its base model, bit for bit; `all`: those that are read, too. Backward they "
        "act on all in either case.",
        group=MEMORY,
        option="adapter-rows",
        choices=ADAPTER_ROWS,
    )
    bptt_segments: int | None = setting(
        None,
        "Segments through whose memories gradients pass at most, counted from the first.",
        group=TRAINING,
        option="bptt-segments",
        least=2,
        unset="all",
    )
    kept_segments: str = setting(
        "none",
        "What is kept of each segment until the backward pass. `none`: its memory alone, and of the last segment all; "
        "the others are run again then. `device`: its last streams and side bits; `host`: the same in host memory.",
        group=TRAINING,
        option="kept-segments",
        choices=KEPT_SEGMENTS,
    )
    offload_side_bits: bool = setting(
        False, "Whether side bits wait in host memory, see `make_reversible`.", group=TRAINING
    )
    memory_dropout: float = setting(
        0.0,
        "Probability with which a row does not see the memory before a segment, only its overlap. What can be known "
        "without a memory is then not learned as a part of it.",
        group=TRAINING,
        option="memory-dropout",
        least=0,
        most=1,
    )
    distillation_weight: float = setting(
        0.0,
        "Weight of the divergence from the base model with the full context, 0 to 1. The loss is "
        "`(1 - w) * cross-entropy + w * divergence`: the Kullback-Leibler divergence, in nats a token.",
        group=TRAINING,
        option="distillation",
        least=0,
        most=1,
    )
    compress_weight: float = setting(
        1.0,
        "Weight of the term that predicts a query from its context (with memory tokens: from the memory of it), "
        "forward.",
        group=OBJECTIVE,
        least=0,
    )
    expand_weight: float = setting(
        1.0, "Weight of the term that predicts a context from its query, backward.", group=OBJECTIVE, least=0
    )
    cycle_weight: float = setting(
        1.0,
        "Weight of the term that predicts a context from its memory, backward. Only with memory tokens.",
        group=OBJECTIVE,
        least=0,
    )

    def __post_init__(self):
        from .reversible.direction import momentum_bits
        from .reversible.replay import check_bptt_segments

        if self.fraction_bits == "auto":
            raise ValueError("fraction_bits must be a number here: what was learned depends on it, so it is saved")
        self.coupling()
        momentum_bits(self.backward_momentum)
        check_bptt_segments(self.bptt_segments)
        check(self)
        for name in ("memory_dropout", "distillation_weight", "bptt_segments"):
            if getattr(self, name) and not self.num_memory_tokens:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is for models with memory tokens (num_memory_tokens)"
                )
        if self.longest_change and self.memory_writer != "anchored":
            raise ValueError(
                f"longest_change={self.longest_change!r} is for anchored memories: nothing else is changed"
            )
        if self.memory_writer != "tokens":
            self._check_matched()
        for name in ("core", "target_modules", "bits"):  # JSON gives lists
            if isinstance(getattr(self, name), (list, set, frozenset)):
                object.__setattr__(self, name, tuple(getattr(self, name)))

    def _check_matched(self):
        learns = self.memory_writer == "anchored"
        names = ("memory_dropout",) if learns else ("memory_dropout", "distillation_weight", "bptt_segments")
        wrong = [name for name in names if getattr(self, name)]
        wrong += ["memory_placement"] if self.memory_placement != "every_layer" else []
        if wrong:
            given = f"{wrong[0]}={getattr(self, wrong[0])!r}"
            raise ValueError(f"{given} is for memory tokens, not for {self.memory_writer} memories")
        if self.max_memory_segments is None and self.memory_budget is None:
            raise ValueError("max_memory_segments=None is for memory tokens; give a memory_budget, in slots")

    def coupling(self) -> "MomentumCoupling":
        """The momentum coupling of these settings."""
        from .reversible import MomentumCoupling

        return MomentumCoupling(bits=self.bits, fraction_bits=self.fraction_bits)

    def resolved(self, num_layers: int, sources: Sequence[int] = ()) -> "R3MemConfig":
        """The same settings with a core, and a first adapted layer, for a model of this depth.

        Args:
            num_layers: Number of its layers.
            sources: For each layer the one whose keys and values it reads; (): its own.

        Raises:
            ValueError: They do not fit it.
        """
        from .reversible.direction import check_core, core_above_shared, core_of

        sources = sources or range(num_layers)
        core = self.core
        if core is None:
            start = num_layers * 16 // 30
            end = num_layers * (22 if self.backward == "inverse" else 26) // 30
            core = core_above_shared((start, max(start + 1, end)), sources)
        reach = core_of(core, num_layers)
        check_core(reach, sources)
        first = self.first_adapted_layer
        if first is None:
            first = 0 if self.num_memory_tokens and self.memory_writer != "matched" else reach.start
        if not 0 <= first < num_layers:
            raise ValueError(f"first_adapted_layer must lie in 0..{num_layers - 1}, got {first!r}")
        return dataclasses.replace(self, core=(reach.start, reach.stop), first_adapted_layer=first)

    def memory_layout(self, max_tokens: int | None) -> "MemoryLayout | None":
        """Layout of the memories of a model with so many positions; None without memory tokens.

        Raises:
            ValueError: Memory and segment do not fit into the positions.
        """
        from .memory import MemoryLayout

        written, segments = self.num_memory_tokens, self.max_memory_segments
        if not written:
            return None
        if self.memory_writer != "tokens":
            return self._matched_layout(max_tokens)
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
        keeps_all, overlap = self.max_memory_segments is None, self.segment_overlap
        return MemoryLayout(written, self.segment_length, segments, keeps_all, self.memory_placement, overlap)

    def _matched_layout(self, max_tokens):
        from r3mem_fast.kernels.matching import MAX_KEPT

        from .memory import MemoryLayout

        # Half of the positions are before a pass, for slots; the other half for what is read, and written.
        reach = REACH if max_tokens is None else min(REACH, max_tokens // 2)
        budget = self.memory_budget
        if budget is None:
            assert self.max_memory_segments is not None, "see _check_matched"
            budget = self.num_memory_tokens * self.max_memory_segments
        if budget > MAX_KEPT and self.beyond_budget.startswith("rematch"):
            raise ValueError(
                f"a memory_budget of {budget} slots is too large to be matched together; {MAX_KEPT} at most can "
                'be: use a smaller one, or beyond_budget="forget"'
            )
        # With a prompt of one token, at least, where a whole segment may wait.
        read = self.segment_overlap + self.segment_length + (self.beyond_budget == "rematch_once")
        if budget < self.num_memory_tokens or (max_tokens is not None and reach + read > max_tokens):
            raise ValueError(
                f"a budget of {budget} slots, {self.num_memory_tokens} for a segment of {self.segment_length} with "
                f"{self.segment_overlap} from before it do not fit together, or not into half of the model's "
                f"{max_tokens} positions"
            )
        return MemoryLayout(
            num_memory_tokens=self.num_memory_tokens,
            segment_length=self.segment_length,
            readable_segments=max(1, budget // self.num_memory_tokens),
            keeps_all=False,
            placement=self.memory_placement,
            segment_overlap=self.segment_overlap,
            writer="matched",
            budget=budget,
            beyond_budget=self.beyond_budget,
            reach=reach,
            queries=self.memory_queries,
            allocation=self.memory_allocation,
        )

    def to_dict(self) -> dict:
        """The settings by name, as values for JSON.

        Those that came later are left out at their defaults, so that fingerprints and checkpoints stay what they were.
        """
        values, defaults = dataclasses.asdict(self), {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if name not in _LATER or value != defaults[name]}

    @classmethod
    def from_dict(cls, values: dict) -> "R3MemConfig":
        """The settings that `to_dict` gave.

        Raises:
            ValueError: There is a setting that this version does not know.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown settings {unknown}: written by a newer version of r3mem_fast?")
        return cls(**values)


# Settings of later versions.
_LATER = ("memory_writer", "memory_budget", "beyond_budget", "memory_queries", "memory_allocation", "longest_change")
# Positions before a pass at most; what is older than that has this age.
REACH = 4096

# How a model is trained, and nothing about what it computes.
TRAINING_SETTINGS = names_of_group(R3MemConfig, TRAINING, OBJECTIVE)
