"""Adapters of PEFT, turned off for a while."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from r3mem_fast.integrations.peft import adapters_are_off, adapters_off, base_parameters, own_parameters
from tests.reversible.tiny import build


def adapted(**changes):
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, **changes)
    return get_peft_model(build("llama"), config).eval()


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_adapters_are_off_as_pefts_own_are(changes):
    model, ids = adapted(**changes), torch.randint(3, 96, (2, 9))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.add_(1)
    adapted_logits = model(ids).logits
    with model.disable_adapter():
        expected = model(ids).logits
    assert not torch.equal(adapted_logits, expected)
    with adapters_off(model):
        assert adapters_are_off(model) and torch.equal(model(ids).logits, expected)
    assert not adapters_are_off(model) and torch.equal(model(ids).logits, adapted_logits)


def test_they_come_back_as_they_were():
    model = adapted()
    frozen = next(p for name, p in model.named_parameters() if "lora_A" in name).requires_grad_(False)
    learning = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(KeyError), adapters_off(model):
        raise KeyError
    assert not adapters_are_off(model) and not frozen.requires_grad
    assert [p for p in model.parameters() if p.requires_grad] == learning
    with model.disable_adapter():
        with adapters_off(model):
            pass
        assert adapters_are_off(model)


@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["lm_head"]}, None])
def test_a_base_model_s_parameters_without_their_names(changes):
    model = build()
    if changes is not None:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", **changes))
    named = {id(parameter) for _, parameter in own_parameters(model)}
    assert {id(parameter) for parameter in base_parameters(model)} == named
    replaced = torch.nn.Parameter(torch.zeros(1))
    (model if changes is None else model.get_base_model()).model.norm.weight = replaced
    assert any(parameter is replaced for parameter in base_parameters(model))
