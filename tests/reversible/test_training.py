"""A reversible model trains in every way that people train: same gradients, same side effects, no surprises."""

import copy
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, StaticCache

from r3mem_fast import MomentumCoupling, check_gradients, check_inverse, make_reversible
from r3mem_fast.reversible.convert import stack_of
from r3mem_fast.tiny_models import tiny_model
from tests.reversible.tiny import (
    assert_gradients_as_stored,
    assert_same_gradients,
    build,
    gradients,
    stored_activations,
    token_ids,
    train_step,
)

LORA = {
    "llama": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False),
    "gpt2": LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, init_lora_weights=False),
}


def evaluations(model):
    """Counts the calls of every layer's attention, in the order of the layers."""
    counts = [0] * len(stack_of(model).bits)
    attentions = [m for m in model.modules() if type(m).__name__.endswith("Attention")]

    def count(index):
        def hook(*_):
            counts[index] += 1

        return hook

    for index, attention in enumerate(attentions):
        attention.register_forward_hook(count(index))
    return counts


@pytest.mark.parametrize("family", LORA)
@pytest.mark.parametrize("order", ["lora first", "reversible first"])
def test_lora_on_a_frozen_base(family, order):
    """Adapters put on before or after give the gradients of stored activations, and only adapters get one."""
    model = build(family, scale=2.0)
    torch.manual_seed(3)
    if order == "lora first":
        model = make_reversible(get_peft_model(model, LORA[family]))
    else:
        model = get_peft_model(make_reversible(model), LORA[family])
    assert_gradients_as_stored(model, token_ids())
    _, found = train_step(model, token_ids())
    assert found and all("lora_" in name for name in found)
    assert check_inverse(model, token_ids()).exact


def test_lora_on_the_upper_layers_keeps_side_bits_from_there_on():
    """Layers below the first trainable one are never reversed: they keep nothing, and are evaluated once."""
    model = make_reversible(build(scale=2.0))
    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(r=4, layers_to_transform=[2, 3], init_lora_weights=False))
    assert_gradients_as_stored(model, token_ids())
    counts = evaluations(model)
    train_step(model, token_ids())
    assert counts == [1, 1, 2, 2]


def test_two_branch_evaluations_a_step_also_with_gradient_checkpointing_asked_for():
    model = make_reversible(build())
    counts = evaluations(model)
    with pytest.warns(UserWarning, match="gradient checkpointing is turned off") as notices:
        model.gradient_checkpointing_enable()
    assert [str(n.message) for n in notices].count(str(notices[-1].message)) == 1
    assert not model.is_gradient_checkpointing
    train_step(model, token_ids())
    assert counts == [2] * 4


def test_gradient_checkpointing_that_was_on_before_is_turned_off():
    model = build()
    model.gradient_checkpointing_enable()
    with pytest.warns(UserWarning, match="gradient checkpointing is turned off"):
        make_reversible(model)
    counts = evaluations(model)
    train_step(model, token_ids())
    assert counts == [2] * 4


def test_gradient_accumulation():
    """Two half batches add up to the whole one."""
    model = make_reversible(build(scale=2.0))
    ids = token_ids(4)
    _, whole = train_step(model, ids)
    for half in ids.chunk(2):
        (model(input_ids=half, labels=half).loss / 2).backward()
    assert_same_gradients(gradients(model), whole, 1e-5)


def test_several_passes_in_flight():
    """Two forward passes before their backward passes, in either order, and one that is dropped."""
    model = make_reversible(build(scale=2.0))
    first, second = token_ids(seed=1), token_ids(2, 11, seed=2)
    expected = [train_step(model, ids)[1] for ids in (first, second)]
    losses = [model(input_ids=ids, labels=ids).loss for ids in (first, second)]
    model(input_ids=first)
    for loss, wanted in zip(losses, expected, strict=True):
        loss.backward()
        assert_same_gradients(gradients(model), wanted)
        model.zero_grad()
    (model(input_ids=first, labels=first).loss + model(input_ids=second, labels=second).loss).backward()
    sums = {name: expected[0][name] + expected[1][name] for name in expected[0]}
    assert_same_gradients(gradients(model), sums, 1e-6)


