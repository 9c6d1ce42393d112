"""Ways to wrong or missing gradients that a checksum of values alone would not see: right, or a clear error."""

import copy
import math
import pickle

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from torch.autograd import forward_ad
from transformers import DynamicCache

from r3mem_fast import (
    IntegrityError,
    MomentumCoupling,
    check_gradients,
    check_integrity,
    check_inverse,
    make_reversible,
    restore,
)
from r3mem_fast.reversible.convert import stack_of
from tests.reversible.tiny import (
    assert_gradients_as_stored,
    build,
    gradients,
    stored_activations,
    token_ids,
    train_step,
)


def loss_of(model):
    return model(input_ids=token_ids(), labels=token_ids()).loss


@pytest.mark.parametrize("frozen", [False, True])
def test_a_trainable_tensor_from_outside_the_layer(frozen):
    model = make_reversible(build()).requires_grad_(not frozen)
    steering = torch.zeros(32, requires_grad=True)
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output + steering)
    with pytest.raises(ValueError, match=r"requires a gradient enters a .*from outside"):
        loss_of(model)


def test_two_backward_calls_on_one_graph_share_no_gradient():
    """First the top layer alone, as GradNorm does, then another loss of a lower hidden state."""
    model = make_reversible(build(scale=2.0))

    def step():
        output = model(input_ids=token_ids(), labels=token_ids(), output_hidden_states=True)
        torch.autograd.grad(output.loss, list(model.model.layers[3].parameters()), retain_graph=True)
        output.hidden_states[2].square().mean().backward()
        result = gradients(model)
        model.zero_grad()
        return result

    actual = step()
    with stored_activations(model):
        expected = step()
    for name in expected:
        if ".layers." in name:
            torch.testing.assert_close(actual[name], expected[name])


def test_a_partial_backward_pass_is_verified():
    """It never reaches the first layer; each branch is compared with its first evaluation on the way."""
    model = make_reversible(build(scale=2.0))
    loss = loss_of(model)
    model.model.layers[2].mlp.up_proj.weight.data.mul_(2.0)
    with pytest.raises(IntegrityError, match=r"layer 2 \(LlamaDecoderLayer\): the backward pass did not find again"):
        loss.backward(inputs=[model.model.layers[1].mlp.up_proj.weight])


def test_a_mismatch_poisons_every_layer_from_there_on():
    model = make_reversible(build(scale=2.0), integrity="nan")
    loss = loss_of(model)
    model.model.layers[2].mlp.up_proj.weight.data.mul_(3.0)
    loss.backward()
    found = gradients(model)
    assert found["model.layers.3.mlp.up_proj.weight"].isfinite().all()
    for layer in range(3):
        assert found[f"model.layers.{layer}.mlp.up_proj.weight"].isnan().all()
    with pytest.raises(IntegrityError):
        check_integrity(model)


def test_a_hidden_state_detached_between_layers():
    model = make_reversible(build())
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(RuntimeError, match="layer 2"):
        model(token_ids())


def test_functional_call_with_equal_values():
    model = make_reversible(build())
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    inputs = {"input_ids": token_ids(), "labels": token_ids()}
    loss = torch.func.functional_call(model, parameters, (), inputs).loss
    with pytest.raises(RuntimeError, match="With functional_call, run backward inside"):
        loss.backward()


@pytest.mark.parametrize("change", ["eval", "adapter", "frozen"])
def test_settings_changed_between_the_passes(change):
    """With LoRA's B = 0 none of them changes a value, only gradients."""
    model = make_reversible(build(scale=2.0))
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5)
    model = get_peft_model(model, config, adapter_name="a")
    model.add_adapter("b", config)
    model.train()
    loss = loss_of(model)
    if change == "eval":
        model.eval()
    elif change == "adapter":
        model.set_adapter("b")
    else:
        model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="is not set as it was in the forward pass"):
        loss.backward()


def test_hooks_that_come_and_go_between_the_passes():
    """Around a layer they are no matter; inside one, what they did is missing from the second evaluation."""
    model = make_reversible(build())
    handle = model.model.layers[2].register_forward_hook(lambda module, inputs, output: None)
    loss = loss_of(model)
    handle.remove()
    loss.backward()
    handle = model.model.layers[2].mlp.register_forward_hook(lambda module, inputs, output: None)
    loss = loss_of(model)
    handle.remove()
    with pytest.raises(RuntimeError, match="or a hook changed"):
        loss.backward()


