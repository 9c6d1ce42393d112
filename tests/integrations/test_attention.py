"""`attn_implementation="r3mem"`: what eager attention computes, in every family, without a mask tensor."""

import contextlib
import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GptOssConfig, StaticCache
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.models.diffllama import modeling_diffllama

from r3mem_fast import MomentumCoupling, R3MemConfig, R3MemModel, load_model, make_reversible
from r3mem_fast.integrations import attention
from r3mem_fast.integrations.attention import SegmentMask, memory_attention_forward, offset_of, segment_mask
from r3mem_fast.kernels.attention import MAX_DECODED
from r3mem_fast.memory.cache import PrefixCache
from r3mem_fast.reversible.convert import text_config
from r3mem_fast.tiny_models import tiny_model
from tests.memory.test_cache import FIRST, cache_with, prefix_of
from tests.reversible.tiny import (
    EXACT_FAMILIES,
    GENERIC_FAMILIES,
    assert_gradients_as_stored,
    assert_same_gradients,
    build,
    gradients,
    token_ids,
    train_step,
)

FAMILIES = [*EXACT_FAMILIES, *GENERIC_FAMILIES]
pytestmark = pytest.mark.filterwarnings("ignore:.*no exact branch is known:UserWarning")
# 17 tokens: more than the windows of 8.
LEFT = torch.arange(17) >= torch.tensor([0, 3, 9, 16])[:, None]
RIGHT = torch.arange(17) < torch.tensor([17, 1, 9, 16])[:, None]


@contextlib.contextmanager
def implementation(model, name):
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    assert model.config._attn_implementation == name
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def both(model, function):
    """What a function gives with this attention and with eager attention."""
    results = []
    for name in ("r3mem", "eager"):
        with implementation(model, name):
            results.append(function())
    return results


