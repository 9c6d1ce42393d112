"""A whole model on the Triton kernels: the reference's bits, and no more launches than promised."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r3mem_fast import MomentumCoupling, check_gradients, check_inverse, make_reversible
from tests.reversible.tiny import build, token_ids

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = 4


class Calls(TorchDispatchMode):
    """Operators called, and those of ATen that saw an int32 stream (of a hidden state's shape)."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.coupling, self.on_streams = shape, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "r3mem":
            self.coupling.append(function.name().removeprefix("r3mem::"))
        elif any(
            isinstance(leaf, torch.Tensor) and leaf.dtype == torch.int32 and leaf.shape == self.shape
            for leaf in tree_leaves((args, kwargs, result))
        ):
            self.on_streams.append(function.name())
        return result


@pytest.fixture(params=["reference", "triton"])
def kernels(request, monkeypatch):
    monkeypatch.setenv("R3MEM_KERNELS", request.param)
    return request.param


def test_launches_of_a_training_step(kernels):
    """Forward one a layer and one to enter, backward two a layer and one to begin; no other operator on a stream."""
    model = make_reversible(build().to(DEVICE))
    ids = token_ids().to(DEVICE)
    with Calls((*ids.shape, model.config.hidden_size)) as forward:
        loss = model(input_ids=ids, labels=ids).loss
    assert forward.coupling == ["momentum_enter", *["momentum_forward"] * LAYERS]
    # The engine's threads know of no mode: on the CPU there are none.
    with Calls((*ids.shape, model.config.hidden_size)) as backward, torch.autograd.set_multithreading_enabled(False):
        loss.backward()
    expected = [
        "momentum_gradient_top",
        "momentum_backward",
        *["momentum_gradient", "momentum_backward"] * (LAYERS - 1),
    ]
    assert backward.coupling == ["momentum_rewind", *expected]
    assert forward.on_streams == backward.on_streams == []


def test_launches_of_inference(kernels):
    model = make_reversible(build().to(DEVICE)).eval()
    ids = token_ids().to(DEVICE)
    with torch.no_grad(), Calls((*ids.shape, model.config.hidden_size)) as calls:
        model(input_ids=ids)
    assert calls.coupling == ["momentum_enter", *["momentum_forward"] * LAYERS]
    assert calls.on_streams == []


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])])
def test_both_implementations_train_with_the_same_bits(bits, dtype, monkeypatch):
    """Loss and every gradient; and either runs backward what the other ran forward."""
    found = []
    for forward, backward in [(a, b) for a in ("reference", "triton") for b in ("reference", "triton")]:
        model = make_reversible(build().to(DEVICE, dtype), MomentumCoupling(bits=bits))
        ids = token_ids().to(DEVICE)
        monkeypatch.setenv("R3MEM_KERNELS", forward)
        loss = model(input_ids=ids, labels=ids).loss
        monkeypatch.setenv("R3MEM_KERNELS", backward)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for other in found[1:]:
        assert all(torch.equal(left, right) for left, right in zip(found[0], other, strict=True))
    assert found[0][0].isfinite()


def test_checks_pass_on_the_triton_kernels(monkeypatch):
    monkeypatch.setenv("R3MEM_KERNELS", "triton")
    model = make_reversible(build().to(DEVICE))
    ids = token_ids().to(DEVICE)
    assert check_inverse(model, ids).exact
    assert check_gradients(model, ids).max_relative_error <= 1e-5


def test_a_branch_that_changes_is_found_by_the_triton_kernels(monkeypatch):
    """Without synchronising: gradients from the changed layer down are NaN, and the flag is kept for who asks."""
    from r3mem_fast import IntegrityError, check_integrity

    monkeypatch.setenv("R3MEM_KERNELS", "triton")
    model = make_reversible(build().to(DEVICE), integrity="nan")
    ids = token_ids().to(DEVICE)
    loss = model(input_ids=ids, labels=ids).loss
    model.model.layers[2].mlp.up_proj.weight.data.mul_(1.5)
    loss.backward()
    assert model.model.layers[3].mlp.up_proj.weight.grad.isfinite().all()
    for layer in model.model.layers[:3]:
        assert all(p.grad.isnan().any() for p in layer.parameters())
    with pytest.raises(IntegrityError, match="did not find again"):
        check_integrity(model)
    check_integrity(model)  # asked once, told once
