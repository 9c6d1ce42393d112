"""Models whose layers are in part recurrent or convolutional: a memory carries the states of these layers."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from r3mem_fast import (
    Memory,
    MomentumCoupling,
    R3MemConfig,
    R3MemModel,
    check_gradients,
    check_integrity,
    check_inverse,
    make_reversible,
    reading_backward,
)
from r3mem_fast.integrations import compat
from r3mem_fast.memory import file as memory_file
from r3mem_fast.memory.segments import cut_segments, without_padding

LENGTH, OVERLAP = 16, 4
COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DELTA = {
    "head_dim": 8,
    "layer_types": 2 * ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
MAMBA |= {"mamba_chunk_size": 16}
EXPERTS = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
KINDS = {
    "qwen3_next": DELTA | EXPERTS | {"num_experts_per_tok": 2},
    "qwen3_5_text": DELTA,
    "lfm2": {"layer_types": 2 * ["conv", "full_attention"]},
    "falcon_h1": MAMBA
    | {"mamba_n_heads": 4, "mamba_d_ssm": 32, "mamba_expand": 1, "head_dim": 8, "embedding_multiplier": 2.0},
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_dt_rank": 4, "num_experts": 4},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "recurrent_gemma": {"lru_width": 32, "head_dim": 8, "attention_window_size": 64},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
}
# In earlier versions of transformers only these go on from a state by several tokens at a time.
ALWAYS = ("qwen3_next", "qwen3_5_text")
GOES_ON = ALWAYS if not hasattr(DynamicCache, "get_conv_state") else (*ALWAYS, "lfm2", "falcon_h1", "bamba")
of_each_kind = pytest.mark.parametrize("kind", GOES_ON)


def build(kind, seed=0, **changes):
    torch.manual_seed(seed)
    known = CONFIG_MAPPING[kind]()
    names = known.to_dict().keys() | known.attribute_map.keys()
    config = {
        name: value for name, value in (COMMON | KINDS[kind] | changes).items() if name in names or name in KINDS[kind]
    }
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith("A_log"):
                parameter.mul_(2.0)  # so that branches matter
            if ".conv." in name or name.endswith(("mamba.in_proj.weight", "mamba.out_proj.weight")):
                parameter.mul_(4.0)  # and what is recurrent in them
    return model


def network(kind="qwen3_next", **changes):
    settings = {"num_memory_tokens": LENGTH, "memory_budget": 4 * LENGTH, "segment_length": LENGTH}
    settings |= {"segment_overlap": OVERLAP, "adapter_rows": "memory", "core": (1, 3), "memory_writer": "matched"}
    return R3MemModel(build(kind), R3MemConfig(**settings | changes)).eval()


def ids_of(tokens, rows=1, seed=0):
    return torch.randint(3, 96, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def padded(lengths):
    width = max(lengths)
    ids, mask = ids_of(width, len(lengths), seed=5), torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    return ids * mask, mask


def without_states(memory):
    return dataclasses.replace(memory, carried={name: torch.zeros_like(s) for name, s in memory.carried.items()})


def difference(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@of_each_kind
def test_where_nothing_is_left_out_nothing_is_lost(kind):
    """A slot for every token and the states are the context; without the states they are not: the control."""
    model = network(kind)
    context, text = ids_of(41), ids_of(9, seed=1)
    memory = model.compress(context, finish=True)
    with torch.no_grad(), model.disable_adapters():
        whole = model.plain_model(torch.cat([context, text], 1)).logits[:, 41:]
        greedy = model.plain_model.generate(torch.cat([context, text], 1), max_new_tokens=6, do_sample=False)
    behind = model(text, memory=memory).logits
    assert difference(behind, whole) < 1e-4
    assert difference(model(text, memory=without_states(memory)).logits, whole) > 5e-3
    assert torch.equal(model.generate(text, memory=memory, max_new_tokens=6, do_sample=False)[:, 9:], greedy[:, 50:])
    with torch.no_grad(), model.disable_adapters():
        again = model.plain_model(torch.cat([memory.recent[0][None], text], 1), past_key_values=memory.to_cache(model))
    assert difference(again.logits[:, OVERLAP:], whole) < 1e-4


@pytest.mark.parametrize("implementation", ["eager", "r3mem"])
def test_attentions(implementation):
    model = network()
    model.plain_model.set_attn_implementation(implementation)
    context, text = ids_of(41), ids_of(9, seed=1)
    memory = model.compress(context, finish=True)
    with torch.no_grad(), model.disable_adapters():
        whole = model.plain_model(torch.cat([context, text], 1)).logits[:, 41:]
    assert difference(model(text, memory=memory).logits, whole) < 1e-4


@pytest.mark.parametrize("beyond", ["rematch", "rematch_once"])
@pytest.mark.parametrize("queries", ["own", "own+reread", "pairs"])
def test_few_slots(queries, beyond):
    """Keys and values are matched as ever, and states are those of the text, whatever the slots are."""
    model = network(num_memory_tokens=5, memory_budget=10, beyond_budget=beyond, memory_queries=queries)
    model.questions_of = lambda ids: [ids[:3], ids[4:6]]
    context = ids_of(80, rows=2)
    memory = model.compress(context, finish=True)
    exact = network().compress(context, finish=True)
    assert memory.slots.tolist() == [10, 10] and memory.states.isfinite().all()
    # A memory of few slots is another text to the attention layers, but the first layer has read the very text.
    first = [name for name in memory.carried if name.startswith("0.")]
    assert first and all(difference(memory.carried[name], exact.carried[name]) < 1e-5 for name in first)


@of_each_kind
def test_rows_of_several_lengths(kind):
    """Padding is no token to a recurrent layer: each row is as if it were alone, compressed, read and continued."""
    model, lengths = network(kind), (41, 30, 7)
    ids, mask = padded(lengths)
    together = model.compress(ids, mask, finish=True)
    logits = model(ids, mask, memory=together).logits
    written = model.generate(ids, mask, memory=together, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for row, length in enumerate(lengths):
        own = ids[row : row + 1, 41 - length :]
        alone = model.compress(own, finish=True)
        for name, state in alone.carried.items():
            assert difference(together[row].carried[name], state) < 1e-4
        assert difference(logits[row : row + 1, 41 - length :], model(own, memory=alone).logits) < 1e-3
        expected = model.generate(own, memory=alone, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert torch.equal(written[row, 41:], expected[0, length:])


@pytest.mark.parametrize("lengths", [(60, 7), (30, 25)])  # whose difference is above the reach, and below it
def test_prompts_of_several_lengths_keep_their_distances(monkeypatch, lengths):
    """However much longer a prompt is than the others, it and the slots before it are read as where it is alone."""
    monkeypatch.setattr("r3mem_fast.config.REACH", 32)
    model = network("qwen3_5_text", memory_budget=6 * LENGTH)
    assert model.layout.reach == 32
    ids, mask = padded(lengths)
    memory = model.compress(ids_of(80, rows=2, seed=3), finish=True, pinned=3)
    chosen = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    chosen |= {"return_dict_in_generate": True, "output_logits": True}
    together = torch.stack(model.generate(ids, mask, memory=memory, **chosen).logits, 1)
    for row, length in enumerate(lengths):
        own = ids[row : row + 1, max(lengths) - length :]
        alone = torch.stack(model.generate(own, memory=memory[row], **chosen).logits, 1)
        assert difference(together[row], alone[0]) < 1e-4


def test_padding_that_nobody_can_take_out_is_refused():
    model = network()
    ids, mask = padded((9, 5))
    memory = model.compress(ids_of(20, rows=2), finish=True)
    with model.disable_adapters(), pytest.raises(ValueError, match="would take padding for tokens"):
        model.plain_model(ids, attention_mask=mask, past_key_values=memory.to_cache(model))
    with model.disable_adapters(), pytest.raises(ValueError, match="1 rows of tokens and 2 of memory"):
        model.plain_model(ids[:1], past_key_values=memory.to_cache(model))


@settings(max_examples=6)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_a_history_in_pieces(lengths):
    """What is left over waits in the memory, and the states are those of before it."""
    model, ids = network("qwen3_5_text"), ids_of(sum(lengths))
    memory, start = None, 0
    for length in lengths:
        memory = model.compress(ids[:, start : start + length], memory=memory)
        start += length
    whole = model.compress(ids)
    assert torch.equal(memory.states, whole.states)
    assert all(torch.equal(state, whole.carried[name]) for name, state in memory.carried.items())


@settings(max_examples=20)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.booleans())
def test_segments_without_padding(lengths, each_row):
    ids, mask = padded(lengths)
    memory = network_of_nothing().empty_memory(len(lengths))
    rows = [row[chosen > 0] for row, chosen in zip(ids, mask, strict=True)]
    (segment,) = cut_segments(memory, rows, finish=True, writes_all=True)
    parts = list(without_padding(segment, each_row=each_row))
    assert sorted(place for places, _ in parts for place in places) == list(range(len(lengths)))
    for places, part in parts:
        assert bool(part.mask.all()) and part.rows == tuple(segment.rows[place] for place in places)
        assert all(torch.equal(part.ids[index], rows[row]) for index, row in enumerate(part.rows))
        assert len(places) == 1 or not each_row


_known = []


def network_of_nothing():
    if not _known:
        _known.append(network("qwen3_5_text"))
    return _known[0]


def test_a_memory_is_a_value(tmp_path):
    """Rows, batches, forks, beams, devices and files have the states with them; nothing changes them in place."""
    model = network()
    memory = model.compress(ids_of(40, rows=2), finish=True)
    before = {name: state.clone() for name, state in memory.carried.items()}
    one, other = memory.split()
    assert len(one.carried["0.recurrent.0"]) == 1
    joined = Memory.cat([other, one, other])
    assert torch.equal(joined.carried["0.recurrent.0"], before["0.recurrent.0"][[1, 0, 1]])
    forks = [model.compress(ids_of(17, seed=seed), memory=one, finish=True) for seed in (7, 8)]
    assert not torch.equal(forks[0].carried["0.recurrent.0"], forks[1].carried["0.recurrent.0"])
    text = ids_of(5, seed=3)
    beams = model.generate(text, memory=one, max_new_tokens=3, num_beams=3, do_sample=False, eos_token_id=None)
    assert beams.shape == (1, 8)
    assert all(torch.equal(state, before[name]) for name, state in memory.carried.items())
    half = memory.to(torch.bfloat16)
    assert half.states.dtype == torch.bfloat16 and half.carried["0.recurrent.0"].dtype == torch.float32
    assert memory.to("meta").carried["0.recurrent.0"].device.type == "meta"

    memory.save(tmp_path / "memory.safetensors")
    header = memory_file.read_header(tmp_path / "memory.safetensors")
    assert header.metadata["format_version"] == 3 and header.nbytes == memory.nbytes
    loaded = Memory.load(tmp_path / "memory.safetensors", model)
    assert all(torch.equal(state, before[name]) for name, state in loaded.carried.items())
    assert torch.equal(model(text, memory=loaded[0]).logits, model(text, memory=one).logits)
    wrong = dataclasses.replace(memory, carried={"0.recurrent.0": before["0.recurrent.0"]})
    with pytest.raises(ValueError, match="the memory carries states"):
        model.check_memory(wrong)
    wrong.carried["0.recurrent.0"] = before["0.recurrent.0"][:1]
    wrong.save(tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=r"it carries 0\.recurrent\.0"):
        Memory.load(tmp_path / "wrong.safetensors")


def test_what_is_refused():
    model = network()
    with pytest.raises(ValueError, match="recurrent layers, whose states a memory carries"):
        model.compress(ids_of(20), finish=True).to_prefix(model)
    with pytest.raises(ValueError, match="is recurrent in all its layers"):
        network("mamba").compress(ids_of(20))
    with pytest.raises(ValueError, match="do not go on from their states"):
        network("jamba").compress(ids_of(20))
    with pytest.raises(ValueError, match="RecurrentGemmaModel has positions of a kind"):
        network("recurrent_gemma").compress(ids_of(20))


def test_layers_that_forget_their_states_are_found(monkeypatch):
    """The proof that layers go on from their states fails for layers that do not: a control."""
    monkeypatch.setattr("r3mem_fast.memory.recurrent.set_recurrent_states", lambda layer, states: None)
    monkeypatch.setattr("r3mem_fast.memory.recurrent.CarryingCache.carried", lambda cache, layer_idx: {})
    monkeypatch.setattr(
        "transformers.cache_utils.LinearAttentionLayer.update_recurrent_state", lambda layer, states, *a, **k: states
    )
    with pytest.raises(ValueError, match="do not go on from their states"):
        network("qwen3_5_text").compress(ids_of(20))


@pytest.mark.skipif(hasattr(DynamicCache, "get_conv_state"), reason="memory tokens learn beside states")
@of_each_kind
def test_memory_tokens_that_cannot_learn_beside_states(kind):
    """Where layers of a version change the cache themselves, gradients could not pass through it."""
    model = R3MemModel(build(kind), R3MemConfig(num_memory_tokens=4, segment_length=LENGTH, core=(1, 3)))
    with pytest.raises(ValueError, match="do not go on from their states with gradients"):
        model.compress(ids_of(20))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_read_backward(kind):
    """Where a configuration computes the kinds of its layers, too; afterwards it names them as before."""
    model, config = make_reversible(build(kind), MomentumCoupling()), build(kind).config
    kinds, ids = getattr(config, "layer_types", None), ids_of(7)
    with torch.no_grad():
        forward = model(ids, use_cache=False).logits
        with reading_backward(model, (1, 3)):
            backward = model(ids, use_cache=False).logits
            if kinds is not None:
                assert list(model.config.layer_types) == [kinds[index] for index in (0, 2, 1, 3)]
                assert config.layer_types == kinds  # of another model
        assert torch.equal(model(ids, use_cache=False).logits, forward)
    assert getattr(model.config, "layer_types", None) == kinds
    assert difference(backward, forward) > 1e-3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_reversible_in_either_mode(kind, training):
    """In eval mode transformers makes a cache, which a second evaluation would find changed: none is made here."""
    model, ids = make_reversible(build(kind).train(training), MomentumCoupling()), ids_of(11, rows=2)
    output = model(ids)
    output.logits.square().mean().backward()
    assert getattr(output, "past_key_values", None) is None
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    assert check_inverse(model, ids).exact
    assert check_gradients(model, ids).max_relative_error < 1e-4
    with torch.no_grad():
        # One row: with several, the states of transformers' own RWKV do not fit.
        assert model.generate(ids[:1], max_new_tokens=2, do_sample=False, eos_token_id=None).shape == (1, 13)


@pytest.mark.skipif(not hasattr(DynamicCache, "get_conv_state"), reason="layers change the cache of this version")
@pytest.mark.parametrize("kind", ["qwen3_next", "lfm2", "falcon_h1"])
def test_a_cache_with_gradients(kind):
    """With gradients on, a cache that the caller passes is filled with what the stored pass would give it."""
    model, ids = make_reversible(build(kind), MomentumCoupling()), ids_of(11)
    cache, expected = (DynamicCache(config=model.config) for _ in range(2))
    first = model(ids[:, :7], past_key_values=cache, use_cache=True).logits
    second = model(ids[:, 7:], past_key_values=cache, use_cache=True).logits
    (first.square().mean() + second.square().mean()).backward()
    with torch.no_grad():
        model(ids[:, :7], past_key_values=expected, use_cache=True)
        again = model(ids[:, 7:], past_key_values=expected, use_cache=True).logits
    assert difference(second.detach(), again) < 1e-4
    for index in compat.recurrent_layers(cache):
        found, wanted = (compat.recurrent_states(some.layers[index]) for some in (cache, expected))
        assert found.keys() == wanted.keys() and all(difference(found[n], wanted[n]) < 1e-3 for n in found)
    gradient = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    model(ids).logits.square().split([7, 4], 1)[0].mean().backward()
    assert not torch.equal(gradient, model.get_input_embeddings().weight.grad)  # the second pass had a part in it
    check_integrity(model)


def test_adapters_leave_out_what_kernels_read_past_them():
    model = R3MemModel(build("mamba"), R3MemConfig(core=(1, 3)))
    adapted = {name.split(".mixer.")[1].split(".")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert "in_proj" in adapted and "out_proj" not in adapted
