"""A matched memory as keys and values that transformers' own caches hold, and other engines read."""

import copy
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.configuration_utils import CompileConfig

from r3mem_fast import Memory, R3MemConfig, R3MemModel, generation
from r3mem_fast.memory.prefix import Prefix
from tests.memory.test_matched import ABSOLUTE, LENGTH, ROTARY, ids_of, network
from tests.reversible.tiny import build

TEXT = ids_of(7, seed=1)


def both_ways(model, ids, mask=None, **settings):
    """What `generate` writes behind a cache of transformers, and what it writes by the reversible layers' hooks."""
    found = model.generate(ids, mask, return_dict_in_generate=True, output_scores=True, **settings)
    with mock.patch.object(generation, "is_prefix", lambda *_: False):
        hooked = model.generate(ids, mask, return_dict_in_generate=True, output_scores=True, **settings)
    return found, hooked


def check_alike(found, hooked):
    assert torch.equal(found.sequences, hooked.sequences)
    for mine, its in zip(found.scores, hooked.scores, strict=True):
        finite = its.isfinite()
        assert torch.equal(mine.isfinite(), finite) and torch.allclose(mine[finite], its[finite], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*ROTARY, *ABSOLUTE])
def test_generate_writes_what_it_writes_by_hooks(family, implementation):
    """Ragged memories, left-padded prompts, greedy and beams."""
    model = network(family)
    model.plain_model.set_attn_implementation(implementation)
    memory = Memory.cat([model.compress(ids_of(50), finish=True), model.compress(ids_of(13, seed=3), finish=True)])
    ids, mask = torch.cat([TEXT, TEXT.flip(1)]), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    settings = {"memory": memory, "max_new_tokens": 6, "eos_token_id": None, "do_sample": False}
    check_alike(*both_ways(model, ids, mask, **settings))
    check_alike(*both_ways(model, ids, mask, num_beams=3, num_return_sequences=2, **settings))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=3), st.data())
def test_any_lengths_of_histories_and_prompts(histories, data):
    model = network()
    rows = [model.compress(ids_of(n, seed=n), pinned=data.draw(st.integers(0, 3))) for n in histories]
    lengths = [data.draw(st.integers(1, 9)) for _ in rows]
    ids, mask = ids_of(9, len(rows), seed=2), torch.tensor([[0] * (9 - n) + [1] * n for n in lengths])
    check_alike(*both_ways(model, ids, mask, memory=Memory.cat(rows), max_new_tokens=3, do_sample=False))


def test_frequencies_that_depend_on_the_pass():
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    model = network(of_base={"rope_parameters": yarn, "max_position_embeddings": 512})
    memory = model.compress(ids_of(60))
    check_alike(*both_ways(model, TEXT, memory=memory, max_new_tokens=4, do_sample=False))


