"""Cuts a batch of token ids into the segments that are read one after the other (R3Mem, section 3)."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .memory import Memory

IGNORED = -100


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """Tokens that are read in one pass, from some of the B rows of a batch. All tensors are on the CPU.

    A memory may carry tokens that come before a row's new ones: recent ones, which are read again, and unfinished
    ones. Both are read with the row.

    Attributes:
        rows: Indices of the rows that have tokens in this segment, A of them.
        ids: Token ids, int64 `[A, n]`, padded on the left.
        mask: 1 for a token, 0 for padding, int64 `[A, n]`.
        targets: Token that follows each token, int64 `[A, n]`; -100 where it does not count.
        own: Range `(start, end)` of each row's new tokens that this segment is the first to have. Position 0 is the
            row's first token that the memory does not carry.
        places: Position of each token, int64 `[A, n]`. Position 0 is the first token that the memory carries.
        writes: Whether a memory is written after it.
        ends: Whether it is the last one of each row's text, A of them.
        num_segments: Segments of the memory before it, int64 `[B]`.
    """

    rows: tuple[int, ...]
    ids: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    own: tuple[tuple[int, int], ...]
    places: torch.Tensor
    writes: bool
    ends: tuple[bool, ...]
    num_segments: torch.Tensor

    @property
    def new_tokens(self) -> int:
        """Number of tokens, of all rows, that this segment is the first to have."""
        return sum(end - start for start, end in self.own)


def cut_segments(
    memory: Memory, rows: Sequence[torch.Tensor], labels: Sequence[torch.Tensor] | None = None, *, finish: bool,
    writes_all: bool, length: int | None = None, follows: bool = False,
) -> list[Segment]:  # fmt: skip
    """Cut rows that follow a memory into segments, with the tokens that the memory carries before them.

    The memory carries the tokens of a segment that was not read yet, and the last ones before them, which are read
    again. They are in front of each row here, and count in no loss. Rows of fewer segments than others are missing
    from the last ones, and the rows of one segment are padded on the left to the longest.

    Args:
        memory: The memory that the rows follow; it has as many rows.
        rows: Token ids of each row, int64 `[n]`, on the CPU.
        labels: Labels of each row, as long as its ids, -100 where one does not count; None: the ids.
        finish: Whether the rows' texts have ended: tokens that do not fill a segment make a last, shorter one. If not,
            they are in no segment, nor are those of a full one that waits, and `advance` has the memory carry them.
        writes_all: Whether a memory is written after every segment; if not, only where more of some row follows.
        length: Tokens of a segment; None: the layout's `segment_length`.
        follows: Whether more of the rows is known to follow, so that no full segment waits (`MemoryLayout.waits`).

    Returns:
        The segments, in the order in which they are read.
    """
    layout = memory.layout
    length, overlap = length or layout.segment_length, layout.segment_overlap
    wholes, targets, starts = [], [], []
    for row, (recent, unfinished, ids) in enumerate(zip(memory.recent, memory.unfinished, rows, strict=True)):
        whole = torch.cat([recent, unfinished, ids])
        wanted = torch.full((len(whole) + 1,), IGNORED, dtype=torch.int64)
        wanted[len(whole) - len(ids) : len(whole)] = ids if labels is None else labels[row]
        wholes.append(whole)
        targets.append(wanted[1:])
        starts.append(len(recent))
    least = 1 if finish else length + (layout.waits and not follows)
    segments: list[Segment] = []
    index = 0
    while True:
        reach = [start + index * length for start in starts]
        left = [len(whole) - start for whole, start in zip(wholes, reach, strict=True)]
        active = [row for row, rest in enumerate(left) if rest >= least]
        if not active:
            return segments
        spans = [(max(0, reach[row] - overlap), min(len(wholes[row]), reach[row] + length)) for row in active]
        width = max(end - start for start, end in spans)
        ids, mask, places = torch.zeros(3, len(active), width, dtype=torch.int64)
        following = torch.full_like(ids, IGNORED)
        own = []
        for place, (row, (start, end)) in enumerate(zip(active, spans, strict=True)):
            here = slice(width - (end - start), width)
            ids[place, here], mask[place, here] = wholes[row][start:end], 1
            places[place, here] = torch.arange(start, end)
            following[place, here] = targets[row][start:end]
            # The last carried token predicts the row's first one, so it counts in the first segment. In later ones
            # the overlap has been counted before.
            if index:
                following[place, : here.start + reach[row] - start] = IGNORED
            carried = starts[row] + len(memory.unfinished[row])
            own.append((max(0, reach[row] - carried), max(0, end - carried)))
        segments.append(
            Segment(
                tuple(active),
                ids,
                mask,
                following,
                tuple(own),
                places,
                writes_all or any(left[row] > length for row in active),
                tuple(finish and left[row] <= length for row in active),
                memory.num_segments + index,
            )
        )
        index += 1


def without_padding(segment: Segment, *, each_row: bool = False) -> Iterator[tuple[list[int], Segment]]:
    """Cut a segment into segments without padding, which recurrent layers would take for tokens.

    Args:
        segment: The segment, padded on the left.
        each_row: Whether each row makes a segment of its own.

    Yields:
        Places of rows in the segment, all of one length, and a segment of these.
    """
    lengths = segment.mask.sum(1).tolist()
    alike: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        alike.setdefault(place if each_row else length, []).append(place)
    for places in alike.values():
        last = slice(segment.ids.shape[1] - lengths[places[0]], None)
        yield (
            places,
            dataclasses.replace(
                segment,
                rows=tuple(segment.rows[place] for place in places),
                ids=segment.ids[places, last],
                mask=segment.mask[places, last],
                targets=segment.targets[places, last],
                own=tuple(segment.own[place] for place in places),
                ends=tuple(segment.ends[place] for place in places),
                places=segment.places[places, last],
            ),
        )


def advance(memory: Memory, rows: Sequence[torch.Tensor], segments: Sequence[Segment]) -> dict[str, Any]:
    """New values of a memory's fields, all but its states, for when segments have been read.

    Args:
        memory: The memory before the segments.
        rows: Token ids of each row, int64 `[n]`, on the CPU.
        segments: The segments, made by `cut_segments` with `writes_all=True`.

    Returns:
        `num_segments`, `tokens_seen`, `unfinished` and `recent`, as in `Memory`.
    """
    layout, written = memory.layout, torch.zeros(len(rows), dtype=torch.int64)
    for segment in segments:
        written[list(segment.rows)] += 1
    recent, unfinished = [], []
    for count, *parts in zip(written.tolist(), memory.recent, memory.unfinished, rows, strict=True):
        whole = torch.cat(parts)
        end = min(len(whole), len(parts[0]) + count * layout.segment_length)
        # Copies: a piece of a long text would keep all of it.
        recent.append(whole[max(0, end - layout.segment_overlap) : end].clone())
        unfinished.append(whole[end:].clone())
    seen = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    return {
        "num_segments": memory.num_segments + written,
        "tokens_seen": memory.tokens_seen + seen,
        "unfinished": tuple(unfinished),
        "recent": tuple(recent),
    }
