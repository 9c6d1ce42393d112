"""Memories of models whose layers differ: in sizes of keys, in whose keys they read, in what each token gives them."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r3mem_fast import MomentumCoupling, R3MemConfig, R3MemModel, check_inverse, generation, make_reversible
from r3mem_fast.generation import is_prefix
from r3mem_fast.integrations.compat import inputs_of_layers
from r3mem_fast.memory.sizes import LayerSizes, stacked
from r3mem_fast.serving import Scheduler
from tests.memory.test_latent import LATENT
from tests.memory.test_matched import check_that_nothing_is_lost, ids_of, network
from tests.reversible.tiny import LAYERED, assert_gradients_as_stored, build, token_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*no exact branch is known:UserWarning")
SHARED = (0, 2)


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("family", LAYERED)
def test_gradients_reach_layers_whose_keys_others_read(family, shared):
    model = make_reversible(build(family, scale=2.0, num_kv_shared_layers=shared), MomentumCoupling(fraction_bits=20))
    assert check_inverse(model, token_ids()).exact
    assert_gradients_as_stored(model, token_ids(), tolerance=1e-5)
    below = model.model.layers[1].self_attn.k_proj.weight
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    with_others = below.grad.clone()
    assert with_others.norm() > 0


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("family", LAYERED)
def test_where_nothing_is_left_out_nothing_is_lost(family, shared, implementation):
    """A matched memory with a slot for every token is the context."""
    check_that_nothing_is_lost(family, implementation, of_base={"num_kv_shared_layers": shared})


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("family", LAYERED)
def test_a_window_hides_of_a_memory_what_it_would_hide_of_the_context(family, shared):
    check_that_nothing_is_lost(family, "eager", of_base={"num_kv_shared_layers": shared, "sliding_window": 8})


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("family", LAYERED)
def test_what_is_written_behind_a_memory_is_what_its_logits_say(family, shared):
    model = network(family, of_base={"num_kv_shared_layers": shared})
    memory, text = model.compress(ids_of(70)), ids_of(4, seed=1)
    assert memory.states.shape[0] == 4 - shared
    written = model.generate(text, memory=memory, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        said = model(written[:, :-1], memory=memory).logits[:, text.shape[1] - 1 :].argmax(-1)
    assert torch.equal(said[:, : written.shape[1] - 4], written[:, 4:])


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("family", LAYERED)
def test_a_learned_memory_is_what_its_tokens_would_have_left(family, shared):
    """A text behind it is read as in one pass over segment, memory tokens and text that does not see the segment."""
    torch.manual_seed(0)
    settings = {"num_memory_tokens": 3, "segment_length": 8, "core": (1, 3), "fraction_bits": 20}
    model = R3MemModel(build(family, scale=2.0, num_kv_shared_layers=shared), R3MemConfig(**settings)).eval()
    ids, text = ids_of(8), ids_of(5, seed=1)
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    mask[11:, :8] = False
    with torch.no_grad():
        memory = model.compress(ids)
        read = model(text, memory=memory).logits
        tokens = model.memory_embeddings[None].to(model.dtype)
        whole = torch.cat([model.reader.embeddings_of(ids), tokens, model.reader.embeddings_of(text)], 1)
        padding = torch.full((1, 3), model.config.pad_token_id)
        given = inputs_of_layers(model.decoder, torch.cat([ids, padding, text], 1), whole)
        masks = dict.fromkeys(["full_attention", "sliding_attention"], mask[None, None])
        positions = model.layout.first_position + torch.arange(16)[None]
        output = model.peft_model(inputs_embeds=whole, attention_mask=masks, position_ids=positions, **given)
    assert (read - output.logits[:, 11:]).abs().max() <= 1e-3 * read.abs().max()
    assert len(model.expand(memory, max_new_tokens=3)) == 1


@pytest.mark.parametrize("family", LAYERED)
def test_queries_of_layers_that_read_a_layer_s_keys_are_asked_of_it(family):
    """Only they change what the layer keeps, if its own queries are the same."""

    def memory(reading):
        model = network(family)
        with torch.no_grad():
            model.decoder.layers[3].self_attn.q_proj.weight.mul_(reading)
        return model.compress(ids_of(16), finish=True)  # one segment

    one, other = memory(1.0), memory(-1.0)
    assert torch.equal(one.ages[0], other.ages[0]) and torch.equal(one.states[0], other.states[0])
    assert not torch.equal(one.states[1], other.states[1])


@pytest.mark.parametrize("family", LAYERED)
def test_shared_keys_without_a_window(family):
    """Caches of transformers, many requests and this package's attention read them as the layers' own hooks do."""
    model = network(family, of_base={"layer_types": ["full_attention"] * 4}, core=(1, 2))
    assert model.reader.key_sources() == (0, 1, 1, 1) and model.reader.keyed_layers() == (0, 1)
    memory, text = model.compress(ids_of(50), finish=True), ids_of(7, seed=1)
    chosen = {"memory": memory, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    chosen |= {"return_dict_in_generate": True, "output_logits": True}
    assert is_prefix(model, memory)
    with mock.patch.object(generation, "is_prefix", lambda *_: False):
        expected = model.generate(text, **chosen)
    found = [model.generate(text, **chosen), model.generate(text, cache_implementation="static", **chosen)]
    scheduler = Scheduler(model)
    requests = [scheduler.submit(ids, memory, max_new_tokens=5) for ids in (text[0, :2], text[0])]
    scheduler.run()
    assert requests[1].tokens == expected.sequences[0, 7:].tolist() and len(requests[0].tokens) == 5
    model.plain_model.set_attn_implementation("r3mem")
    found.append(model.generate(text, **chosen))
    for output in found:
        for mine, its in zip(output.logits, expected.logits, strict=True):
            assert (mine - its).abs().max() < 1e-4 * its.abs().max()
    with torch.no_grad(), model.unconverted():
        last = model.plain_model(text, logits_to_keep=2).logits
        assert (last - model.plain_model(text).logits[:, -2:]).abs().max() < 1e-4 * last.abs().max()


@pytest.mark.parametrize("family", [*LAYERED, *LATENT])
def test_a_memory_before_the_first_layer(family):
    """Its tokens are read in front of a text, in every layer of whatever size."""
    shared = {"num_kv_shared_layers": 0} if family in LAYERED else {}
    settings = {"num_memory_tokens": 3, "segment_length": 8, "core": (1, 3), "fraction_bits": 20}
    model = R3MemModel(build(family, scale=2.0, **shared), R3MemConfig(memory_placement="input", **settings)).eval()
    text = ids_of(5, seed=1)
    with torch.no_grad():
        memory = model.compress(ids_of(8))
        read = model(text, memory=memory).logits
        whole = torch.cat([memory.states, model.reader.embeddings_of(text)], 1)
        padding = torch.full((1, 3), model.config.pad_token_id)
        given = inputs_of_layers(model.decoder, torch.cat([padding, text], 1), whole)
        expected = model.peft_model(inputs_embeds=whole, **given).logits[:, 3:]
    assert (read - expected).abs().max() <= 1e-3 * read.abs().max()
    assert len(model.expand(memory, max_new_tokens=3)) == 1


def test_layers_without_keys_between_others():
    """A cache counts them, and another engine would take the keys of the next layer for theirs."""
    model = network("llama")
    memory = model.compress(ids_of(20), finish=True)
    with mock.patch.object(model.reader, "_keyed", (0, 1, 3)):
        assert not is_prefix(model, memory)
        with pytest.raises(ValueError, match=r"layers \[0, 1, 3\]"):
            memory.to_prefix(model)


@pytest.mark.parametrize("family", LAYERED)
def test_a_core_in_which_keys_would_be_read_before_they_are_written(family):
    with pytest.raises(ValueError, match=r"layer 3 reads the keys and values of layer 1.*core=\(1, 2\), or begins"):
        R3MemModel(build(family), R3MemConfig(core=(1, 4)))
    sources = [*range(20), *[18] * 4, 19, *[18] * 5]  # as in Gemma 3n E2B
    assert R3MemConfig().resolved(30, sources).core == (20, 26)
    assert R3MemConfig().resolved(30).core == (16, 26)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4))
def test_padded_states_are_those_of_each_layer(shapes):
    sizes = [LayerSizes(*shape) for shape in shapes]
    keys = [torch.randn(2, size.heads, 3, size.key_width) for size in sizes]
    values = [torch.randn(2, size.heads, 3, size.value_width) for size in sizes]
    for states, part in ((keys, LayerSizes.key), (values, LayerSizes.value)):
        together = stacked(states, sizes)
        for layer, (size, own) in enumerate(zip(sizes, states, strict=True)):
            assert torch.equal(part(size, together[layer]), own)
            assert together[layer].count_nonzero() == own.count_nonzero()
