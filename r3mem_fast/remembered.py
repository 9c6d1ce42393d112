"""Entries of `r3mem.json` for what an adapter remembers: queries, and digests of contexts in place of their text."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .hierarchy import Pair
from .training.remember import RememberReport

Entry = dict[str, Any]


def entries_of(report: RememberReport, whole_of: Mapping[str, str], count: Callable[[str], int]) -> list[Entry]:
    """Make entries for what a run has learned.

    Args:
        report: Report of the run.
        whole_of: For each document that was cut from another one, the name of that one.
        count: Function that counts the tokens of a text.

    Returns:
        An entry for each pair.
    """
    expanded_of: Sequence[bool | None] = report.expanded or [None] * len(report.pairs)
    return [
        {
            "level": pair.level,
            "document": pair.document,
            "query": pair.query,
            "entities": list(pair.entities),
            "builder": pair.builder,
            "tokens": count(pair.context),
            "sha256": sha256(pair.context),
            "exact": exact,
            "expanded": expanded,
            **({"part_of": whole_of[pair.document]} if pair.document in whole_of else {}),
        }
        for pair, exact, expanded in zip(report.pairs, report.exact, expanded_of, strict=True)
    ]


def as_not_exact(entries: Sequence[Entry]) -> list[Entry]:
    """Copies of entries whose contexts may no longer be known: marked as not exact.

    Args:
        entries: The entries.
    """
    return [{**e, "exact": False, **({"expanded": False} if e.get("expanded") else {})} for e in entries]


def unchanged_pairs(entries: Sequence[Entry], contexts: Sequence[str]) -> list[Pair]:
    """Pairs for those entries whose context was recalled without a change.

    Args:
        entries: Entries for what was remembered.
        contexts: Recalled contexts, one for each entry.
    """
    return [
        Pair(
            level=entry["level"],
            document=entry["document"],
            query=entry["query"],
            context=context,
            entities=tuple(entry["entities"]),
            builder=entry["builder"],
        )
        for entry, context in zip(entries, contexts, strict=True)
        if sha256(context) == entry["sha256"]
    ]


def sha256(text: str) -> str:
    """Digest of a context, as the entries have it, in hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
