"""`RememberReport`: what came of a run."""

import dataclasses

from ...hierarchy import Pair


@dataclasses.dataclass(frozen=True)
class RememberReport:
    """What `remember` did.

    Attributes:
        pairs: What was to be remembered.
        exact: By pair, whether its context came back, token for token, by greedy recall.
        steps: Steps of training, with those before an interruption.
        seconds: Seconds of training, likewise.
        expand_loss: Last loss of contexts from their queries, nats a token; None if it was never measured.
        compress_loss: Last loss of queries from their contexts, likewise.
        lost: Queries of earlier contexts that the adapter did not know any more when it was asked to remember others.
        expanded: By pair, whether its context came back from its memory alone; None where that was not learned (no
            memory tokens, or no `cycle_weight`).
        cycle_loss: Last loss of contexts from their memories, as `expand_loss`.
    """

    pairs: list[Pair]
    exact: list[bool]
    steps: int
    seconds: float
    expand_loss: float | None
    compress_loss: float | None
    lost: tuple[str, ...] = ()
    expanded: list[bool] | None = None
    cycle_loss: float | None = None

    @property
    def exact_match(self) -> float:
        """Share of the pairs whose context came back exactly."""
        return sum(self.exact) / len(self.exact)

    def by_level(self) -> dict[str, tuple[int, int]]:
        """Count by level the contexts that came back exactly, and all of them."""
        counts: dict[str, tuple[int, int]] = {}
        for pair, exact in zip(self.pairs, self.exact, strict=True):
            right, total = counts.get(pair.level, (0, 0))
            counts[pair.level] = (right + exact, total + 1)
        return counts

    def __str__(self):
        levels = ", ".join(f"{level} {right}/{total}" for level, (right, total) in self.by_level().items())
        counted = f"{sum(self.exact)} of {len(self.exact)} contexts exact ({levels})"
        lost = f"; {len(self.lost)} of those remembered before were lost" if self.lost else ""
        expanded = "" if self.expanded is None else f", {sum(self.expanded)} from their memory alone"
        return f"{counted}{expanded}, {self.steps} steps, {self.seconds:.0f} s{lost}"
