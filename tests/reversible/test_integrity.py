"""Nothing trains on wrong gradients in silence: every cause is found, and named where it can be."""

import math

import pytest
import torch

from r3mem_fast import IntegrityError, MomentumCoupling, check_integrity, check_inverse, make_reversible
from r3mem_fast.reversible.convert import stack_of
from tests.reversible.tiny import build, token_ids, train_step


def make_noisy(model, layer=2):
    """A branch that never gives the same value twice, and hides it from the saved random state."""
    generator = torch.Generator().manual_seed(0)

    def add_noise(module, inputs, output):
        return output + 0.01 * torch.randn(output.shape, generator=generator)

    model.model.layers[layer].mlp.register_forward_hook(add_noise)


def make_nan(model):
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] = math.nan


def make_huge(model):
    """|x| > 5e5 in the plain network, past the ±131072 of 16 fraction bits."""
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1e9)
    with torch.no_grad():
        states = model.model(token_ids(), output_hidden_states=True).hidden_states
    assert max(state.abs().max() for state in states[:-1]) > 5e5


def test_nondeterministic_branch_raises():
    model = make_reversible(build())
    make_noisy(model)
    with pytest.raises(IntegrityError, match="not deterministic"):
        train_step(model, token_ids())


def test_nondeterministic_branch_is_named_by_check_inverse():
    model = make_reversible(build())
    make_noisy(model, layer=2)
    report = check_inverse(model, token_ids())
    assert not report.exact and report.first_inexact_layer == 2
    assert report.layer_errors[3] == 0.0 and report.max_abs_error > 0
    assert "NOT exact: layer 2" in str(report)


def test_nan_weight_raises():
    model = build()
    make_nan(model)
    with pytest.raises(IntegrityError, match="NaN or an infinity"):
        train_step(make_reversible(model), token_ids())


def test_nan_weight_raises_in_inference_too():
    model = build()
    make_nan(model)
    with torch.no_grad(), pytest.raises(IntegrityError, match="NaN or an infinity"):
        make_reversible(model)(token_ids())


@pytest.mark.parametrize("gradients_on", [True, False])
def test_leaving_the_range_raises(gradients_on):
    model = build()
    make_huge(model)
    make_reversible(model)
    with torch.set_grad_enabled(gradients_on), pytest.raises(IntegrityError, match=r"range of ±131072.*'auto'"):
        model(token_ids())


@pytest.mark.parametrize("bits", [1, 4])
def test_auto_fraction_bits_hold_the_same_model(bits):
    """The remedy that the message names works: |x| > 5e5 trains with the fraction bits that "auto" chooses."""
    model = build()
    make_huge(model)
    make_reversible(model, MomentumCoupling(bits=bits, fraction_bits="auto"))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    train_step(model, token_ids())
    assert torch.equal(torch.get_rng_state(), before)
    # 5e5 < |x| < 2**22 or so: 31 - 2 bits of headroom - 20..22.
    assert stack_of(model).fraction_bits in range(6, 10)
    assert check_inverse(model, token_ids()).exact
    assert check_inverse(model, token_ids()).max_abs_position > 5e5


def test_auto_fraction_bits_refuse_what_is_not_finite():
    model = build()
    make_nan(model)
    make_reversible(model, MomentumCoupling(fraction_bits="auto"))
    with pytest.raises(IntegrityError, match="not finite"):
        model(token_ids())


def test_parameter_changed_in_place_between_the_passes_is_named():
    model = make_reversible(build())
    loss = model(input_ids=token_ids(), labels=token_ids()).loss
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.add_(1.0)
    with pytest.raises(RuntimeError, match=r"'mlp.up_proj.weight' of a LlamaDecoderLayer was modified in place"):
        loss.backward()


def test_optimizer_step_between_the_passes_raises():
    model = make_reversible(build())
    optimizer = torch.optim.SGD(model.model.layers.parameters(), lr=0.1)
    first = model(input_ids=token_ids(), labels=token_ids()).loss
    second = model(input_ids=token_ids(), labels=token_ids()).loss
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified in place between"):
        second.backward()


def test_parameter_changed_behind_autograds_back_raises():
    """`.data` leaves no trace in the version; the checksum finds it."""
    model = make_reversible(build(scale=2.0))
    loss = model(input_ids=token_ids(), labels=token_ids()).loss
    model.model.layers[2].mlp.up_proj.weight.data = torch.randn(48, 32)
    with pytest.raises(IntegrityError, match=r"changed through \.data"):
        loss.backward()


@pytest.mark.parametrize("spoil", [make_nan, make_huge])
def test_without_synchronising_outputs_and_gradients_are_nan(spoil):
    """integrity="nan", what a GPU does: nothing raises, everything is NaN, until check_integrity raises, once."""
    model = build()
    spoil(model)
    make_reversible(model, integrity="nan")
    loss = model(input_ids=token_ids(), labels=token_ids()).loss
    assert loss.isnan()
    loss.backward()
    for layer in model.model.layers:
        assert layer.self_attn.q_proj.weight.grad.isnan().all()
    with pytest.raises(IntegrityError):
        check_integrity(model)
    check_integrity(model)


def test_without_synchronising_a_checksum_mismatch_turns_gradients_into_nan():
    model = make_reversible(build(), integrity="nan")
    make_noisy(model)
    loss, found = train_step(model, token_ids())
    assert math.isfinite(loss)
    assert found["model.embed_tokens.weight"].isnan().any()
    assert all(g.isnan().all() for name, g in found.items() if ".layers.0." in name)
    with pytest.raises(IntegrityError, match="not deterministic"):
        check_integrity(model)


def test_a_sound_model_passes():
    model = make_reversible(build(), integrity="nan")
    train_step(model, token_ids())
    check_integrity(model)


def test_deterministic_dropout_and_lost_random_state_differ():
    """Dropout is reproduced; a branch with a generator of its own is not, and is found."""
    model = make_reversible(build(attention_dropout=0.5))
    train_step(model, token_ids())
    make_noisy(model, layer=0)
    with pytest.raises(IntegrityError):
        train_step(model, token_ids())


def test_raise_means_at_once_and_names_the_layer():
    model = make_reversible(build(), integrity="raise")
    loss = model(input_ids=token_ids(), labels=token_ids()).loss
    model.model.layers[2].mlp.up_proj.weight.data.mul_(1.5)
    with pytest.raises(IntegrityError, match=r"layer 2 \(LlamaDecoderLayer\): the backward pass did not find"):
        loss.backward()
    assert all(p.grad is None for layer in model.model.layers[:3] for p in layer.parameters())


def test_pending_flags_stay_in_one_place():
    """What a CUDA graph needs, which goes on writing where it wrote when captured: checks clear, never replace."""
    model = make_reversible(build(), integrity="nan")
    with torch.inference_mode():  # an inference tensor could not be updated later
        model(token_ids())
    train_step(model, token_ids())
    pending = stack_of(model).integrity._pending[torch.device("cpu")]
    check_integrity(model)
    train_step(model, token_ids())
    assert stack_of(model).integrity._pending[torch.device("cpu")] is pending
    pending[0] = 1  # as a replay would
    with pytest.raises(IntegrityError, match="NaN or an infinity"):
        check_integrity(model)
    check_integrity(model)
    assert not pending.any()
