"""What the pages' tables are made of: the records of result files, and Markdown."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def records(name: str) -> list[dict]:
    """Return the records of a result file, without the first line, which says what they were measured on."""
    lines = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return lines[1:]


def interval(record: dict[str, float]) -> str:
    """Return a mean and its interval."""
    return f"{record['mean']:.3f} ({record['low']:.3f} to {record['high']:.3f})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines).replace("|  |", "| |")
