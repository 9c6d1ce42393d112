"""Memories of models with latent attention, whose caches keep what keys and values are made of."""

import pytest
import torch

from r3mem_fast import R3MemConfig, R3MemModel
from tests.memory.test_matched import LENGTH, OVERLAP, SLOTS, ids_of, network
from tests.reversible.tiny import build

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no exact branch is known:UserWarning", "ignore:adapters leave out:UserWarning"
)
LATENT = ("deepseek_v2", "deepseek_v3")


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_learned_memory_of_pairs_side_by_side_or_in_halves(interleaved):
    check_learned("deepseek_v3", rope_interleave=interleaved)


def test_a_learned_memory_of_complex_tables():
    check_learned("deepseek_v2")


def check_learned(family, **changes):
    """A text behind it is read as in one pass over segment, memory tokens and text that does not see the segment."""
    torch.manual_seed(0)
    settings = {"num_memory_tokens": 3, "segment_length": 8, "core": (1, 3), "fraction_bits": 20}
    model = R3MemModel(build(family, scale=2.0, **changes), R3MemConfig(**settings)).eval()
    ids, text = ids_of(8), ids_of(5, seed=1)
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    mask[11:, :8] = False
    with torch.no_grad():
        read = model(text, memory=model.compress(ids)).logits
        embedded, tokens = model.peft_model.get_input_embeddings(), model.memory_embeddings[None].to(model.dtype)
        whole = torch.cat([embedded(ids), tokens, embedded(text)], 1)
        positions = model.layout.first_position + torch.arange(16)[None]
        output = model.peft_model(inputs_embeds=whole, attention_mask=mask[None, None], position_ids=positions)
    assert (read - output.logits[:, 11:]).abs().max() <= 1e-3 * read.abs().max()


@pytest.mark.parametrize("family", LATENT)
def test_slots_that_are_kept_are_those_that_are_asked_for(family):
    """They are what they were, and those that no query sees go first."""
    model = network(family)
    if not model.reader.keeps_latents():
        pytest.skip("this version of transformers keeps keys and values")
    ids = ids_of(LENGTH)
    few, all_of_them = (
        model.compress(ids, finish=True),
        network(family, num_memory_tokens=LENGTH, memory_budget=4 * LENGTH).compress(ids, finish=True),
    )
    assert few.slots.tolist() == [SLOTS] and all_of_them.slots.tolist() == [LENGTH - OVERLAP]
    for layer in range(4):
        for slot in range(SLOTS):
            place = LENGTH - OVERLAP - int(few.ages[layer, 0, 0, slot])
            assert torch.equal(few.states[layer, :, 0, 0, slot], all_of_them.states[layer, :, 0, 0, place])
    assert any(few.ages[layer, 0, 0].tolist() != list(range(SLOTS, 0, -1)) for layer in range(4))


@pytest.mark.parametrize("family", LATENT)
def test_attention_that_would_take_latents_for_keys_is_refused(family):
    model = network(family)
    if not model.reader.keeps_latents():
        pytest.skip("this version of transformers keeps keys and values")
    memory = model.compress(ids_of(40))
    model.plain_model.set_attn_implementation("r3mem")
    with pytest.raises(ValueError, match="cannot read latents"):
        model(ids_of(4), memory=memory)
