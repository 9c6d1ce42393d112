"""A batch of token rows, cut into the segments that are read one after the other (R3Mem, section 3)."""

import dataclasses
from collections.abc import Sequence

import torch

from .memory import Memory

IGNORED = -100


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """What is read in one pass: a piece of some rows of a batch. All tensors are on the CPU.

    rows: of the batch, those that it is a piece of, A of them. ids, mask, targets: int64 `[A, n]`, padded on the left;
    a target is what follows its token, -100 where that does not count. own: of each row `(start, end)`, its tokens
    that no segment before had, counted from the first after those that the memory carries. places: int64 `[A, n]`, of
    its tokens, counted from the first that the memory carries. writes: whether a memory is written after it.
    num_segments: int64 `[B]`, of the memory before it.
    """

    rows: tuple[int, ...]
    ids: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    own: tuple[tuple[int, int], ...]
    places: torch.Tensor
    writes: bool
    num_segments: torch.Tensor


def cut_segments(
    memory: Memory, rows: Sequence[torch.Tensor], labels: Sequence[torch.Tensor] | None = None, *, finish: bool,
    writes_all: bool, length: int | None = None,
) -> list[Segment]:  # fmt: skip
    """The segments of rows of token ids that follow a memory, with what it carries before them.

    rows: int64 `[n]` each, on the CPU. labels: of the same lengths, -100 where one does not count; None: the ids.
    finish: whether what does not fill a segment is one too, a shorter one. writes_all: whether a memory is written
    after each; else only where more of some row follows. length: of a segment, if not the layout's.
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
    segments, index = [], 0
    while True:
        reach = [start + index * length for start in starts]
        left = [len(whole) - start for whole, start in zip(wholes, reach, strict=True)]
        active = [row for row, rest in enumerate(left) if rest >= (1 if finish else length)]
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
            # What the memory carries is followed by the first of the row; later repetitions have been counted.
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
                memory.num_segments + index,
            )
        )
        index += 1


def advance(memory: Memory, rows: Sequence[torch.Tensor], segments: Sequence[Segment]) -> dict:
    """What a memory carries after segments of `cut_segments` with `writes_all`: all its fields but the states."""
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
