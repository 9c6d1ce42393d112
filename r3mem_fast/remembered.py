"""What an adapter remembers, as its `r3mem.json` has it: queries and digests of contexts, no text."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .hierarchy import Pair
from .training.remember import RememberReport

Entry = dict[str, Any]


def entries_of(report: RememberReport, whole_of: Mapping[str, str], count: Callable[[str], int]) -> list[Entry]:
    """Entries for what a run has learned.

    Args:
        report: The run's.
        whole_of: By the name of a document that is part of another, the name of that.
        count: Counts a text's tokens.
    """
    return [
        {
            "level": pair.level,
            "document": pair.document,
            "query": pair.query,
            "entities": list(pair.entities),
            "builder": pair.builder,
            "tokens": count(pair.context),
            "sha256": _sha256(pair.context),
            "exact": exact,
            "expanded": expanded,
            **({"part_of": whole_of[pair.document]} if pair.document in whole_of else {}),
        }
        for pair, exact, expanded in zip(
            report.pairs, report.exact, report.expanded or [None] * len(report.pairs), strict=True
        )
    ]


def as_not_exact(entries: Sequence[Entry]) -> list[Entry]:
    """The same entries, of contexts that may be known no more."""
    return [{**e, "exact": False, **({"expanded": False} if e.get("expanded") else {})} for e in entries]


def unchanged_pairs(entries: Sequence[Entry], contexts: Sequence[str]) -> list[Pair]:
    """Pairs of the entries whose context, as it was recalled, is still what it was.

    Args:
        entries: What was remembered.
        contexts: What was recalled, one for each.
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
        if _sha256(context) == entry["sha256"]
    ]


def _sha256(text):
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
