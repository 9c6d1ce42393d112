"""Memories of models that rotate a part of each key, or the keys of some layers alone."""

import pytest
import torch

from r3mem_fast import R3MemConfig, R3MemModel
from tests.memory.test_matched import check_that_nothing_is_lost, ids_of, network
from tests.reversible.tiny import MIXED_ROTARY, build

pytestmark = pytest.mark.filterwarnings("ignore:.*no exact branch is known:UserWarning")
STILL = {"smollm3": [1, 3], "cohere2": [3], "exaone4": [3]}


@pytest.mark.parametrize("family", MIXED_ROTARY)
def test_layers_that_do_not_rotate_are_found(family):
    model = network(family)
    assert sorted(model.reader.still_layers()) == STILL.get(family, [])


@pytest.mark.parametrize("family", MIXED_ROTARY)
def test_where_nothing_is_left_out_nothing_is_lost(family):
    """A matched memory with a slot for every token is the context."""
    check_that_nothing_is_lost(family, "sdpa")


@pytest.mark.parametrize("family", MIXED_ROTARY)
def test_a_learned_memory_is_what_its_tokens_would_have_left(family):
    """A text behind it is read as in one pass over segment, memory tokens and text that does not see the segment."""
    torch.manual_seed(0)
    settings = {"num_memory_tokens": 3, "segment_length": 8, "core": (1, 3), "fraction_bits": 20}
    model = R3MemModel(build(family, scale=2.0), R3MemConfig(**settings)).eval()
    ids, text = ids_of(8), ids_of(5, seed=1)
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    mask[11:, :8] = False
    with torch.no_grad():
        read = model(text, memory=model.compress(ids)).logits
        embedded = model.peft_model.get_input_embeddings()
        tokens = model.memory_embeddings[None].to(model.dtype)
        whole = torch.cat([embedded(ids), tokens, embedded(text)], 1)
        positions = model.layout.first_position + torch.arange(16)[None]
        output = model.peft_model(inputs_embeds=whole, attention_mask=mask[None, None], position_ids=positions)
    assert (read - output.logits[:, 11:]).abs().max() <= 1e-3 * read.abs().max()


@pytest.mark.parametrize("family", MIXED_ROTARY)
def test_what_is_written_behind_a_memory_is_what_its_logits_say(family):
    model = network(family)
    memory, text = model.compress(ids_of(70)), ids_of(4, seed=1)
    written = model.generate(text, memory=memory, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        said = model(written[:, :-1], memory=memory).logits[:, text.shape[1] - 1 :].argmax(-1)
    assert torch.equal(said[:, : written.shape[1] - 4], written[:, 4:])
