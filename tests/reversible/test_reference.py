"""`reference_model`: the same network, frozen, of which what is frozen already is held once."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from r3mem_fast import make_reversible, reference_model
from tests.reversible.tiny import build, token_ids
from tests.test_model_memory import made


def with_adapters():
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(make_reversible(build(scale=2.0)), config)


@pytest.mark.parametrize(
    "build_model",
    [lambda: make_reversible(build(scale=2.0)), with_adapters, made],
    ids=["full", "adapters", "network"],
)
@pytest.mark.parametrize("share_frozen", [True, False])
def test_a_reference_is_the_model_as_it_was(build_model, share_frozen):
    """Bit for bit, also when the model has learned since; nothing in it learns, and it is in eval mode."""
    model = build_model().train()
    ids = token_ids()
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, labels=ids).logits
    reference = reference_model(model.train(), share_frozen=share_frozen)
    assert model.training and not reference.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    learns = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert learns
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
        assert torch.equal(reference(input_ids=ids, labels=ids).logits, expected)
        assert not torch.equal(model.eval()(input_ids=ids, labels=ids).logits, expected)


def test_what_is_frozen_is_shared():
    """And nothing else is; without sharing, nothing is."""
    model = with_adapters()
    frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    held = {id(parameter) for parameter in reference_model(model).parameters()}
    assert frozen < held
    assert not held & {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    alone = reference_model(model, share_frozen=False)
    assert not {id(parameter) for parameter in alone.parameters()} & {id(p) for p in model.parameters()}
    assert sum(p.requires_grad for p in model.parameters()) == len(list(model.parameters())) - len(frozen)


def test_a_model_inside_of_a_trainer_is_refused():
    model = make_reversible(build())
    model.forward = model.forward
    with pytest.raises(ValueError, match="before the trainer is made"):
        reference_model(model)