def test_autograd_grad_of_inputs_and_of_some_parameters():
    model = make_reversible(build(scale=2.0))
    embeddings = torch.randn(2, 9, 32, requires_grad=True)
    chosen = [embeddings, model.model.layers[2].mlp.up_proj.weight]

    def computed():
        return torch.autograd.grad(model(inputs_embeds=embeddings).logits.square().mean(), chosen)

    with stored_activations(model):
        expected = computed()
    for actual, wanted in zip(computed(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-8)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_the_same_network_runs(mode, dtype):
    """Evaluation computes the network that was trained, bit for bit, and keeps no state."""
    model = make_reversible(build(dtype=dtype, scale=2.0)).eval()
    trained = model(token_ids()).logits.detach()
    with mode():
        assert torch.equal(model(token_ids()).logits, trained)
    assert stack_of(model)._relay._streams is None


def test_frozen_model_with_gradients_on_is_inference():
    model = make_reversible(build()).requires_grad_(False)
    assert not model(token_ids()).logits.requires_grad


def test_eval_mode_with_gradients_on():
    assert_gradients_as_stored(make_reversible(build(scale=2.0)).eval(), token_ids())


def test_output_that_misses_the_loss():
    """A loss of an intermediate hidden state: the layers above it are undone on the way, without gradients."""
    model = make_reversible(build(scale=2.0))

    def computed(levels):
        states = model(token_ids(), output_hidden_states=True).hidden_states
        sum((level + 1) * states[level].square().mean() for level in levels).backward()
        result = gradients(model)
        model.zero_grad()
        return result

    for levels in ([2], [1, 3], [0, 2, 4]):
        actual = computed(levels)
        with stored_activations(model):
            assert_same_gradients(actual, computed(levels), 1e-5)  # the losses' gradients add in another order


def test_output_hidden_states_are_the_streams():
    model = make_reversible(build(scale=2.0))
    with torch.no_grad():
        states = model(token_ids(), output_hidden_states=True).hidden_states
    trained = model(token_ids(), output_hidden_states=True).hidden_states
    assert len(states) == 5
    for evaluated, kept in zip(states, trained, strict=True):
        assert torch.equal(evaluated, kept)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast(weights, autocast):
    """The recomputation runs under the forward pass's autocast, and leaves the caller's as it was."""
    model = make_reversible(build(dtype=weights, scale=2.0))
    with torch.autocast("cpu", dtype=autocast):
        report = check_inverse(model, token_ids())
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
    assert report.exact
    loss.backward()
    assert not torch.is_autocast_enabled("cpu")
    actual = gradients(model)
    model.zero_grad()
    with stored_activations(model):
        with torch.autocast("cpu", dtype=autocast):
            loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
    assert_same_gradients(actual, gradients(model))
    with torch.autocast("cpu", dtype=autocast):  # backward inside the region too
        model.zero_grad()
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert_same_gradients(gradients(model), actual)
    # Also where the first pass looks at hidden states before, without a gradient.
    fresh = make_reversible(build(dtype=weights, scale=2.0), MomentumCoupling(fraction_bits="auto"))
    with torch.autocast("cpu", dtype=autocast):
        fresh(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert gradients(fresh).keys() == actual.keys()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropout(family):
    """The recomputation draws the forward pass's masks, and the caller's random state goes on as without it."""
    settings = {"attention_dropout": 0.3} if family == "llama" else {"resid_pdrop": 0.3, "attn_pdrop": 0.2}
    model = make_reversible(build(family, scale=2.0, **settings))
    assert check_inverse(model, token_ids()).exact

    def step():
        torch.manual_seed(5)
        result = train_step(model, token_ids())
        return (*result, torch.rand(3))

    loss, actual, drawn = step()
    with stored_activations(model):
        loss_stored, expected, drawn_stored = step()
    assert loss == loss_stored
    assert torch.equal(drawn, drawn_stored)
    assert_same_gradients(actual, expected)
    assert step()[0] == loss != train_step(model, token_ids())[0]


def test_random_state_is_kept_only_where_a_branch_draws():
    from r3mem_fast.reversible.surroundings import Surroundings

    with Surroundings(torch.device("cpu")).recorded() as silent:
        torch.ones(3) * 2
    with Surroundings(torch.device("cpu")).recorded() as drawing:
        torch.rand(3)
    assert silent._random is None and drawing._random is not None


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt2"])
def test_left_padding(family):
    """A left-padded batch: exact, gradients as stored, and the rows' logits are those of the row alone."""
    # A fine grid: a sum that another row length rounds differently moves a stream by one step.
    model = make_reversible(build(family, scale=2.0), MomentumCoupling(fraction_bits=24)).eval()
    ids, mask = token_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    ids[0, :5], mask[0, :5] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels = ids.masked_fill(mask == 0, -100)
    inputs = {"attention_mask": mask, "position_ids": positions}
    assert check_inverse(model, ids, **inputs).exact
    assert check_gradients(model, ids, labels=labels, **inputs).max_relative_error < 1e-5
    with torch.no_grad():
        padded = model(ids, **inputs).logits[0, 5:]
        alone = model(ids[:1, 5:]).logits[0]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


def test_use_cache_in_training_makes_no_cache():
    """No cache that nobody asked for; gradients are those without one. The default of a config is silent."""
    model = make_reversible(build(scale=2.0))
    loss, expected = train_step(model, token_ids(), use_cache=False)
    assert model.config.use_cache
    assert model(token_ids()).past_key_values is None
    with pytest.warns(UserWarning, match="use_cache=True while training"):
        assert train_step(model, token_ids(), use_cache=True)[0] == loss
    assert_same_gradients(train_step(model, token_ids())[1], expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_a_cache_that_was_passed_is_filled_once_and_differentiable(family):
    """Two segments through one cache: gradients flow through the cached keys and values, exactly as stored."""
    model = make_reversible(build(family, scale=2.0))
    ids = token_ids(2, 14)

    def step():
        cache = DynamicCache(config=model.config)
        model(ids[:, :8], past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 8
        logits = model(ids[:, 8:], past_key_values=cache, use_cache=True).logits
        assert cache.get_seq_length() == 14
        logits.square().mean().backward()
        assert cache.get_seq_length() == 14
        result = gradients(model)
        model.zero_grad()
        return logits.detach(), result

    logits, actual = step()
    with stored_activations(model):
        logits_stored, expected = step()
    torch.testing.assert_close(logits, logits_stored, rtol=0, atol=1e-5)
    assert_same_gradients(actual, expected)


def test_queries_that_are_scaled_by_the_tokens_before_them():
    """Llama 4's layers without rotary positions ask the cache how many tokens it has."""
    model = tiny_model("llama4_text")
    for layer in model.model.layers:
        layer.self_attn.floor_scale, layer.self_attn.attn_scale = 2.0, 0.9
    make_reversible(model)
    ids = token_ids(2, 14)
    whole, cache = model(ids).logits, DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([8, 6], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
    found = torch.autograd.grad(torch.cat(parts, 1).square().mean(), list(model.parameters()), allow_unused=True)
    expected = torch.autograd.grad(whole.square().mean(), list(model.parameters()), allow_unused=True)
    for mine, its in zip(found, expected, strict=True):
        assert (mine is None) == (its is None)
        assert mine is None or (mine - its).norm() <= 1e-3 * its.norm()


def test_a_prefix_that_requires_grad_is_honoured():
    """Prefix tuning: trainable keys and values in the cache get the gradients of stored activations."""
    model = make_reversible(build(scale=2.0)).requires_grad_(False)
    torch.manual_seed(4)
    prefix = [torch.randn(2, 2, 3, 8, requires_grad=True) for _ in range(8)]

    def step():
        cache = DynamicCache()
        for layer in range(4):
            cache.update(prefix[2 * layer], prefix[2 * layer + 1], layer)
        loss = model(token_ids(), past_key_values=cache).logits.square().mean()
        return torch.autograd.grad(loss, prefix)

    actual = step()
    with stored_activations(model):
        for computed, expected in zip(actual, step(), strict=True):
            torch.testing.assert_close(computed, expected, rtol=1e-5, atol=1e-9)


def test_other_caches_raise_while_gradients_are_on():
    model = make_reversible(build())
    cache = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(TypeError, match="a DynamicCache only, not a StaticCache"):
        model(token_ids(), past_key_values=cache)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt2"])
def test_generate_with_and_without_a_cache(family):
    """Incremental decoding gives the tokens of full recomputation, for a left-padded batch, greedy and beams."""
    model = make_reversible(build(family, scale=3.0)).eval()
    ids, mask = token_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    ids[0, :2], mask[0, :2] = 0, 0
    for beams in (1, 2):
        options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": beams}
        options |= {"pad_token_id": 0, "eos_token_id": None}
        cached = model.generate(ids, use_cache=True, **options)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
        assert cached.shape == (2, 14)


def test_parameter_hooks_fire_once():
    """A hook on a parameter sees the delivered gradient, not the inner one too."""
    model = make_reversible(build())
    _, expected = train_step(model, token_ids())
    weight, calls = model.model.layers[1].mlp.up_proj.weight, []
    weight.register_hook(lambda gradient: calls.append(gradient) or gradient * 2)
    _, actual = train_step(model, token_ids())
    assert len(calls) == 1
    name = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(actual[name], 2 * expected[name])


def test_a_trainable_argument_of_the_layers_gets_its_gradient():
    """Any tensor argument that requires grad is an input of the node: here a float attention mask."""
    model = make_reversible(build(scale=2.0, attn_implementation="eager"))
    torch.manual_seed(6)
    bias = torch.randn(2, 1, 17, 17, requires_grad=True)

    def step():
        return torch.autograd.grad(model(token_ids(), attention_mask=bias).logits.square().mean(), bias)[0]

    actual = step()
    with stored_activations(model):
        torch.testing.assert_close(actual, step(), rtol=1e-5, atol=1e-9)
    assert actual.abs().sum() > 0


def test_deepcopy_is_independent():
    model = make_reversible(build(scale=2.0))
    clone = copy.deepcopy(model)
    assert stack_of(clone) is not stack_of(model)
    with torch.no_grad():
        clone.model.layers[0].mlp.up_proj.weight.zero_()
    expected = train_step(model, token_ids())[0]
    assert train_step(clone, token_ids())[0] != expected == train_step(model, token_ids())[0]


def test_nothing_is_kept_after_the_backward_pass():
    """The streams go with the backward pass, even while the loss lives on; and with a dropped output."""
    model = make_reversible(build())
    states = []
    stack = stack_of(model)

    class Watching:
        def begin(self, state):
            states.append(weakref.ref(state))

        def append(self, state):
            pass

    stack.recording = Watching()
    loss = model(input_ids=token_ids(), labels=token_ids()).loss
    loss.backward()
    assert states[0]().position is None
    assert states[0]().passed == [None] * 4
    output = model(token_ids())
    del output
    gc.collect()
    assert states[1]() is None


def test_integer_bits_reach_every_layer_but_the_first():
    model = make_reversible(build(), MomentumCoupling(bits=2))
    assert check_inverse(model, token_ids()).bits == [2] * 4
