"""Every coupling is exact, computes its formula in a real network, and has the gradients of stored activations."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from r3mem_fast import (
    AdaptedCoupling,
    AdditiveCoupling,
    BDIACoupling,
    MomentumCoupling,
    ScaledCoupling,
    check_gradients,
    check_inverse,
    make_reversible,
    reading_backward,
    restore,
)
from r3mem_fast.reversible.convert import stack_of
from r3mem_fast.reversible.coupling import balanced_gains
from tests.reversible.tiny import build, token_ids, train_step

COUPLINGS = [
    BDIACoupling(bits=2),
    AdditiveCoupling(),
    ScaledCoupling(bits=4),
    ScaledCoupling(bits=2, rank=4),
    AdaptedCoupling(bits=2, rank=4),
]
GRIDLESS = 2e-3  # of hidden states on a grid of 2**-14


def name_of(coupling):
    return type(coupling).__name__ + ("-adapter" if getattr(coupling, "rank", None) else "")


def reversible(coupling, family="llama", dtype=torch.float32):
    """A reversible model whose adapters, if there are any, do something."""
    model = make_reversible(build(family, dtype, scale=2.0), coupling)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "reversible_adapter.up" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.filterwarnings("ignore:.*no exact branch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("coupling", COUPLINGS, ids=name_of)
def test_exact_with_the_gradients_of_stored_activations(coupling, family, dtype):
    model = reversible(coupling, family, dtype)
    assert check_inverse(model, token_ids()).exact
    report = check_gradients(model, token_ids())
    assert report.loss == report.loss_stored
    assert report.max_relative_error <= 8 * torch.finfo(dtype).eps


def hidden_states(model, ids):
    """Positions before every layer, float64, and every layer's branch at its position, from the plain network."""
    with torch.no_grad():
        positions = [h.double() for h in model(ids, output_hidden_states=True).hidden_states[:-1]]
    plain = restore(copy.deepcopy(model))
    base = plain.model
    embeddings = base.rotary_emb(positions[0].float(), torch.arange(ids.shape[1])[None])
    mask = torch.full((1, 1, ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
    with torch.no_grad():
        branches = [
            layer(x.float(), position_embeddings=embeddings, attention_mask=mask).double() - x
            for layer, x in zip(base.layers, positions, strict=True)
        ]
    return positions, branches


@pytest.mark.filterwarnings("ignore:the adapters of the coupling are taken off")
@pytest.mark.parametrize("coupling", COUPLINGS, ids=name_of)
def test_the_network_is_the_formula(coupling):
    """The positions of a real pass obey the coupling's equation in floats, with the plain layers' branches."""
    model, ids = reversible(coupling), token_ids()
    x, f = hidden_states(model, ids)
    adapters = [getattr(layer, "reversible_adapter", None) for layer in model.model.layers]

    def adapted(index, value):
        return 0.0 if adapters[index] is None else adapters[index](value.float()).detach().double()

    velocity, second = torch.zeros_like(x[0]), x[0] if isinstance(coupling, AdditiveCoupling) else 0.0 * x[0]
    signs = []
    for index in range(len(x) - 1):
        if isinstance(coupling, (AdditiveCoupling, ScaledCoupling)):
            scale, residual = (1.0, 0.0) if isinstance(coupling, AdditiveCoupling) else (2.0**-coupling.bits, 1.0)
            expected = scale * second + residual * x[index] + f[index]
            second = x[index] + adapted(index, x[index + 1])
        else:
            m = 0.0 if index == 0 else 2.0**-coupling.bits
            if isinstance(coupling, BDIACoupling):  # whichever sign it was, row by row
                choices = [s * m * velocity + (1 - s * m) * f[index] for s in (1, -1)]
                errors = [(x[index] + c - x[index + 1]).abs().amax((1, 2)) for c in choices]
                signs += (errors[0] < errors[1]).tolist() if index else []
                velocity = torch.where((errors[0] < errors[1])[:, None, None], *choices)
            else:
                velocity = m * velocity + (1 - m) * f[index]
            expected = x[index] + velocity + adapted(index, velocity)
        assert (x[index + 1] - expected).abs().max() < GRIDLESS
    if isinstance(coupling, BDIACoupling):
        assert len(set(signs)) == 2  # both were drawn


def test_bdia_is_the_plain_network_in_evaluation():
    base, ids = build(scale=2.0).eval(), token_ids()
    with torch.no_grad():
        expected = base(ids).logits
        model = make_reversible(base, BDIACoupling(bits=1))
        assert (model(ids).logits - expected).abs().max() < GRIDLESS
        assert (model.train()(ids).logits - expected).abs().max() > 0.1
    with pytest.raises(ValueError, match=r"BDIACoupling: in evaluation.*has no inverse"):
        model.eval()(ids, labels=ids)


def test_adapters_change_nothing_at_first_and_learn():
    """An adapter begins as the momentum network; with a frozen base it alone gets gradients, and lowers the loss."""
    ids = token_ids()
    with torch.no_grad():
        expected = make_reversible(build(scale=2.0), MomentumCoupling(bits=2))(ids).logits
    model = make_reversible(build(scale=2.0).requires_grad_(False), AdaptedCoupling(bits=2, rank=4))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    _, found = train_step(model, ids)
    assert found and all("reversible_adapter" in name for name in found)
    assert losses[-1] < losses[0] - 0.05
    assert check_inverse(model, ids).exact
    with pytest.warns(UserWarning, match="adapters of the coupling are taken off"):
        restore(model)
    assert not any("reversible_adapter" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("coupling", COUPLINGS, ids=name_of)
def test_lora_and_side_bits(coupling):
    """LoRA on a frozen base; side bits as small as they are said to be."""
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = make_reversible(get_peft_model(build(scale=2.0), config), coupling)
    gradients = check_gradients(model, token_ids())
    assert gradients.max_relative_error <= 1e-6 and gradients.loss == gradients.loss_stored
    report = check_inverse(model, token_ids())
    bits = coupling.bits_of_layers(4)
    elements = token_ids().numel() * 32
    first = 1 if isinstance(coupling, (BDIACoupling, AdaptedCoupling)) else 0
    assert report.side_bytes == sum(elements * b // 8 for b in bits[first:])


def test_wrong_settings():
    for wrong in (lambda: BDIACoupling(bits=3), lambda: ScaledCoupling(bits=16), lambda: AdaptedCoupling(rank=0)):
        with pytest.raises(ValueError, match="must be"):
            wrong()
    with pytest.raises(TypeError, match="must be a Coupling"):
        make_reversible(build(), {"bits": 4})
    model = make_reversible(build(), AdditiveCoupling())
    assert stack_of(model).bits == [0] * 4


@pytest.mark.parametrize(
    "coupling",
    [MomentumCoupling(balanced=True), AdaptedCoupling(), BDIACoupling(), AdditiveCoupling(), ScaledCoupling()],
    ids=lambda coupling: type(coupling).__name__,
)
def test_only_momentum_that_is_not_balanced_is_read_backward(coupling):
    model = make_reversible(build(), coupling)
    with pytest.raises(
        ValueError, match="only a model with a MomentumCoupling that is not balanced can be read backw"
    ):
        reading_backward(model).__enter__()


@given(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=12))
def test_balanced_gains_add_every_branch_once(bits):
    """In a network whose branches are constants, the output is the input and the sum of all branches."""
    gains = balanced_gains([None, *bits])
    branches = [float(index + 1) for index in range(len(gains))]
    position = velocity = 0.0
    for own, gain, branch in zip([None, *bits], gains, branches, strict=True):
        velocity = (0.0 if own is None else velocity * 2.0**-own) + gain * branch
        position += velocity
    assert position == pytest.approx(sum(branches), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_balanced_coupling_is_exact_and_nearer_to_the_plain_network(dtype):
    ids, bits = token_ids(), [2, 1, 4, 2]
    plain = build(dtype=dtype).eval()
    with torch.no_grad():
        expected = plain(ids).logits.float()
    distances = []
    for balanced in (False, True):
        model = make_reversible(build(dtype=dtype), MomentumCoupling(bits=bits, balanced=balanced))
        assert check_inverse(model, ids).exact
        assert check_gradients(model, ids).max_relative_error == 0.0
        with torch.no_grad():
            distances.append((model(ids).logits.float() - expected).norm().item())
    assert distances[1] < 0.8 * distances[0]


@pytest.mark.parametrize("coupling", [AdaptedCoupling(bits=2, rank=4), ScaledCoupling(bits=2, rank=4)], ids=name_of)
def test_a_copy_computes_with_adapters_of_its_own(coupling):
    model, ids = reversible(coupling), token_ids()
    clone = copy.deepcopy(model)
    with torch.no_grad():
        expected = clone(ids).logits
        for layer in model.model.layers:
            layer.reversible_adapter.up.weight.mul_(3.0)
        assert torch.equal(clone(ids).logits, expected)
        assert not torch.equal(model(ids).logits, expected)
    _, found = train_step(clone, ids)
    assert any("reversible_adapter" in name for name in found)


def test_settings_are_given_by_name():
    with pytest.raises(TypeError):
        MomentumCoupling(4, 16)
