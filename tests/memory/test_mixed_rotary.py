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


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_long_wavelengths_in_bfloat16_are_a_rotation(family):
    """Keys whose weight lies in wavelengths of thousands of positions hardly turn in the few that are tried: by less
    than bfloat16's tolerance. They are rotated all the same, and a memory of all tokens is the context."""
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e10}}
    if family == "gemma3_text":
        changes = {
            "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), changes["rope_parameters"])
        }
    base = build(family, scale=2.0, dtype=torch.bfloat16, **changes).eval()
    with torch.no_grad():
        for layer in base.model.layers:
            attention = layer.self_attn
            weight = attention.k_norm.weight if family == "gemma3_text" else attention.k_proj.weight
            for shortest in (0, 4):  # the two elements of each head that turn by one radian a position
                weight[shortest::8] = weight[shortest::8] * 0.05 if family == "llama" else -0.95
    config = R3MemConfig(memory_writer="matched", num_memory_tokens=16, memory_budget=16, segment_length=16)
    model = R3MemModel(base, config).eval()
    changed = [model.reader._keys_at(position).captured_keys().float() for position in (0, 37)]
    assert (changed[1] - changed[0]).norm() < model.reader._tolerance() * changed[0].norm()  # what misled
    assert not model.reader.still_layers()
    ids, text = ids_of(16), ids_of(8, seed=1)
    with torch.no_grad(), model.disable_adapters():
        behind = model(text, memory=model.compress(ids, finish=True)).logits
        whole = model.plain_model(torch.cat([ids, text], 1)).logits[:, 16:]
    assert (behind - whole).abs().max() <= 0.05 * whole.abs().max()