def assert_close(found, expected, tolerance=1e-5):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def recorded(monkeypatch):
    """Names and arguments of the operators that are called from now on."""
    calls = []
    for name in ("memory_attention", "memory_decode"):
        operator = getattr(attention, name)

        def record(*args, name=name, operator=operator, **kwargs):
            calls.append((name, args, kwargs))
            return operator(*args, **kwargs)

        monkeypatch.setattr(attention, name, record)
    return calls


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_eager_attention(family, reversible):
    """Of the plain and of the reversible network: without padding, and with padding of 4 rows on either side."""
    model = build(family, scale=2.0)
    if reversible:
        make_reversible(model, MomentumCoupling(fraction_bits=20))
    model.eval()
    ids = token_ids(4)
    for mask in (None, LEFT, RIGHT):
        inputs = {} if mask is None else {"attention_mask": mask.long()}
        with torch.no_grad():
            found, expected = both(model, lambda inputs=inputs: model(ids, **inputs).logits)
        real = torch.ones_like(LEFT) if mask is None else mask
        # Of different rounding the streams make steps of 2**-20 now and then.
        assert_close(found[real], expected[real], 1e-4 if reversible else 1e-5)
        assert found.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_row_is_itself(family):
    model = build(family, scale=2.0, attn_implementation="r3mem").eval()
    ids, positions = token_ids(4), (LEFT.long().cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        together = model(ids, attention_mask=LEFT.long(), position_ids=positions).logits
        for row, keep in enumerate(LEFT):
            assert_close(together[row, keep], model(ids[row : row + 1, keep]).logits[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_eager_attention(family):
    model = build(family, scale=2.0)
    ids, mask = token_ids(4), LEFT.long()
    # A row's first token is predicted from padding.
    labels = ids.masked_fill(mask.cumsum(1) < 2, -100)

    def step():
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        found = loss.detach(), gradients(model)
        model.zero_grad(set_to_none=True)
        return found

    (loss, found), (expected_loss, expected) = both(model, step)
    assert_close(loss, expected_loss)
    assert_same_gradients(found, expected, 1e-4)
    make_reversible(model, MomentumCoupling(fraction_bits=20))
    with implementation(model, "r3mem"):
        assert_gradients_as_stored(model, ids, 1e-5, attention_mask=mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_is_what_eager_attention_generates(family):
    model = build(family, scale=2.0).eval()
    settings = {"attention_mask": LEFT.long(), "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    for extra in ({"do_sample": False}, {"num_beams": 3}):
        found, expected = both(model, lambda extra=extra: model.generate(token_ids(4), **settings, **extra))
        assert torch.equal(found, expected)


@given(st.data())
def test_step_by_step_is_one_pass(data):
    """Whatever the pieces and paddings are, past a window whose cache evicts, and behind a prefix."""
    family = data.draw(st.sampled_from(["llama", "mistral", "gpt2", "gemma2"]))
    if family not in _MODELS:
        plain = build(family, scale=2.0, attn_implementation="r3mem")
        _MODELS[family] = make_reversible(plain, MomentumCoupling(fraction_bits=20)).eval()
    model, ids = _MODELS[family], token_ids(tokens=20)
    mask = torch.ones_like(ids)
    mask[1, : data.draw(st.integers(0, 5))] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cuts = sorted(data.draw(st.sets(st.integers(1, 19))))
    slots = data.draw(st.integers(0, FIRST))
    with torch.no_grad():
        prefix = prefix_of(model, slots)
        visible = torch.arange(slots) >= torch.tensor(data.draw(st.tuples(*[st.integers(0, slots)] * 2)))[:, None]

        def run(cuts):
            cache, parts = cache_with(model, prefix, visible), []
            for start, end in zip([0, *cuts], [*cuts, 20], strict=True):
                rows = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
                parts.append(model(ids[:, start:end], past_key_values=cache, **rows).logits)
            return torch.cat(parts, 1)[mask.bool()]

        whole = run([])
        # Other shapes round otherwise, and the streams make steps of 2**-20 of it.
        assert_close(run(cuts), whole, 1e-4)
        with implementation(model, "eager"):
            assert_close(run([]), whole, 1e-4)


_MODELS = {}


def test_sinks_of_gpt_oss():
    """A mixture of experts, which cannot be made reversible: the plain model."""
    config = GptOssConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=8,
        max_position_embeddings=128, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    ids, mask = token_ids(4), LEFT.long()
    (loss, found), (expected_loss, expected) = both(model, lambda: train_step(model, ids))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(found, expected, 1e-4)
    assert any(name.endswith("sinks") for name in found)
    with torch.no_grad():
        found, expected = both(model, lambda: model(ids, attention_mask=mask).logits[LEFT])
    assert_close(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_prefix_are_those_of_eager_attention(family):
    model = make_reversible(build(family, scale=2.0), MomentumCoupling(fraction_bits=20))
    visible = torch.arange(5) >= torch.tensor([0, 3])[:, None]

    def step():
        prefix = prefix_of(model, 5).requires_grad_()
        cache = cache_with(model, prefix, visible, keep=False)
        model(token_ids(), labels=token_ids(), past_key_values=cache).loss.backward()
        found = {**gradients(model), "prefix": prefix.grad}
        model.zero_grad(set_to_none=True)
        return found

    found, expected = both(model, step)
    assert_same_gradients(found, expected, 1e-4)
    assert found["prefix"][:, :, 0].any() and not found["prefix"][:, :, 1, :, :3].any()


def test_nothing_is_concatenated_and_no_mask_is_made(monkeypatch):
    """Keys are those of the tokens alone, the memory's come beside them, in inference and in both evaluations."""
    model = make_reversible(build(scale=2.0, attn_implementation="r3mem"), MomentumCoupling(fraction_bits=20))
    prefix = prefix_of(model, 5)
    calls = recorded(monkeypatch)
    cache = cache_with(model, prefix)
    with torch.no_grad():
        model(token_ids(tokens=9), past_key_values=cache)
        model(token_ids(tokens=1), past_key_values=cache)
    model(token_ids(), labels=token_ids(), past_key_values=cache_with(model, prefix, keep=False)).loss.backward()
    assert [len(args[1][0, 0]) for _, args, _ in calls] == [9] * 4 + [10] * 4 + [17] * 8
    assert all(args[3].shape == (2, 2, 5, 8) for _, args, _ in calls)
    assert all(kwargs["segment_starts"] is kwargs["memory_lengths"] is None for _, _, kwargs in calls)


def test_decoding_and_gradients_have_operators_of_their_own(monkeypatch):
    """Two query heads share a key head here."""
    model = build(scale=2.0, attn_implementation="r3mem").eval()
    calls = recorded(monkeypatch)

    def operator(tokens):
        calls.clear()
        logits = model(token_ids(tokens=tokens)).logits
        (name,) = {name for name, _, _ in calls}
        return name, logits

    name, logits = operator(5)
    assert name == "memory_attention" and logits.requires_grad
    for grad in (torch.no_grad, torch.inference_mode):
        with grad():
            assert operator(MAX_DECODED // 2)[0] == "memory_decode"
            assert operator(MAX_DECODED // 2 + 1)[0] == "memory_attention"
    model.requires_grad_(False)
    name, logits = operator(5)
    assert name == "memory_decode" and logits.grad_fn is None


def test_under_autocast():
    """In its dtype, as sdpa: rotary embeddings leave queries and keys, but not values, in float32."""
    model = build(scale=2.0).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = []
        for name in ("r3mem", "sdpa"):
            with implementation(model, name):
                logits.append(model(token_ids()).logits.float())
    assert_close(*logits, tolerance=0.05)
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    memory = SegmentMask(0, memory_key=key, memory_value=key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = memory_attention_forward(None, query, key, key, memory)
    # Inside of the operator nothing is cast.
    query, key = query.bfloat16(), key.bfloat16()
    assert torch.equal(found, memory_attention_forward(None, query, key, key, memory)[0])


def test_where_it_is_chosen(folder):
    """By load_model, by transformers, before and after the model becomes reversible; the file does not keep it."""
    model, _ = load_model(str(folder), attn_implementation="r3mem")
    assert model.config._attn_implementation == "r3mem"
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="r3mem")
    assert plain.config._attn_implementation == "r3mem"
    assert "r3mem" not in str(model.config.to_dict()) and "r3mem" not in model.config.to_json_string()
    default, _ = load_model(str(folder))
    assert default.config._attn_implementation == "sdpa"
    make_reversible(default).set_attn_implementation("r3mem")
    with torch.no_grad():
        assert torch.equal(default(token_ids()).logits, make_reversible(model)(token_ids()).logits)


def test_masks():
    window = sliding_window_causal_mask_function(4)
    assert segment_mask(2, 5, 5) == SegmentMask(0)
    assert segment_mask(2, 3, 8, q_offset=5, mask_function=window) == SegmentMask(5, 4)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0]])
    found = segment_mask(4, 6, 6, attention_mask=mask)
    assert found.segment_starts.tolist() == [3, 0, 6, 1] and found.segment_starts.dtype == torch.int32
    # A window's cache has let two keys go.
    found = segment_mask(4, 1, 4, q_offset=5, kv_offset=2, mask_function=window, attention_mask=mask.bool())
    assert found.segment_starts.tolist() == [1, 0, 4, 0] and (found.query_offset, found.window) == (3, 4)


@pytest.mark.parametrize(
    "function",
    [
        bidirectional_mask_function,
        chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64)),
        and_masks(causal_mask_function, causal_mask_function),
        lambda batch, head, query, key: key <= query,
    ],
)
def test_mask_functions_that_it_does_not_know(function):
    with pytest.raises(ValueError, match=r'no packed sequences.*use attn_implementation="sdpa" or "eager"'):
        segment_mask(1, 5, 5, mask_function=function)


def test_masks_that_it_cannot_have():
    model = build(attn_implementation="r3mem").eval()
    ids, mask = token_ids(tokens=6), torch.ones(2, 6, dtype=torch.int64)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="no packed sequences"):
        model(ids, position_ids=packed, use_cache=False)
    holes = mask.clone()
    holes[1, 3] = 0
    with pytest.raises(ValueError, match="zeros between ones"):
        model(ids, attention_mask=holes)
    with pytest.raises(ValueError, match=r"takes the mask that transformers has made.*Tensor \[2, 1, 6, 6\]"):
        model(ids, attention_mask=mask.bool()[:, None, None].expand(2, 1, 6, 6).tril())
    with pytest.raises(ValueError, match="not a StaticCache"):
        model(ids, past_key_values=StaticCache(model.config, max_cache_len=32))
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match=r"must be \[batch, 12\], the tokens in the cache included, got \[2, 6\]"):
        model(ids, attention_mask=mask, past_key_values=cache)
    model.config.is_causal = False
    with pytest.raises(ValueError, match="bidirectional"):
        model(ids)


def test_padding_on_the_right_cannot_be_continued():
    """Its generated tokens would see the padding before them."""
    model = build(attn_implementation="r3mem").eval()
    with pytest.raises(ValueError, match=r"zeros between ones.*pad on the left"):
        model.generate(token_ids(4), attention_mask=RIGHT.long(), max_new_tokens=2, pad_token_id=0)


def test_what_it_has_not():
    causal = SegmentMask(0)

    def attend(mask=causal, module=None, **settings):
        query, key = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 3, 8)
        return memory_attention_forward(module, query, key, key, mask, **settings)

    output, weights = attend()
    assert output.shape == (1, 3, 4, 8) and output.is_contiguous() and weights is None
    with pytest.raises(ValueError, match="of a 2D attention_mask, and none was made"):
        attend(mask=None)
    bidirectional = torch.nn.Module()
    bidirectional.is_causal = False
    for settings, name in (
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"is_causal": False}, "is_causal=False"),
        ({"module": bidirectional}, "is_causal=False"),
        ({"position_bias": torch.zeros(3, 3)}, "position_bias"),
        ({"head_mask": torch.ones(4)}, "head_mask"),
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, "cu_seq_lens_q"),
        ({"output_attentions": True}, "output_attentions"),
    ):
        with pytest.raises(ValueError, match=f'"r3mem" has no {name}; use attn_implementation="sdpa" or "eager"'):
            attend(**settings)
    attend(output_attentions=False, position_ids=torch.arange(3), is_causal=True)
    with pytest.raises(ValueError, match="has a sliding window of 4, and its mask one of None"):
        attend(sliding_window=4)
    attend(mask=SegmentMask(0, 4), sliding_window=4)
    with pytest.raises(ValueError, match="3 queries behind query_offset=2 need 5"):
        attend(mask=SegmentMask(2), softcap=1.0, s_aux=torch.zeros(4).requires_grad_())