def test_a_tensor_captured_inside_a_layer():
    model = make_reversible(build())
    captured = []
    norm = model.model.layers[2].input_layernorm
    handle = norm.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0]))
    output = model(token_ids())
    handle.remove()
    with pytest.raises(RuntimeError, match="captured inside a reversible layer"):
        (captured[0].square().mean() + output.logits.mean()).backward()


def test_check_inverse_raises_for_what_it_cannot_certify():
    model = make_reversible(build(), integrity="nan")
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] = math.nan
    with pytest.raises(IntegrityError, match="NaN"):
        check_inverse(model, token_ids())


def test_check_gradients_sees_a_nan():
    model = make_reversible(build())
    weight, calls = model.model.layers[2].mlp.up_proj.weight, []
    weight.register_hook(lambda gradient: calls.append(1) or (gradient * math.nan if len(calls) == 1 else gradient))
    report = check_gradients(model, token_ids())
    assert report.max_relative_error == math.inf and "layers.2.mlp.up_proj" in report.worst_parameter


def test_fewer_layers_than_were_converted():
    """The layer list was cut afterwards: flags are still seen, and nothing stays behind."""
    model = make_reversible(build()).eval()
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    with torch.no_grad():
        model(token_ids())
        assert stack_of(model)._relay._streams is None
        model.model.layers[0].mlp.down_proj.weight.data[3] = math.nan
        with pytest.raises(IntegrityError, match="NaN"):
            model(token_ids())


def test_upper_layers_without_gradients():
    """A loss below them cannot be reached through them, which is said."""
    model = make_reversible(build())
    inner = model.model.layers[2].forward

    def without_gradients(*args, **kwargs):
        with torch.no_grad():
            return inner(*args, **kwargs)

    model.model.layers[2].forward = without_gradients
    model.model.layers[3].requires_grad_(False)
    states = model(token_ids(), output_hidden_states=True).hidden_states
    with pytest.raises(RuntimeError, match=r"layer [23] ran without gradients after layers that had them"):
        states[2].square().mean().backward()


def test_restoring_a_copy_leaves_the_original():
    model = make_reversible(build())
    restore(copy.deepcopy(model))
    assert model(token_ids()).past_key_values is None  # the original's hook is there
    assert_gradients_as_stored(model, token_ids())


def test_auto_fraction_bits_with_a_cache_and_a_mask():
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = make_reversible(get_peft_model(build(), config), MomentumCoupling(fraction_bits="auto"))
    ids = token_ids()
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    assert stack_of(model).fraction_bits == 24


def test_forward_mode_and_data_parallel_replicas_are_refused():
    model = make_reversible(build())
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        model(token_ids())
    model.model.layers[0]._is_replica = True
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        model(token_ids())


def test_pickling_says_what_to_do():
    model = make_reversible(build())
    with pytest.raises(TypeError, match="restore"):
        pickle.dumps(model)
    pickle.loads(pickle.dumps(restore(model)))


def test_a_frozen_model_takes_any_cache():
    from transformers import StaticCache

    model = make_reversible(build()).requires_grad_(False).eval()
    cache = StaticCache(config=model.config, max_cache_len=32)
    expected = model(token_ids(), past_key_values=DynamicCache()).logits
    torch.testing.assert_close(model(token_ids(), past_key_values=cache).logits, expected, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_compiled_model():
    """torch.compile breaks the graph at the layers and leaves them as they are."""
    model = make_reversible(build(scale=2.0))
    _, expected = train_step(model, token_ids())
    compiled = torch.compile(model, backend="eager")
    compiled(input_ids=token_ids(), labels=token_ids()).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


class _OwnLoRA(nn.Module):
    """LoRA that somebody wrote, with PEFT's names for its parts."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)

    def forward(self, hidden):
        return self.base(hidden) + self.lora_B(self.lora_A(hidden))


def test_adapters_that_are_not_pefts():
    model = build().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = _OwnLoRA(layer.self_attn.q_proj)
    make_reversible(model)
    assert_gradients_as_stored(model, token_ids())
    assert check_inverse(model, token_ids()).exact


def test_check_inverse_of_side_bits_in_host_memory():
    reports = [check_inverse(make_reversible(build(), offload_side_bits=on), token_ids()) for on in (False, True)]
    assert reports[0] == reports[1] and reports[1].side_bytes > 0