def test_drafts_and_sampling():
    model = network()
    memory = model.compress(ids_of(60))
    expected = model.generate(TEXT, memory=memory, max_new_tokens=12, do_sample=False)
    assert torch.equal(
        model.generate(TEXT, memory=memory, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3), expected
    )
    # With columns that are not the row's own, and padding before the prompt.
    wide = Memory.cat([memory, model.compress(ids_of(20, seed=3))])[1]
    padded, mask = torch.cat([TEXT[:, :2], TEXT], 1), torch.tensor([[0, 0] + [1] * 7])
    settings = {"memory": wide, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(padded, mask, **settings)
    for changes in ({"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 3}):
        assert torch.equal(model.generate(padded, mask, **changes, **settings), expected)
    sampled = []
    for _ in range(2):
        torch.manual_seed(0)
        sampled.append(model.generate(TEXT, memory=memory, max_new_tokens=12, do_sample=True, num_return_sequences=3))
    assert torch.equal(*sampled) and sampled[0].shape == (3, 19)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_a_static_cache_and_one_graph(family):
    """Each step is one graph, without a break: what can be captured."""
    model = network(family)
    memory = Memory.cat([model.compress(ids_of(50)), model.compress(ids_of(20, seed=3))])
    ids, mask = torch.cat([TEXT, TEXT.flip(1)]), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    settings = {"memory": memory, "max_new_tokens": 6, "eos_token_id": None, "do_sample": False}
    expected = model.generate(ids, mask, **settings)
    assert torch.equal(model.generate(ids, mask, cache_implementation="static", **settings), expected)
    graphs = []

    def backend(graph, inputs, **options):
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=True, backend=backend)
    config._compile_all_devices = True
    found = model.generate(ids, mask, cache_implementation="static", compile_config=config, **settings)
    assert torch.equal(found, expected) and len(graphs) == 1


def test_the_model_is_as_it_was_afterwards():
    model = network()
    memory = model.compress(ids_of(60))
    before = model(TEXT, memory=memory).logits
    with (
        mock.patch.object(model.plain_model, "generate", side_effect=RuntimeError("stop")),
        pytest.raises(RuntimeError),
    ):
        model.generate(TEXT, memory=memory)
    assert torch.equal(model(TEXT, memory=memory).logits, before)
    assert all(hasattr(type(layer), "unreversed") for layer in model.layers)
    seen = []
    handle = model.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    model(TEXT, memory=memory)
    model.generate(TEXT, memory=memory, max_new_tokens=1)
    model(TEXT, memory=memory)
    handle.remove()
    read = [positions for positions in seen if positions is not None]
    assert int(read[0][0, 0]) == int(read[-1][0, 0]) == model.layout.first_position  # called in the order as before


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "olmo2", "gptj"])
def test_a_model_of_transformers_reads_it(family):
    """From the position that its slots end at, with no offset, by a model that never saw this package."""
    model = network(family)
    memory = Memory.cat([model.compress(ids_of(50), finish=True), model.compress(ids_of(40, seed=3), finish=True)])
    plain = build(family, scale=2.0).eval()
    prefix = memory.to_prefix(model)
    assert prefix.first_position == len(prefix) == 12 and prefix.base == memory.origin.base
    ids = torch.cat([TEXT, TEXT.flip(1)])
    expected = model(ids, memory=memory).logits
    assert [len(tail) for tail in prefix.tail] == [4, 4]
    read = torch.cat([torch.stack(prefix.tail), ids], 1)
    for room in (None, 30):
        with torch.no_grad():
            found = plain(read, past_key_values=prefix.to_cache(plain.config, room)).logits[:, 4:]
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    with pytest.raises(ValueError, match="no room for 12 slots"):
        prefix.to_cache(plain.config, 11)


def test_its_file(tmp_path):
    model = network()
    prefix = model.compress(ids_of(50)).to_prefix(model)
    path = tmp_path / "new" / "prefix.safetensors"
    prefix.save(path)
    again = Prefix.load(path)
    for name in ("keys", "values", "tail"):
        assert all(map(torch.equal, getattr(prefix, name), getattr(again, name)))
    assert torch.equal(again.mask, prefix.mask) and len(again.keys) == 4
    assert (again.first_position, again.base, again.vocabulary) == (12, prefix.base, 96)
    both = Memory.cat([model.compress(ids_of(50)), model.compress(ids_of(20, seed=3))]).to_prefix(model)
    both.save(path)
    assert [len(row) for row in Prefix.load(path).tail] == [len(row) for row in both.tail]
    whole = path.read_bytes()
    for content in (b"", whole[:-9]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no prefix of a memory"):
            Prefix.load(path)
    for place in (len(whole) - 1, whole.index(b"vocabulary") + 15):  # a value, and a digit of the description
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="does not match its checksum"):
            Prefix.load(path)
    path.write_bytes(whole)
    assert (Prefix.load(path).mask == both.mask).all()
    model.compress(ids_of(50)).save(path)
    with pytest.raises(ValueError, match="another kind of file"):
        Prefix.load(path)
    with pytest.raises(OSError, match="none"):
        Prefix.load(tmp_path / "none")


def test_placeholders_are_of_one_memory():
    model = network()
    prefixes = [model.compress(ids_of(50, seed=seed)).to_prefix(model) for seed in (0, 0, 1)]
    first, again, other = (prefix.placeholder_ids() for prefix in prefixes)
    assert first == again != other and len(first) == 12 and max(first) < 96
    assert prefixes[0].prompt([5, 6]) == [*first, *prefixes[0].tail[0].tolist(), 5, 6]
    with pytest.raises(ValueError, match="this has 2 rows"):
        Memory.cat([model.compress(ids_of(50))] * 2).to_prefix(model).placeholder_ids()


