"""Adapters in bfloat16 with float32 master weights learn what float32 adapters do, and nothing is rounded away."""

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model

from r3mem_fast import (
    MasterAdamW,
    MomentumCoupling,
    R3MemConfig,
    R3MemModel,
    check_gradients,
    check_inverse,
    make_reversible,
    master_weights,
)
from r3mem_fast.integrations.masters import keep_master_weights, masters_of
from tests.reversible.test_trainer import Letters
from tests.reversible.tiny import build


def adapted(**settings):
    """A tiny reversible model in bfloat16, with float32 adapters whose weights are all far from 0."""
    base = make_reversible(build(scale=2.0).to(torch.bfloat16), MomentumCoupling(bits=4, fraction_bits=14))
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **settings)
    return get_peft_model(base, lora).train()


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def losses_of(model, windows):
    return model(input_ids=windows, labels=windows).loss


def curve(model, optimizer, steps, *, autocast=False):
    windows, generator, losses = Letters(count=256).windows, torch.Generator().manual_seed(0), []
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, steps)
    for _ in range(steps):
        for _ in range(2):  # gradients of two passes are added
            batch = windows[torch.randint(len(windows), (2,), generator=generator)]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = losses_of(model, batch)
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return torch.tensor(losses).view(steps, 2).mean(1)


def test_the_loss_curve_is_that_of_float32_adapters():
    """80 steps at a small rate within 1e-3 nats of them; without masters most of what they learn in a step is lost."""
    settings = {"lr": 1e-4, "weight_decay": 0.01}
    model = adapted()
    expected = curve(model, torch.optim.AdamW(trainable(model), **settings), 80, autocast=True)
    wanted = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    model = adapted()
    found = curve(model, MasterAdamW(trainable(model), **settings), 80)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (found - expected).abs().max() <= 1e-3
    for name, master in masters_of(model).items():
        torch.testing.assert_close(master, wanted[name], atol=2e-4, rtol=0)

    model = adapted()
    for parameter in trainable(model):
        parameter.data = parameter.data.bfloat16()
    before = [parameter.clone() for parameter in trainable(model)]
    control = curve(model, torch.optim.AdamW(trainable(model), **settings), 80)
    moved = torch.cat([(a != b).flatten() for a, b in zip(before, trainable(model), strict=True)])
    assert moved.float().mean() < 0.2
    learned, stalled = (loss[:10].mean() - loss[-10:].mean() for loss in (expected, control))
    assert learned > 0.1 and stalled < 0.6 * learned


def test_gradients_are_added_in_float32():
    """Over uses and passes: 1 + 2^-9 + 2^-9 would be 1 in bfloat16."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = MasterAdamW([parameter])
    assert parameter.dtype == torch.bfloat16
    for weight in (1.0, 2.0**-9):
        loss = parameter * torch.tensor(weight, dtype=torch.bfloat16)
        if weight < 1:
            loss = loss + parameter * torch.tensor(weight, dtype=torch.bfloat16)
        loss.sum().backward()
    assert parameter.grad.dtype == torch.float32 and parameter.grad.tolist() == [1 + 2.0**-8] * 3
    optimizer.zero_grad(set_to_none=False)
    assert parameter.grad.tolist() == [0.0] * 3
    optimizer.zero_grad()
    assert parameter.grad is None


def test_layers_are_reconstructed_exactly():
    model = adapted(lora_dropout=0.1)
    optimizer = MasterAdamW(trainable(model), lr=1e-2)
    windows = Letters().windows
    for step in range(3):
        losses_of(model, windows[2 * step : 2 * step + 2]).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = check_inverse(model, input_ids=windows[:2])
    assert report.exact and report.dtype == "bfloat16"
    gradients = check_gradients(model, input_ids=windows[:2])
    assert gradients.max_relative_error <= 1e-2, gradients


def test_a_change_between_the_passes_is_noticed():
    """A step of the optimizer counts as one: it writes the parameters themselves."""
    model = adapted()
    optimizer = MasterAdamW(trainable(model), lr=1e-2)
    windows = Letters().windows[:2]
    losses_of(model, windows).backward()
    loss = losses_of(model, windows)
    optimizer.step()
    with pytest.raises(RuntimeError, match="was modified in place between the forward and the backward pass"):
        loss.backward()


def test_its_state_goes_on_bit_for_bit():
    """A state in the middle gives what a whole run gives, whatever the model's rounded weights were meanwhile."""
    whole, part = adapted(), adapted()
    gradients = [[torch.randn(p.shape) for p in trainable(whole)] for _ in range(6)]

    def run(model, optimizer, steps):
        for step in steps:
            for parameter, gradient in zip(trainable(model), gradients[step], strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()

    run(whole, MasterAdamW(trainable(whole), lr=1e-3), range(6))
    first = MasterAdamW(trainable(part), lr=1e-3)
    run(part, first, range(3))
    state = first.state_dict()
    assert {tensor.dtype for tensor in state["masters"]} == {torch.float32}
    resumed = adapted()
    second = MasterAdamW(trainable(resumed), lr=1e-3)
    second.load_state_dict(state)
    run(resumed, second, range(3, 6))
    for name, master in masters_of(whole).items():
        assert torch.equal(master, masters_of(resumed)[name])
    with pytest.raises(ValueError, match="has no master weights"):
        second.load_state_dict(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]).state_dict())


