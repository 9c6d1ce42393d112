"""What belongs to a memory beside its values: the layout that it shares with others, and what it was made with."""

import dataclasses
import math

from r3mem_fast.kernels.matching import MAX_KEPT

# Segments that a slot is matched again with, unless the budget holds more than half as many as they are.
_LIFETIME = 8


@dataclasses.dataclass(frozen=True)
class MemoryLayout:
    """Sizes and settings that memories must share to be read by one model.

    Attributes:
        num_memory_tokens: Memory tokens that are written after each segment.
        segment_length: Tokens of a segment, without those that are read again.
        readable_segments: Number of segments whose memory is kept; the last ones are.
        keeps_all: Whether one segment more is an error. If not, the oldest one is forgotten.
        placement: "every_layer" or "input", see `R3MemConfig.memory_placement`.
        segment_overlap: Number of tokens, directly before a segment, that are read again with it.
        writer: "tokens" or "matched", see `R3MemConfig.memory_writer`. What follows is of matched memories.
        budget: Slots that a row's memory has at most when its text has ended, beside pinned ones.
        beyond_budget: "rematch", "rematch_once", "forget" or "error", see `R3MemConfig.beyond_budget`.
        reach: Largest age of a slot, in tokens; what is older keeps this age.
        queries: Whose queries they are matched to, see `R3MemConfig.memory_queries`.
        allocation: How slots are shared among heads, see `R3MemConfig.memory_allocation`. All numbers of slots are
            those of a head on average.
    """

    num_memory_tokens: int
    segment_length: int
    readable_segments: int
    keeps_all: bool
    placement: str
    segment_overlap: int = 0
    writer: str = "tokens"
    budget: int = 0
    beyond_budget: str = "rematch"
    reach: int = 0
    queries: str = "own"
    allocation: str = "uniform"

    @property
    def is_adaptive(self) -> bool:
        """Whether heads have other numbers of slots."""
        return self.allocation == "adaptive"

    @property
    def first_position(self) -> int:
        """Position of a segment's first token, with whatever memory before it."""
        return self.reach if self.writer == "matched" else self.readable_segments * self.num_memory_tokens

    @property
    def waits(self) -> bool:
        """Whether a full segment is read only when it is known whether more follows: the last one is matched apart."""
        return self.beyond_budget == "rematch_once"

    @property
    def most_slots(self) -> int:
        """Slots that a row's memory has at most, beside pinned ones, also while its text is read."""
        if self.writer != "matched":
            return self.readable_segments * self.num_memory_tokens
        if not self.waits:
            return self.budget
        return max(self.budget, math.ceil(self.reach / self.segment_length) * self.num_memory_tokens)

    @property
    def rematches(self) -> bool:
        """Whether slots beyond the budget are matched again."""
        return self.waits or self.beyond_budget == "rematch"

    @property
    def most_matched(self) -> int:
        """Slots of a row that are matched together at most, beside pinned ones."""
        return self.budget if self.rematches else self.num_memory_tokens

    @property
    def most_pinned(self) -> int:
        """Most tokens at the beginning of a text whose slots can stay as they are; 0 unless memories are matched."""
        return min(self.reach // 2, MAX_KEPT - self.most_matched) if self.writer == "matched" else 0

    @property
    def lifetime(self) -> int:
        """Age in tokens up to which slots are matched again with newer ones; older ones go."""
        # The largest age may be any beyond it.
        most = self.reach - 1
        if self.waits:
            return most
        segments = max(_LIFETIME, 2 * math.ceil(self.budget / self.num_memory_tokens))
        return min(segments * self.segment_length, most)

    def with_memory_tokens(self, count: int | None = None, budget: int | None = None) -> "MemoryLayout":
        """The layout of matched memories of another size.

        Args:
            count: Slots of a segment, from 1 to its tokens; None: as many as here.
            budget: Slots of a row's memory, beside pinned ones; None: for as many segments as here.

        Raises:
            TypeError: A number is no int.
            ValueError: There are too few or too many, or these are no matched memories.
        """
        count = self.num_memory_tokens if count is None else count
        for name, number in (("memory_tokens", count), ("memory_budget", budget)):
            if number is not None and type(number) is not int:
                raise TypeError(f"{name} must be an int, got {number!r}")
        if self.writer != "matched" or not 1 <= count <= self.segment_length:
            raise ValueError(
                f"memory_tokens={count!r} must lie in 1..{self.segment_length}, the tokens of a segment, and is for "
                "matched and anchored memories"
            )
        budget = max(count, self.budget * count // self.num_memory_tokens) if budget is None else budget
        most = MAX_KEPT if self.rematches else self.reach
        if not count <= budget <= most:
            raise ValueError(
                f"memory_budget={budget!r} must lie in {count}..{most}, the slots of a segment and of all"
            )
        return dataclasses.replace(
            self, num_memory_tokens=count, budget=budget, readable_segments=max(1, budget // count)
        )

    def to_dict(self) -> dict:
        """Its fields as values for JSON; format 1 of memory files has those alone that memory tokens need."""
        fields = dataclasses.asdict(self)
        for name, default in (("queries", "own"), ("allocation", "uniform")):
            if fields[name] == default:  # so that fingerprints of earlier memories stay what they were
                del fields[name]
        if self.writer == "tokens":
            fields = {name: fields[name] for name in list(fields)[:6]}
        return fields


@dataclasses.dataclass(frozen=True)
class Origin:
    """Fingerprints of what a memory was made with.

    Attributes:
        base: Fingerprint of the base model.
        adapter: Fingerprint of the adapters, the memory tokens and the settings.
        tokenizer: Fingerprint of the tokenizer; None for a memory that was made from token ids.
    """

    base: str
    adapter: str
    tokenizer: str | None = None