def test_a_row_of_a_batch():
    model = network()
    row = Memory.cat([model.compress(ids_of(50)), model.compress(ids_of(20, seed=3))])[1]
    assert row.states.shape[4] == 12 and int(row.slots) == 6
    prefix = row.to_prefix(model)
    assert len(prefix) == prefix.first_position == 6 and bool(prefix.mask.all())
    assert prefix.placeholder_ids() == model.compress(ids_of(20, seed=3)).to_prefix(model).placeholder_ids()
    with pytest.raises(ValueError, match="begins behind them at position 6, and this prefix is for position 64"):
        row.to_prefix(model, 64).placeholder_ids()
    nothing = model.compress(ids_of(3)).to_prefix(model)
    assert len(nothing) == 0 and nothing.to_cache(model.config).get_seq_length() == 0


def test_caches_that_a_graph_has_read():
    model = network()
    plain, prefix = build("llama", scale=2.0), model.compress(ids_of(50)).to_prefix(model)
    cache = prefix.to_cache(plain.config)
    first = plain(TEXT, past_key_values=cache).logits
    second = plain(TEXT, past_key_values=cache).logits
    (first.sum() + second.sum()).backward()
    cache = prefix.to_cache(plain.config)
    with torch.inference_mode():
        plain(TEXT, past_key_values=cache)
    with torch.no_grad():
        again = plain(TEXT, past_key_values=cache).logits
    assert (again - second).abs().max() < 1e-5


def test_memories_that_are_more_than_keys_and_values():
    model = network("gpt2")
    with pytest.raises(
        ValueError, match="has learned positions, so what is behind its memories begins at position 64"
    ):
        model.compress(ids_of(50)).to_prefix(model)
    model.compress(ids_of(50)).to_prefix(model, model.layout.first_position)
    model = network("mistral")
    with pytest.raises(ValueError, match="has layers with a sliding window"):
        model.compress(ids_of(50)).to_prefix(model)
    kernels = network()
    kernels.plain_model.set_attn_implementation("r3mem")
    for other in (model, kernels):
        with pytest.raises(ValueError, match=r"static.* is for matched memories"):
            other.generate(TEXT, memory=other.compress(ids_of(50)), cache_implementation="static")
    learned = R3MemModel(build(), R3MemConfig(num_memory_tokens=2, segment_length=LENGTH, core=(1, 3)))
    with pytest.raises(ValueError, match="only a memory that the base model reads"):
        learned.compress(ids_of(50)).to_prefix(learned)
    with pytest.raises(ValueError, match="of another base model"):
        network(seed=1).compress(ids_of(50)).to_prefix(network())


def test_a_copy_of_a_cache_is_of_the_same_model():
    """transformers' way to continue one beginning in several ways."""
    model = network()
    memory = model.compress(ids_of(50), finish=True)
    with model.disable_adapters(), torch.no_grad():
        memory = model.compress(ids_of(50), finish=True)
        cache = memory.to_cache(model)
        model.plain_model(TEXT[:, :4], past_key_values=cache)
        for rest in (TEXT[:, 4:], TEXT[:, 4:].flip(1)):
            copied = copy.deepcopy(cache)
            assert copied._decoder is cache._decoder and copied.get_seq_length() == 4
            found = model.plain_model(rest, past_key_values=copied).logits
            whole = model.plain_model(torch.cat([TEXT[:, :4], rest], 1), past_key_values=memory.to_cache(model))
            assert torch.allclose(found, whole.logits[:, 4:], atol=1e-5)
        assert cache.get_seq_length() == 4


def test_a_cache_that_is_given_an_empty_memory_holds_none():
    model = network()
    with model.disable_adapters(), torch.no_grad():
        memory, nothing = model.compress(ids_of(50), finish=True), model.empty_memory()
        cache = model.reader.read(model.reading_cache(memory), nothing)
        found, expected = (model.plain_model(TEXT, past_key_values=c).logits for c in (cache, nothing.to_cache(model)))
    assert cache.prefix_length == 0 and torch.equal(found, expected)


def test_a_row_of_a_memory_of_longer_ones_is_saved(tmp_path):
    model = network()
    rows = [model.compress(ids_of(50), finish=True, pinned=n) for n in (6, 1)]
    row = Memory.cat(rows)[1]
    row.save(tmp_path / "row.safetensors")
    rows[1].save(tmp_path / "alone.safetensors")
    assert (tmp_path / "row.safetensors").read_bytes() == (tmp_path / "alone.safetensors").read_bytes()
    expected = model(TEXT, memory=row).logits
    assert torch.allclose(model(TEXT, memory=Memory.load(tmp_path / "row.safetensors")).logits, expected, atol=1e-5)
