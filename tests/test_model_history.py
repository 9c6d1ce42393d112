"""Training through several segments: memory replay, what is kept of them, truncation, and what a teacher adds."""

import contextlib

import pytest
import torch

from r3mem_fast import R3MemConfig
from r3mem_fast.memory import PLACEMENTS
from r3mem_fast.reversible.convert import stack_of
from r3mem_fast.training.collate import padded
from tests.reversible.tiny import EXACT_FAMILIES, GENERIC_FAMILIES, assert_same_gradients, gradients
from tests.test_model_memory import ids_of, left_padded, made

FAMILIES = [*EXACT_FAMILIES, *GENERIC_FAMILIES]
pytestmark = pytest.mark.filterwarnings("ignore:.*no exact branch is known:UserWarning")
LENGTHS = (37, 20, 8, 30)


def rows(lengths=LENGTHS):
    return [ids_of(n, seed)[0].tolist() for seed, n in enumerate(lengths)]


def step(model, ids, mask=None, **inputs):
    """Loss and gradients of a training step, which are then cleared."""
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    loss = model(ids, mask, labels=labels, **inputs).loss
    loss.backward()
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    return loss.item(), found


def stored(model):
    """Full back-propagation through time with stored activations: what replay is compared with."""

    @contextlib.contextmanager
    def context():
        stack = stack_of(model)
        stack.stored = True
        try:
            yield
        finally:
            stack.stored = False

    return context()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_replay_is_full_back_propagation_through_time(family, placement):
    """A ragged batch of up to five segments, padded on either side: loss and gradients of a plain loop that stores."""
    for overlap in (0, 3):
        model = made(family, memory_placement=placement, segment_overlap=overlap).train()
        kept = made(family, memory_placement=placement, segment_overlap=overlap, kept_segments="device").train()
        for ids, mask in (padded(rows()), left_padded(rows())):
            loss, found = step(model, ids, mask)
            with stored(kept):
                expected_loss, expected = step(kept, ids, mask)
            assert loss == expected_loss
            assert any("memory_embeddings" in name for name in found)
            assert_same_gradients(found, expected, 1e-5)
