"""`RememberReport`: the result of a run."""

import dataclasses
from collections.abc import Sequence

from ...hierarchy import Pair


@dataclasses.dataclass(frozen=True)
class RememberReport:
    """Report of what `remember` did.

    Attributes:
        pairs: Pairs that were to be remembered.
        exact: For each pair, whether greedy recall gave its context back, token for token.
        steps: Number of training steps, including those before an interruption.
        seconds: Seconds of training, including those before an interruption.
        expand_loss: Last loss of contexts given their queries, in nats a token; None if it was never measured.
        compress_loss: Last loss of queries given their contexts, in nats a token; None if it was never measured.
        lost: Queries of contexts that the adapter knew exactly before, and no longer knew when this run began.
        expanded: For each pair, whether its context came back from its memory alone; None if that was not learned (no
            memory tokens, or no `cycle_weight`).
        cycle_loss: Last loss of contexts given their memories, in nats a token; None if it was never measured.
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

    @classmethod
    def joined(cls, reports: Sequence["RememberReport"]) -> "RememberReport":
        """Report of several runs, each of its own adapter, as of one: the largest losses, all steps and seconds.

        Args:
            reports: Their reports; if there are none, nothing was left to be learned.
        """
        losses = {
            name: max((loss for report in reports if (loss := getattr(report, name)) is not None), default=None)
            for name in ("expand_loss", "compress_loss", "cycle_loss")
        }
        expanded = [report.expanded for report in reports if report.expanded is not None]
        return cls(
            pairs=[pair for report in reports for pair in report.pairs],
            exact=[exact for report in reports for exact in report.exact],
            steps=sum(report.steps for report in reports),
            seconds=sum(report.seconds for report in reports),
            lost=tuple(query for report in reports for query in report.lost),
            expanded=[known for of_one in expanded for known in of_one] if expanded else None,
            **losses,
        )

    @property
    def exact_match(self) -> float:
        """Share of the pairs whose context came back exactly; 1 if there was nothing to be learned."""
        return sum(self.exact) / len(self.exact) if self.exact else 1.0

    def by_level(self) -> dict[str, tuple[int, int]]:
        """Counts by level: contexts that came back exactly, and all contexts."""
        counts: dict[str, tuple[int, int]] = {}
        for pair, exact in zip(self.pairs, self.exact, strict=True):
            right, total = counts.get(pair.level, (0, 0))
            counts[pair.level] = (right + exact, total + 1)
        return counts

    def __str__(self) -> str:
        levels = ", ".join(f"{level} {right}/{total}" for level, (right, total) in self.by_level().items())
        counted = f"{sum(self.exact)} of {len(self.exact)} contexts exact ({levels})"
        lost = f"; {len(self.lost)} of those remembered before were lost" if self.lost else ""
        expanded = "" if self.expanded is None else f", {sum(self.expanded)} from their memory alone"
        return f"{counted}{expanded}, {self.steps} steps, {self.seconds:.0f} s{lost}"
