"""Changes to foreign objects are undone, whatever happens meanwhile."""

import types

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from r3mem_fast.integrations import scoped


class Stopped(Exception):
    """What happens meanwhile."""


def test_attributes_come_back_and_new_ones_go():
    owner = types.SimpleNamespace(kept=1)
    with pytest.raises(Stopped), scoped.temporarily(owner, kept=2, new=3):
        assert (owner.kept, owner.new) == (2, 3)
        raise Stopped
    assert vars(owner) == {"kept": 1}


def test_an_attribute_of_the_class_is_not_left_on_the_instance():
    layer = nn.Linear(2, 2)
    forward = layer.forward
    with scoped.returning(layer, "result"):
        assert layer(None) == "result"
    assert "forward" not in vars(layer) and layer.forward == forward


def test_a_property_is_set_back():
    """As a configuration of transformers has them: the value lies under another name."""
    config = LlamaConfig(attn_implementation="eager")
    with scoped.temporarily(config, _attn_implementation="sdpa"):
        assert config._attn_implementation == "sdpa"
    assert config._attn_implementation == "eager"


def test_one_change_inside_of_another():
    layer = nn.Linear(2, 2)
    with scoped.returning(layer, 1):
        with scoped.returning(layer, 2):
            assert layer(None) == 2
        assert layer(None) == 1
    assert "forward" not in vars(layer)


def test_modules_in_another_order():
    layers = nn.ModuleList([nn.Linear(1, 1) for _ in range(3)])
    before, names = list(layers), list(layers._modules)
    with pytest.raises(Stopped), scoped.in_order(layers, [before[i] for i in (2, 0, 1)]):
        assert list(layers) == [before[2], before[0], before[1]] and list(layers._modules) == names
        raise Stopped
    assert list(layers) == before
    with pytest.raises(ValueError), scoped.in_order(layers, before[:2]):
        pass
    assert list(layers) == before


def test_modes_come_back():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[0].eval()
    with pytest.raises(Stopped), scoped.evaluating(model):
        assert not any(part.training for part in model.modules())
        raise Stopped
    assert [part.training for part in model.modules()] == [True, False, True]


def test_parameters_come_back_on_failure_alone():
    layer = nn.Linear(1, 1)
    value = layer.weight.detach().clone()
    for fails in (False, True):
        try:
            with scoped.unchanged_on_failure(layer):
                layer.weight.data.add_(1)
                if fails:
                    raise Stopped
        except Stopped:
            assert torch.equal(layer.weight, value + 1)
    assert torch.equal(layer.weight, value + 1)


def test_hooks_are_paused():
    tensor, seen = torch.ones(1, requires_grad=True), []
    tensor.register_hook(lambda gradient: seen.append(1))
    with scoped.hooks_paused([tensor]):
        torch.autograd.grad(tensor * 2, tensor)
    assert not seen
    torch.autograd.grad(tensor * 2, tensor)
    assert seen == [1]
