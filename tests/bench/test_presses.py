"""`bench.presses`: scores of kvpress, read off one pass, on a tiny model."""

import pytest
import torch
from torch.nn import functional
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bench import presses
from r3mem_fast import R3MemModel
from r3mem_fast.integrations.capture import captured_attention
from r3mem_fast.integrations.compat import cache_argument
from tests.reversible.tiny import build, token_ids

needs_kvpress = pytest.mark.skipif(not presses.is_installed(), reason="kvpress is not installed")
SLOTS, REPEAT = 8, torch.tensor([5, 6, 7])


def scored(model, name, ids):
    return presses.press_scores(model, presses.PRESSES[name](SLOTS), ids, prefix=2, repeat_ids=REPEAT)


@needs_kvpress
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # the latter with a rotary table for each kind of layer
@pytest.mark.parametrize("name", presses.PRESSES)
def test_scores_of_all_keys_and_nothing_is_left_behind(name, family):
    model, ids = build(family, scale=2.0).eval(), token_ids(tokens=20)
    scores = scored(model, name, ids)
    assert scores.shape == (4, 2, 2, 20) and scores.dtype == torch.float32
    assert scores[..., 2:].isfinite().all() and scores[..., 2:].std() > 0
    assert scores[..., :2].isposinf().all()  # what is always kept
    attention = model.model.layers[0].self_attn
    assert not hasattr(attention, "rotary_emb") and not attention._forward_hooks


@needs_kvpress
@pytest.mark.parametrize("name", presses.PRESSES)
def test_a_memory_network_without_adapters_scores_as_its_base(name):
    ids = token_ids(tokens=20)
    expected = scored(build(scale=2.0).eval(), name, ids)
    model = R3MemModel(build(scale=2.0)).eval()
    with model.disable_adapters():
        assert torch.equal(scored(model.plain_model, name, ids), expected)


def queries_and_keys(model, ids):
    cache = DynamicCache()
    with captured_attention(model.model) as calls, torch.no_grad():
        model(ids, use_cache=True, **cache_argument(model, cache))
    return [(calls[index].query, layer.keys.repeat_interleave(2, 1)) for index, layer in enumerate(cache.layers)]


@needs_kvpress
@pytest.mark.parametrize("family, changes", [("llama", {}), ("gemma3_text", {"sliding_window": 20})])
def test_snapkv_is_pooled_attention_of_the_window(family, changes):
    """Also where layers have rotary tables of two kinds, and a sliding window that no key is out of."""
    model, ids = build(family, scale=2.0, **changes).eval(), token_ids(tokens=20)
    scores, window = scored(model, "snapkv", ids), SLOTS // 2
    causal = torch.ones(20, 20, dtype=torch.bool).tril()
    for found, (query, key) in zip(scores, queries_and_keys(model, ids), strict=True):
        weights = (query @ key.mT * 8**-0.5).masked_fill(~causal, -torch.inf).softmax(-1)
        mean = weights[:, :, -window:, :-window].mean(2)
        pooled = functional.avg_pool1d(mean, 5, stride=1, padding=2).unflatten(1, (2, 2)).mean(2)
        torch.testing.assert_close(found[..., 2:-window], pooled[..., 2:])
        assert (found[..., -window:] > pooled.max()).all()


@needs_kvpress
def test_kvzip_is_the_largest_attention_of_a_repetition():
    model, ids = build(scale=2.0).eval(), token_ids(tokens=20)
    scores = scored(model, "kvzip", ids)
    whole = torch.cat([ids, REPEAT.expand(2, -1), ids[:, 2:]], 1)
    # Queries see the first tokens that are attention sinks, at most as many as are not repeated, and all that follows.
    causal = torch.ones(41, 41, dtype=torch.bool).tril()
    for found, (query, key) in zip(scores, queries_and_keys(model, whole), strict=True):
        weights = (query @ key.mT * 8**-0.5).masked_fill(~causal, -torch.inf).softmax(-1)
        largest = weights[:, :, 20:, 2:20].unflatten(1, (2, 2)).amax((2, 3))
        torch.testing.assert_close(found[..., 4:], largest[..., 2:])
        assert (found[..., :4] > largest.max()).all()  # what it always keeps


@needs_kvpress
def test_attention_stays_what_it_was():
    """Importing kvpress wraps every attention function, for what is not done here."""
    functions = ALL_ATTENTION_FUNCTIONS.items()
    assert not [name for name, function in functions if function.__module__.startswith("kvpress")]


def test_the_best_slots_are_kept_in_order():
    model = R3MemModel(build(scale=2.0)).eval()
    memory = model.compress(token_ids(tokens=12), finish=True)
    scores = torch.rand(memory.ages.shape, generator=torch.Generator().manual_seed(0))
    kept = presses.keep_best(memory, scores, 5)
    assert kept.slots.tolist() == [5, 5] and kept.states.shape[4] == 5
    assert (kept.ages.diff(dim=-1) < 0).all()
    row = scores[3, 1, 0].topk(5).indices.sort().values
    assert torch.equal(kept.states[3, :, 1, 0], memory.states[3, :, 1, 0, row])
    model.check_memory(kept, 2)
    model(token_ids(tokens=4), memory=kept)


def test_without_kvpress_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kvpress", None)
    assert not presses.is_installed()
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps kvpress==0\.5\.5"):
        presses.PRESSES["keydiff"](SLOTS)