def test_dropout_in_training_is_refused():
    model = build(attn_implementation="r3mem", attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"has no dropout=0\.1"):
        model(token_ids())
    model.eval()(token_ids())


def test_compiled_it_breaks_no_graph():
    """And a mask with holes is found where nothing can be read on the way."""
    model = build(scale=2.0, attn_implementation="r3mem").eval()
    ids, mask = token_ids(4), LEFT.long()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(ids, attention_mask=mask, use_cache=False).logits
        assert_close(found, model(ids, attention_mask=mask, use_cache=False).logits)
        mask[0, 3] = 0
        with pytest.raises(RuntimeError, match="zeros between ones"):
            compiled(ids, attention_mask=mask, use_cache=False)


def test_a_mask_that_was_not_made_does_not_drop_a_memory():
    model = make_reversible(build(attn_implementation="r3mem"), MomentumCoupling(fraction_bits=20)).eval()
    cache = cache_with(model, prefix_of(model, 3))
    mask = torch.ones(2, 1, 17, 17, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="takes the mask that transformers has made"):
        model(token_ids(), attention_mask=mask, past_key_values=cache)
    other = PrefixCache(text_config(model.config), first_position=FIRST)
    with torch.no_grad():
        assert_close(model(token_ids(), past_key_values=other).logits, model(token_ids()).logits, 1e-3)


