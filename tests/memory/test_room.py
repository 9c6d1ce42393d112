"""Memory and tokens in one place give what a cache gives that joins them anew for each token."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from r3mem_fast.memory.room import Room

CHANGES = ("crop", "select", "none")


def some(count, seed, rows):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, 2, count, width, generator=generator) for width in (3, 5))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.lists(st.tuples(st.integers(1, 90), st.sampled_from(CHANGES)), min_size=1, max_size=5))
def test_as_joined_anew(slots, steps):
    mine, its, room, rows = DynamicLayer(), DynamicLayer(), Room(), 3
    placed = some(slots, 0, rows) if slots else ()
    for number, (count, change) in enumerate(steps, start=1):
        new = some(count, number, rows)
        states = its.update(*new)
        expected = [torch.cat(pair, 2) for pair in zip(placed, states, strict=True)] if slots else states
        found = room.extended(mine, placed, new)
        assert all(map(torch.equal, found, expected))
        assert torch.equal(mine.keys, its.keys) and torch.equal(mine.values, its.values)
        for layer in (mine, its):
            if change == "crop" and layer.get_seq_length() > 1:
                layer.crop(-1)
            elif change == "select":
                layer.batch_select_indices(torch.tensor([1, 0, 1]))
        if change == "select":
            placed = tuple(part[[1, 0, 1]] for part in placed)


def test_a_token_copies_no_other():
    layer, room = DynamicLayer(), Room()
    placed = some(4, 0, 1)
    first = room.extended(layer, placed, some(3, 1, 1))
    second = room.extended(layer, placed, some(1, 2, 1))
    assert first[0].untyped_storage().data_ptr() == second[0].untyped_storage().data_ptr()
