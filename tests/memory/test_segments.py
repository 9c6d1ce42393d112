"""Cutting rows into segments: every token is read, and every target counted, exactly once, whatever was carried."""

import dataclasses

import torch
from hypothesis import given
from hypothesis import strategies as st

from r3mem_fast.memory.layout import MemoryLayout, Origin
from r3mem_fast.memory.memory import Memory
from r3mem_fast.memory.segments import IGNORED, advance, cut_segments

LAYOUTS = st.builds(
    lambda length, overlap: MemoryLayout(2, length, 3, False, "input", overlap), st.integers(1, 6), st.integers(0, 8)
)
LENGTHS = st.lists(st.integers(0, 20), min_size=1, max_size=4)


def nothing(layout, rows):
    empty = (torch.zeros(0, dtype=torch.int64),) * rows
    counts = torch.zeros(rows, dtype=torch.int64)
    return Memory(
        torch.zeros(rows, 0, 4), counts, counts, empty, empty, (None,) * rows, layout, Origin("base", "adapter")
    )


def tokens(lengths, start=0):
    """Rows of ids that tell row and place: 100 * row + place."""
    return [100 * row + torch.arange(start, start + n) for row, n in enumerate(lengths)]


def carried(memory, rows, finish=False):
    return dataclasses.replace(
        memory, **advance(memory, rows, cut_segments(memory, rows, finish=finish, writes_all=True))
    )


@given(layout=LAYOUTS, before=LENGTHS, more=st.data())
def test_every_token_once(layout, before, more):
    """Behind a memory of some tokens, compressed or waiting: own tokens, their overlap, and targets."""
    lengths = [more.draw(st.integers(0, 20)) for _ in before]
    memory = carried(nothing(layout, len(before)), tokens(before))
    rows = [100 * row + torch.arange(n, n + m) for row, (n, m) in enumerate(zip(before, lengths, strict=True))]
    segments = cut_segments(memory, rows, finish=True, writes_all=False)
    for row in range(len(before)):
        mine = [(s, s.rows.index(row)) for s in segments if row in s.rows]
        own, targets = [], []
        for index, (segment, place) in enumerate(mine):
            ids = segment.ids[place][segment.mask[place].bool()]
            start, end = segment.own[place]
            own += rows[row][start:end].tolist()
            # A segment is a piece of the text as it stands, with at most the overlap from before it.
            assert torch.equal(ids, torch.arange(int(ids[0]), int(ids[0]) + len(ids)))
            assert len(ids) <= layout.segment_overlap + layout.segment_length
            wanted = segment.targets[place][segment.mask[place].bool()]
            assert ((wanted == ids + 1) | (wanted == IGNORED)).all()
            targets += wanted[wanted != IGNORED].tolist()
            assert (segment.targets[place][~segment.mask[place].bool()] == IGNORED).all()
            assert segment.num_segments[row] == memory.num_segments[row] + index
            assert segment.writes or index == len(mine) - 1
        assert own == rows[row].tolist()
        # The first of all has nothing that it could be predicted from.
        expected = rows[row].tolist()
        has_before = len(memory.recent[row]) + len(memory.unfinished[row]) > 0
        assert targets == (expected if has_before else expected[1:])


@given(layout=LAYOUTS, lengths=LENGTHS, pieces=st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_in_pieces_as_in_one(layout, lengths, pieces):
    """What a memory carries does not depend on the pieces that a text came in, and is the end of it."""
    whole = carried(nothing(layout, len(lengths)), tokens([sum(pieces)] * len(lengths)))
    memory, read = nothing(layout, len(lengths)), 0
    for piece in pieces:
        memory = carried(memory, tokens([piece] * len(lengths), start=read))
        read += piece
    for name in ("recent", "unfinished"):
        assert [row.tolist() for row in getattr(memory, name)] == [row.tolist() for row in getattr(whole, name)]
    assert torch.equal(memory.num_segments, whole.num_segments)
    assert memory.num_segments.tolist() == [read // layout.segment_length] * len(lengths)
    for row in range(len(lengths)):
        end = read // layout.segment_length * layout.segment_length
        assert memory.unfinished[row].tolist() == list(range(100 * row + end, 100 * row + read))
        assert memory.recent[row].tolist() == list(
            range(100 * row + max(0, end - layout.segment_overlap), 100 * row + end)
        )


@given(layout=LAYOUTS, lengths=LENGTHS)
def test_finished(layout, lengths):
    """Nothing waits, and to finish again does nothing."""
    memory = carried(nothing(layout, len(lengths)), tokens(lengths), finish=True)
    assert not any(len(row) for row in memory.unfinished)
    assert memory.tokens_seen.tolist() == lengths
    again = [torch.zeros(0, dtype=torch.int64)] * len(lengths)
    assert cut_segments(memory, again, finish=True, writes_all=True) == []