def behind_a_memory(family):
    """Logits of a text behind a memory, by this attention."""
    base = tiny_model(family)
    base.set_attn_implementation("r3mem")
    model = R3MemModel(base, R3MemConfig(memory_writer="matched", adapter_rows="memory", segment_length=16)).eval()
    with torch.no_grad():
        return model(token_ids(1, 9), memory=model.compress(token_ids(1, 40), finish=True)).logits


def test_attention_that_changes_what_the_cache_holds_is_refused():
    """DiffLlama attends twice, with a part of the values each time; JetMoe repeats its heads."""
    if not hasattr(modeling_diffllama, "DiffLlamaSdpaAttention"):  # in older versions it has its own attention
        with pytest.raises(ValueError, match=r"DiffLlama\w*Attention computes several attentions over the same keys"):
            behind_a_memory("diffllama")
    with pytest.raises(ValueError, match=r"JetMoe\w*Attention attends with 4 heads of keys, and its cache holds .* 2"):
        behind_a_memory("jetmoe")


def test_a_layer_that_looks_into_its_mask_is_told_that_there_is_none():
    mask = SegmentMask(0)
    assert mask[0] == 0 and mask[:2] == (0, None)
    with pytest.raises(AttributeError, match=r"makes no mask tensor.*\(dtype\).*use attn_implementation="):
        mask.dtype  # noqa: B018
    with pytest.raises(TypeError, match=r"makes no mask tensor.*use attn_implementation="):
        mask[:, :, :, :3]
    with pytest.raises(TypeError, match=r"makes no mask tensor.*use attn_implementation="):
        mask[:, :, 2:, :]
    query, key = torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 9, 4)
    assert offset_of(SegmentMask(5)[:, :, -2:, :], query, key) == 7  # the last queries see all keys up to theirs
    assert copy.deepcopy(mask) == mask and pickle.loads(pickle.dumps(mask)) == mask
