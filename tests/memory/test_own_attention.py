"""Memories of models that compute attention by themselves, some with interleaved rotary tables of their own."""

import pytest
import torch

from tests.memory.test_matched import check_that_nothing_is_lost, ids_of, network
from tests.reversible.tiny import OWN_ATTENTION

pytestmark = pytest.mark.filterwarnings("ignore:.*no exact branch is known:UserWarning")


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_where_nothing_is_left_out_nothing_is_lost(family):
    """A matched memory with a slot for every token is the context."""
    check_that_nothing_is_lost(family, "sdpa" if family == "falcon" else "eager")


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_what_is_written_behind_a_memory_is_what_its_logits_say(family):
    model = network(family)
    memory, text = model.compress(ids_of(70)), ids_of(4, seed=1)
    written = model.generate(text, memory=memory, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        said = model(written[:, :-1], memory=memory).logits[:, text.shape[1] - 1 :].argmax(-1)
    assert torch.equal(said[:, : written.shape[1] - 4], written[:, 4:])


def test_attention_that_cannot_be_noted_is_refused():
    model = network("falcon", of_base={"attn_implementation": "eager"})
    with pytest.raises(ValueError, match="none of transformers' interchangeable functions"):
        model.compress(ids_of(40))


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_attention_that_looks_ahead_is_refused(looks_ahead, monkeypatch):
    model = network("llama")
    if looks_ahead:  # as Doge in transformers 5.10 where no mask is made
        for layer in model.layers:
            monkeypatch.setattr(layer.self_attn, "is_causal", False)
        with pytest.raises(ValueError, match="lets tokens see those behind them"):
            model.compress(ids_of(40))
    else:
        model.compress(ids_of(40))
