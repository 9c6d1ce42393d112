"""`memory.states`: tensors of keys and values are taken apart and put together as they are."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from r3mem_fast.memory.states import states_at


@given(sizes=st.tuples(*[st.integers(1, 3)] * 3), slots=st.integers(1, 6), taken=st.integers(0, 8), data=st.data())
def test_states_at_places_of_each_head_are_what_gather_takes(sizes, slots, taken, data):
    """Also of states that are no block of memory, and of no place; gradients of a place that is taken twice add up."""
    layers, rows, heads = sizes
    states = torch.arange(layers * 2 * rows * heads * slots * 4.0).view(layers, 2, rows, slots, heads, 4)
    states = states.transpose(3, 4).requires_grad_()
    seed = data.draw(st.integers(0, 99))
    places = torch.randint(slots, (layers, rows, heads, taken), generator=torch.Generator().manual_seed(seed))
    found = states_at(states, places)
    expected = states.gather(4, places[:, None, ..., None].expand(-1, 2, -1, -1, -1, 4))
    assert torch.equal(found, expected) and found.is_contiguous()
    weights = torch.rand(found.shape, generator=torch.Generator().manual_seed(seed))
    mine, its = (torch.autograd.grad((some * weights).sum(), states)[0] for some in (found, expected))
    torch.testing.assert_close(mine, its)
