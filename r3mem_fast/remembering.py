"""Remembers documents: makes pairs of them, and learns these along with what was remembered before."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from .codec import TextCodec
from .documents import cut_to_length
from .hierarchy import Pair, build_pairs
from .model import R3MemModel
from .remembered import Entry, as_not_exact, entries_of, unchanged_pairs
from .training.remember import MAX_QUERY_OF_CONTEXT, RememberReport, RememberSettings, remember

# Number of queries that are asked at one time.
_BATCH = 16


def remember_documents(
    model: R3MemModel,
    codec: TextCodec,
    documents: dict[str, str],
    entries: Sequence[Entry],
    recall: Callable[[list[str]], list[str]],
    *,
    folder: Path | None,
    settings: RememberSettings | None,
    progress: bool,
    taken: Collection[str] = (),
    **hierarchy: Any,
) -> tuple[RememberReport, list[Entry]]:
    """Fine-tune documents into an adapter, along with what it remembers already.

    Args:
        model: The memory network.
        codec: Codec with its tokenizer.
        documents: Texts by name. One that is too long is cut into several.
        entries: Entries for what the adapter remembers. Those of a document with the same name are replaced.
        recall: Function that recalls the contexts of queries. Before training it is asked for what the adapter
            remembers, of which no text is kept, so that this can be learned again.
        folder: Folder in which a checkpoint is kept, from which an interrupted run goes on when it is started again;
            None: there is none.
        settings: How pairs are learned; None: the defaults.
        progress: Show bars.
        taken: Queries that ask for something else already, beside those of `entries`.
        hierarchy: More arguments of `hierarchy.build_pairs`.

    Returns:
        A report, and entries for what the adapter remembers now.

    Raises:
        IntegrityError: A pass could not be trusted.
        ValueError: A text cannot be remembered, or the folder holds the checkpoint of another run.
    """
    earlier = [entry for entry in entries if not {entry["document"], entry.get("part_of")} & documents.keys()]
    whole_of = {entry["document"]: entry["part_of"] for entry in earlier if entry.get("part_of")}
    parts, wholes = _cut(model, codec, documents, taken={entry["document"] for entry in earlier})
    whole_of |= wholes
    taken = {*taken, *(entry["query"] for entry in earlier)}
    pairs = build_pairs(parts, codec.tokenizer, taken=taken, progress=progress, **hierarchy)
    rehearsed = rehearsed_pairs(earlier, recall)
    report = remember(model, codec.tokenizer, [*rehearsed, *pairs], settings, folder=folder, progress=progress)
    learned = {pair.query for pair in report.pairs}
    gone = [entry for entry in earlier if entry["query"] not in learned]
    report = dataclasses.replace(report, lost=tuple(entry["query"] for entry in gone if entry["exact"]))
    return report, [*as_not_exact(gone), *entries_of(report, whole_of, codec.count)]


def rehearsed_pairs(entries: Sequence[Entry], recall: Callable[[list[str]], list[str]]) -> list[Pair]:
    """Recall what an adapter remembers, to learn it again.

    Args:
        entries: Entries for what it remembers.
        recall: Function that recalls the contexts of queries. Before training it is asked for what the adapter
            remembers, of which no text is kept, so that this can be learned again.

    Returns:
        Pairs for the contexts that come back without a change.
    """
    # Those, too, that did not come back when they were learned, or may have been forgotten since: their digests tell.
    asked = sorted(entries, key=lambda entry: entry["tokens"])
    contexts: list[str] = []
    for start in range(0, len(asked), _BATCH):
        contexts += recall([entry["query"] for entry in asked[start : start + _BATCH]])
    return unchanged_pairs(asked, contexts)


def _cut(model, codec, documents, taken):
    """Cut documents that are longer than the model's positions; see `cut_to_length` for what is returned."""
    if model.max_tokens is None:
        return documents, {}
    before = model.reader.layout.first_position if model.learns_memories else 0
    most = max(1, int((model.max_tokens - before) / MAX_QUERY_OF_CONTEXT) - 16)
    return cut_to_length(documents, codec.count, most, taken)