@pytest.fixture
def network():
    torch.manual_seed(0)
    config = R3MemConfig(core=(1, 3), num_memory_tokens=2, segment_length=8)
    return R3MemModel(build(scale=2.0).to(torch.bfloat16), config).train()


def test_what_is_saved_is_float32(network, tmp_path):
    """Adapters and memory tokens, in a folder of `save_pretrained` and in a trainer's checkpoint."""
    optimizer = MasterAdamW(trainable(network), lr=1e-3)
    assert network.memory_embeddings.dtype == torch.bfloat16
    windows = Letters().windows[:2, :24]
    losses_of(network, windows).backward()
    optimizer.step()
    masters = masters_of(network)
    assert set(masters) == {name for name, p in network.named_parameters() if p.requires_grad}
    assert not torch.equal(masters["memory_embeddings"], network.memory_embeddings.float())
    state = network.state_dict()
    assert set(state) == set(masters) and all(torch.equal(state[name], master) for name, master in masters.items())
    network.save_pretrained(tmp_path)
    loaded = R3MemModel.from_pretrained(tmp_path, build(scale=2.0).to(torch.bfloat16))
    for name, parameter in loaded.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, masters[name])
    with master_weights(network):
        assert network.memory_embeddings.dtype == torch.float32
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    keep_master_weights(network)
    for name, parameter in network.named_parameters():
        assert not parameter.requires_grad or torch.equal(parameter, masters[name])
    assert not masters_of(network)


def test_weights_that_are_loaded_count(network):
    """Those of the best checkpoint, say: they are saved, and what training goes on from."""
    optimizer = MasterAdamW(trainable(network), lr=1e-3)
    with torch.no_grad():
        network.memory_embeddings.fill_(0.5)
    assert network.state_dict()["memory_embeddings"].unique().tolist() == [0.5]
    optimizer.step()  # with no gradients
    assert network.memory_embeddings.unique().tolist() == [0.5]
    losses_of(network, Letters().windows[:2, :24]).backward()
    optimizer.step()
    master = masters_of(network)["memory_embeddings"]
    assert (master - 0.5).abs().max() <= 1.1e-3 and not torch.equal(master, torch.full_like(master, 0.5))


def test_weights_that_are_loaded_are_not_rounded(network):
    """A checkpoint's float32 weights are the masters from then on, to the last bit."""
    optimizer = MasterAdamW(trainable(network), lr=1e-3)
    losses_of(network, Letters().windows[:2, :24]).backward()
    optimizer.step()
    best = {name: master.clone() for name, master in network.state_dict().items()}
    losses_of(network, Letters().windows[2:4, :24]).backward()
    optimizer.step()
    assert not torch.equal(network.state_dict()["memory_embeddings"], best["memory_embeddings"])
    network.load_state_dict(best)
    assert all(torch.equal(master, best[name]) for name, master in network.state_dict().items())
    assert torch.equal(network.memory_embeddings, best["memory_embeddings"].to(torch.bfloat16))
    optimizer.zero_grad()
    optimizer.step()  # with no gradients
    assert all(torch.equal(master, best[name]) for name, master in network.state_dict().items())


def test_another_optimizer_goes_on_from_the_masters(network):
    first = MasterAdamW(trainable(network), lr=1e-3)
    losses_of(network, Letters().windows[:2, :24]).backward()
    first.step()
    masters = {name: master.clone() for name, master in masters_of(network).items()}
    MasterAdamW([{"params": trainable(network), "lr": 1e-4}])
    assert all(torch.equal(master, masters[name]) for name, master in masters_of(network).items())


def test_what_it_refuses(monkeypatch):
    fine, half = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    for params in ([fine, half], [{"params": [fine]}, {"params": [half]}]):
        with pytest.raises(ValueError, match=r"not for torch\.float16"):
            MasterAdamW(params)
        assert fine.dtype == torch.float32 and not hasattr(fine, "r3mem_master")  # as it was
    parameter, frozen = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = MasterAdamW([("learned", parameter), ("frozen", frozen)])
    assert frozen.dtype == torch.float32 and len(masters_of(torch.nn.ParameterList([parameter, frozen]))) == 1
    with pytest.raises(ValueError, match="takes no closure"):
        optimizer.step(lambda: parameter.sum())
    with pytest.raises(ValueError, match="comes twice"):
        MasterAdamW([{"params": [fine]}, {"params": iter([fine])}])
    assert fine.dtype == torch.float32
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="MixedPrecisionPolicy"):
        MasterAdamW([parameter])
