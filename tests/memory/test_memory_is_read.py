"""A memory that a pass does not read is an error, wherever on its way to the layers it was lost."""

import inspect

import pytest
import torch

from r3mem_fast import MemoryNotReadError
from r3mem_fast.integrations import attention
from r3mem_fast.integrations.compat import cache_name
from tests.reversible.tiny import build
from tests.test_model_memory import ids_of, made

pytestmark = pytest.mark.filterwarnings("ignore:.*no exact branch is known:UserWarning")


def without_its_cache(function, when=lambda self: True):
    """The method as a version of transformers would have it that lost the cache under a new name."""
    signature = inspect.signature(function)

    def forward(self, *args, **kwargs):
        arguments = signature.bind(self, *args, **kwargs)
        given = {**arguments.arguments, **arguments.arguments.get("kwargs", {})}
        if (name := cache_name(given)) is not None and when(self):
            kwargs.pop(name)
        return function(self, *args, **kwargs)

    forward.__signature__ = signature
    return forward


def uses(model, memory):
    """Every way in which a memory is read or written."""
    ids = ids_of(5)
    query = {"query_input_ids": ids_of(3), "labels": ids_of(20)}
    return {
        "forward": lambda: model(ids, memory=memory),
        "loss": lambda: model(ids, labels=ids, memory=memory).loss.backward(),
        "objective": lambda: model(ids_of(20), **query).loss.backward(),
        "generate": lambda: model.generate(ids, memory=memory, max_new_tokens=3),
        "compress": lambda: model.compress(ids_of(20)),
        "go on": lambda: model.compress(ids_of(20), memory=memory),
        "expand": lambda: model.expand(memory, max_new_tokens=3),
        "cache": lambda: model.peft_model(ids, past_key_values=memory.to_cache(model)),
    }


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "r3mem"])
@pytest.mark.parametrize("use", uses(None, None))
def test_one_layer_that_is_not_given_the_memory(use, implementation, monkeypatch):
    base = build("llama", scale=2.0, attn_implementation=implementation)
    model = made(base=base)
    memory = model.compress(ids_of(24))
    uses(model, memory)[use]()  # as it is, nothing is wrong
    layer = type(base.model.layers[2]).unreversed
    lost = without_its_cache(layer.forward, lambda self: self is base.model.layers[2])
    monkeypatch.setattr(layer, "forward", lost)
    monkeypatch.setattr("r3mem_fast.reversible.branches._EXACT", {})
    model.stack.branches = [lambda layer, x, kwargs: lost(layer, x, **kwargs) - x] * 4
    # With a mask that lets the memory in, keys without it do not even fit.
    with pytest.raises(RuntimeError, match=r"layers \[[12]\] did not take part|must match the size of tensor b"):
        uses(model, memory)[use]()


@pytest.mark.parametrize("use", ["forward", "loss", "generate", "compress", "expand"])
def test_a_decoder_that_is_not_given_the_memory(use, monkeypatch):
    """Lost between the model and its decoder (`generate`, the causal model's forward), or at the decoder's door."""
    model = made()
    memory = model.compress(ids_of(24))
    base = model.peft_model.get_base_model()
    through_the_causal_model = [type(base)] if use in ("generate", "expand") else []
    for kind in (*through_the_causal_model, type(base.model)):
        with monkeypatch.context() as patched:
            patched.setattr(kind, "forward", without_its_cache(kind.forward))
            with pytest.raises(MemoryNotReadError):
                uses(model, memory)[use]()
    uses(model, memory)[use]()


def test_attention_that_does_not_read_its_mask(monkeypatch):
    model = made(base=build("llama", scale=2.0, attn_implementation="r3mem"))
    memory = model.compress(ids_of(24))
    own = attention.memory_attention_forward

    def forgetful(module, query, key, value, mask, **kwargs):
        return own(module, query, key, value, mask._replace(memory_key=None, memory_value=None, read=None), **kwargs)

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, forgetful)
    with pytest.raises(MemoryNotReadError, match=r"layers \[0, 1, 2, 3\] did not"):
        model(ids_of(5), memory=memory)


def test_a_pass_that_fails_otherwise_is_told_as_it_is(monkeypatch):
    model = made()
    memory = model.compress(ids_of(24))
    handle = model.layers[1].register_forward_pre_hook(lambda layer, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids_of(5), memory=memory)
    handle.remove()
    with torch.no_grad():
        assert model(ids_of(5), memory=memory).logits.isfinite().all()
