"""Every family trains reversibly: exact inverse, gradients of stored activations, one notice where the branch is
generic, the ordinary model back after restore."""

import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from r3mem_fast import MomentumCoupling, check_gradients, check_inverse, make_reversible, restore
from r3mem_fast.reversible import branches
from r3mem_fast.reversible.branches import branch_of, generic_branch, hidden_of
from r3mem_fast.reversible.convert import LayerLink, find_decoder_layers, text_config
from r3mem_fast.reversible.past import layer_index
from r3mem_fast.tiny_models import tiny_model
from tests.reversible.tiny import EXACT_FAMILIES, GENERIC_FAMILIES, assert_gradients_as_stored, build, token_ids

ROOT = Path(__file__).parents[2]


def test_the_example_of_a_new_family(monkeypatch):
    """What CONTRIBUTING.md shows makes OLMo 2's branch exact."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.setattr(branches, "_EXACT", dict(branches._EXACT))
    exec(code, {"_EXACT": branches._EXACT})
    assert_exact_branch("olmo2")


@pytest.mark.parametrize("family", EXACT_FAMILIES)
def test_exact_branch_is_the_layer_minus_its_input(family):
    assert_exact_branch(family)


def assert_exact_branch(family):
    """In float64, where cancellation is no matter, branch(x) + x is what the untouched layer returns."""
    model = build(family, torch.float64, scale=3.0).eval()
    _, layers = find_decoder_layers(model)
    branch = branch_of(type(layers[1]))
    assert branch is not generic_branch
    calls = []
    hook = layers[1].register_forward_hook(lambda m, a, k, out: calls.append((a, k, out)), with_kwargs=True)
    with torch.no_grad():
        model(token_ids(), use_cache=False)
        hook.remove()
        ((hidden, *rest), kwargs, output) = calls[0]
        names = ["past_key_values", "attention_mask", "encoder_hidden_states"]
        value = branch(layers[1], hidden, {**dict(zip(names, rest, strict=False)), **kwargs})
    torch.testing.assert_close(value + hidden, output, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [*EXACT_FAMILIES, *GENERIC_FAMILIES])
def test_inverse_is_exact(family, dtype):
    model = build(family, dtype, scale=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_reversible(model)
    report = check_inverse(model, token_ids())
    assert report.exact and report.layers == 4 and report.first_inexact_layer is None
    assert report.layer_errors == [0.0] * 4


@pytest.mark.parametrize("family", [*EXACT_FAMILIES, *GENERIC_FAMILIES])
def test_gradients_are_those_of_stored_activations(family):
    model = build(family, scale=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_reversible(model)
    assert_gradients_as_stored(model, token_ids())
    report = check_gradients(model, token_ids())
    assert report.max_relative_error < 1e-5 and report.loss == report.loss_stored
    assert all(p.grad is None for p in model.parameters())


@given(
    bits=st.sampled_from([1, 2, 4, 8]),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([0.5, 4.0, 30.0]),
)
@settings(max_examples=25)
def test_inverse_is_exact_for_any_shape(bits, batch, tokens, dtype, scale):
    """One token, odd counts, large branches: always exact, and the report counts the bytes that it must keep."""
    model = make_reversible(build(dtype=dtype, scale=scale), MomentumCoupling(bits=bits))
    report = check_inverse(model, token_ids(batch, tokens))
    assert report.exact
    assert report.stream_bytes == 8 * batch * tokens * 32
    per_layer = -(-batch * tokens * 32 * bits // 128) * 16
    assert report.side_bytes == 3 * per_layer  # the first layer needs none


def test_bits_per_layer():
    model = make_reversible(build(), MomentumCoupling(bits=[8, 4, 2, 1]))
    assert check_inverse(model, token_ids()).exact
    assert_gradients_as_stored(model, token_ids())
    with pytest.raises(ValueError, match="names 2 layers, the model has 4"):
        make_reversible(build(), MomentumCoupling(bits=[4, 4]))


@pytest.mark.parametrize("family", GENERIC_FAMILIES)
def test_generic_branch_gives_one_notice(family):
    with pytest.warns(UserWarning, match="no exact branch is known") as notices:
        make_reversible(build(family))
    assert len(notices) == 1


@pytest.mark.parametrize("family", [*EXACT_FAMILIES, *GENERIC_FAMILIES])
@pytest.mark.filterwarnings("ignore:.*no exact branch")
def test_restore_gives_the_ordinary_model_again(family):
    model = build(family).eval()
    before = [type(module) for module in model.modules()]
    names = list(model.state_dict())
    with torch.no_grad():
        expected = model(token_ids()).logits
        make_reversible(model)
        assert [type(module).__name__ for module in model.modules()] == [kind.__name__ for kind in before]
        assert list(model.state_dict()) == names
        reversible = model(token_ids()).logits
        assert restore(model) is model
        assert [type(module) for module in model.modules()] == before
        assert torch.equal(model(token_ids()).logits, expected)
    assert not torch.equal(reversible, expected)  # it is the momentum network, close to the plain one
    torch.testing.assert_close(reversible, expected, rtol=0, atol=0.1)
    with pytest.raises(ValueError, match="not reversible"):
        restore(model)


def test_a_text_config_inside_another():
    """Models of several modalities keep the language model's depth and positions in a configuration of its own."""
    language = {**EXACT_FAMILIES["llama"], "query_pre_attn_scalar": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CONFIG_MAPPING["gemma3"](
        text_config=language, vision_config={**vision, "image_size": 16, "patch_size": 8}
    )
    model = AutoModelForImageTextToText.from_config(config)
    _, layers = find_decoder_layers(model)
    assert len(layers) == 4 and text_config(model.config).max_position_embeddings == 128


@pytest.mark.parametrize("family", ["bamba", "cpmant", "longcat_flash"])
def test_loops_of_other_kinds(family):
    """A loop unpacks pairs, gives `use_cache` by position, or has two places in the cache for each layer."""
    model = make_reversible(tiny_model(family).train())
    assert check_inverse(model, token_ids().clamp(max=89)).exact
    assert check_gradients(model, token_ids().clamp(max=89)).max_relative_error < 1e-5
    make_reversible(restore(model), MomentumCoupling(fraction_bits="auto"))
    assert check_inverse(model, token_ids().clamp(max=89)).exact


def test_the_place_in_the_cache_has_two_names():
    for family in ("llama", "gpt_neo"):
        _, layers = find_decoder_layers(tiny_model(family))
        assert [layer_index(layer) for layer in layers] == [0, 1, 2, 3]


def test_what_a_loop_unpacks():
    """A tuple keeps its length, and what the layer was given; other items are None, or refused."""
    layer, state, hidden = SimpleNamespace(reversible=LayerLink(None, 0, None)), object(), torch.zeros(1, 2, 4)
    for output, others in (
        (hidden, None),
        ((hidden,), ()),
        ((hidden, None), (None,)),
        ((hidden, state), (state,)),
        ((hidden, torch.zeros(1, 2, 2, 2)), (None,)),
    ):
        assert hidden_of(layer, output, {"given": state}) is hidden and layer.reversible.others == others
    assert hidden_of(layer, (hidden, state), {"state": state}) is hidden and layer.reversible.others == (state,)
    with pytest.raises(TypeError, match="was given a state and returned a new one"):  # xLSTM's layers, with a cache
        hidden_of(layer, (hidden, object()), {"state": state})
    with pytest.raises(TypeError, match="returned more than its hidden state"):
        hidden_of(layer, (hidden, torch.zeros(1, 2, 3)), {})
