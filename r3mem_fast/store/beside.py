"""Puts memories of several texts side by side, so that one pass reads all of them."""

import dataclasses
from collections.abc import Sequence

import torch

from ..fingerprints import layout_fingerprint
from ..memory.layout import MemoryLayout
from ..memory.memory import Memory
from ..memory.slots import Slots, replaced, slots_of
from ..model import R3MemModel


def with_layout(memory: Memory, layout: MemoryLayout) -> Memory:
    """A memory that the base model reads, and that goes on in another size.

    Args:
        memory: The memory: a matched one, or one of an adapter of anchors, which makes memories of any size.
        layout: The layout, of the same reach.
    """
    origin = memory.origin
    if origin.adapter == layout_fingerprint(memory.layout):
        origin = dataclasses.replace(origin, adapter=layout_fingerprint(layout))
    return dataclasses.replace(memory, layout=layout, origin=origin)


def pinned_memory(model: R3MemModel, ids: Sequence[int]) -> Memory:
    """The memory of tokens that stay as they are, and that nothing stands before; of one row.

    Args:
        model: The model.
        ids: Token ids; without any it is the memory of nothing.

    Raises:
        ValueError: The model makes no memories, or none with so many pinned tokens.
    """
    empty = model.empty_memory(pinned=len(ids))
    # With an overlap, the last tokens would be carried as they are, and read after whatever the memory goes on with.
    start = with_layout(empty, dataclasses.replace(empty.layout, segment_overlap=0, queries="own"))
    return model.compress(torch.tensor([list(ids)]), memory=start, finish=True) if ids else start


def side_by_side(memories: Sequence[Memory], *, in_a_row: bool = True) -> Memory:
    """One memory that holds the slots of several, as if their texts stood one behind the other.

    Each text was read alone, so none knows of those before it, as they would in one pass.

    Args:
        memories: Matched memories of one row each, with nothing unfinished, whose texts begin with the same pinned
            tokens. These are taken from the first.
        in_a_row: Whether slots have the places that they would have if the texts were one; if not, each text ends
            right before what follows the memory.

    Returns:
        A memory of one row, whose budget is the number of its slots.

    Raises:
        ValueError: There is no memory, one has another number of rows or tokens that it carries as they are, a
            recurrent state, or other pinned tokens.
    """
    if not memories:
        raise ValueError("there is no memory to put side by side")
    first = memories[0]
    for memory in memories:
        if len(memory) != 1 or memory.slots is None or memory.carried is not None:
            raise ValueError("side by side stand matched memories of one row each, without states of recurrent layers")
        if len(memory.unfinished[0]) or len(memory.recent[0]):
            raise ValueError(
                "a memory carries tokens that are not compressed; compress with finish=True and no overlap"
            )
        if int(memory.pinned_slots()[0]) != int(first.pinned_slots()[0]):
            raise ValueError("the memories' texts begin with other pinned tokens")
    pinned = int(first.pinned_slots()[0])
    lengths = [int(memory.tokens_seen[0]) - pinned for memory in memories]
    together: Slots | None = None
    for index, memory in enumerate(memories):
        moved = sum(lengths[index + 1 :]) if in_a_row else 0
        some = slots_of(memory, torch.tensor([moved]))
        if together is None:
            together = some
        else:
            places = torch.nonzero(some.exists[0])[pinned:, 0]
            some = some.kept(places[None])._replace(pinned=torch.zeros_like(some.pinned))
            together = together.followed_by(some)
    assert together is not None, "see above"
    adaptive, count = first.layout.is_adaptive, int(together.counts[0])
    joined = replaced(first, [0], [([0], together.packed() if adaptive else together.within(count))])
    budget = max(1, int(together.filled()[0]) if adaptive else count - pinned)
    layout = dataclasses.replace(
        first.layout, budget=budget, readable_segments=max(1, budget // first.layout.num_memory_tokens)
    )
    joined = dataclasses.replace(
        joined,
        num_segments=torch.stack([memory.num_segments for memory in memories]).sum(0),
        tokens_seen=torch.tensor([pinned + sum(lengths)]),
        labels=(None,),
    )
    return with_layout(joined, layout)
