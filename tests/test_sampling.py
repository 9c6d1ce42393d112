"""Writing segment by segment: what is written is what the logits of training say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r3mem_fast import sampling
from r3mem_fast.batching import Rows
from tests.reversible.tiny import token_ids
from tests.test_model_memory import made

pytestmark = pytest.mark.filterwarnings("ignore:.*no exact branch is known:UserWarning")
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def sampled_from(**settings):
    """A memory network as a trainer that samples has it."""
    model = made(**settings)
    model.add_model_tags(["trl", "grpo"])
    return model


def prompts(lengths, seed=0):
    width = max(lengths)
    ids, mask = token_ids(len(lengths), width, seed), torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    return ids, mask


def assert_written_as_scored(model, ids, mask, found):
    """Each new token is the likeliest one behind those before it, by the logits that the loss is computed of."""
    new = found.shape[1] - ids.shape[1]
    assert torch.equal(found[:, : ids.shape[1]], ids)
    mask = torch.cat([mask, mask.new_ones(len(mask), new)], 1)
    with torch.no_grad():
        logits = model(found, mask, labels=found.masked_fill(mask == 0, -100)).logits
    predicted = logits[:, ids.shape[1] - 1 : -1]
    written = predicted.gather(2, found[:, ids.shape[1] :, None])[..., 0]
    assert torch.allclose(written, predicted.amax(2), atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"segment_overlap": 3},
        {"memory_placement": "input"},
        {"adapter_rows": "memory"},
        {"max_memory_segments": 1},
        {"memory_writer": "anchored", "adapter_rows": "memory", "memory_budget": 4, "beyond_budget": "rematch_once"},
    ],
    ids=lambda settings: "-".join(settings)[:40] or "defaults",
)
def test_it_is_written_as_it_is_scored(family, settings):
    """Rows of other lengths, over several segments. In one pass something else would have been written."""
    model = sampled_from(family=family, **settings)
    ids, mask = prompts([20, 9, 15, 8, 1])
    found = model.generate(ids, mask, max_new_tokens=21, **GREEDY)
    assert_written_as_scored(model, ids, mask, found)
    model.add_model_tags(["trl", "sft"])
    assert not torch.equal(model.generate(ids, mask, max_new_tokens=21, **GREEDY), found)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3), new=st.integers(9, 20), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_any_lengths(lengths, new, seed):
    model = sampled_from()
    ids, mask = prompts(lengths, seed)
    found = model.generate(ids, mask, max_new_tokens=new, **GREEDY)
    assert found.shape == (len(lengths), ids.shape[1] + new)
    assert_written_as_scored(model, ids, mask, found)


def test_a_row_that_has_ended():
    """It is padded, and the others go on as they would without it."""
    model = sampled_from()
    ids, mask = prompts([20, 9])
    free = model.generate(ids, mask, max_new_tokens=21, **GREEDY)
    end = int(free[0, 25])
    assert end not in free[1, 20:]  # so that the other row does not end
    found = model.generate(ids, mask, max_new_tokens=21, **{**GREEDY, "eos_token_id": [end]})
    first = int((free[0, 20:] == end).nonzero()[0]) + 1
    assert torch.equal(found[0, 20 : 20 + first], free[0, 20 : 20 + first])
    assert not found[0, 20 + first :].any()
    assert torch.equal(found[1], free[1])


def test_least_and_sampled():
    """No row ends before `min_new_tokens`, counted over all segments; sampling repeats with its seed."""
    model = sampled_from()
    ids, mask = prompts([12])
    end = int(model.generate(ids, mask, max_new_tokens=21, **GREEDY)[0, 12])
    chosen = {**GREEDY, "eos_token_id": end}
    assert model.generate(ids, mask, max_new_tokens=21, **chosen).shape[1] == 13
    assert model.generate(ids, mask, max_new_tokens=21, min_new_tokens=15, **chosen).shape[1] >= 27
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model.generate(ids, mask, max_new_tokens=21, **{**GREEDY, "do_sample": True}))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_what_fits_a_segment_is_read_in_one_pass(monkeypatch):
    monkeypatch.setattr(sampling, "generate_by_segments", None)  # not called
    ids, mask = prompts([3, 2])
    assert sampled_from().generate(ids, mask, max_new_tokens=5, **GREEDY).shape == (2, 8)
    long, mask = prompts([20])
    assert made().generate(long, mask, max_new_tokens=5, **GREEDY).shape == (1, 25)  # no trainer samples
    assert not sampling.is_written_by_segments(made(num_memory_tokens=0), Rows(long), {"max_new_tokens": 9})


@pytest.mark.parametrize(
    "setting", [{"num_beams": 2}, {"repetition_penalty": 1.2}, {"num_return_sequences": 2, "do_sample": True}]
)
def test_what_looks_at_a_whole_text_is_refused(setting):
    ids, mask = prompts([12])
    with pytest.raises(ValueError, match=f"{next(iter(setting))} cannot go with rows that are written segment by"):
        sampled_from().generate(ids, mask, max_new_tokens=9, **{**GREEDY, **setting})
