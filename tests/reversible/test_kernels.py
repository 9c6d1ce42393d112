"""A whole model on the Triton kernels: the reference's bits, and no more launches than promised."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from r3mem_fast import (
    IntegrityError,
    MomentumCoupling,
    check_gradients,
    check_integrity,
    check_inverse,
    make_reversible,
)
from tests.reversible.tiny import build, token_ids

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = 4
OPERATIONS = ("momentum_enter", "momentum_forward", "momentum_rewind", "momentum_gradient", "momentum_backward")


class OnStreams(TorchDispatchMode):
    """ATen operators that see an int32 tensor of a stream's size, in whatever shape, and do more than allocate it."""

    def __init__(self, numel, found):
        super().__init__()
        self.numel, self.found = numel, found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        of_streams = [
            leaf
            for leaf in tree_leaves((args, kwargs, result))
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.int32 and leaf.numel() == self.numel
        ]
        if of_streams and function.namespace != "r3mem" and not function.name().startswith("aten::empty"):
            self.found.append(function.name())
        return result


@pytest.fixture
def counted(monkeypatch):
    """Counts kernel launches, and ATen operators on streams outside of the operators r3mem::* and inside of them.

    Yields a function `(numel) -> (launches, on_streams)`, lists that grow from then on.
    """
    from r3mem_fast.kernels.common.launch import Launch
    from r3mem_fast.kernels.coupling import triton as kernels

    monkeypatch.setenv("R3MEM_KERNELS", "triton")
    launches, on_streams, run = [], [], Launch.run

    def run_counted(launch):
        launches.append(launch.kernel.__name__.removesuffix("_kernel"))
        with _disable_current_modes():  # the interpreter copies tensors about, a GPU does not
            run(launch)

    def watched(function, numel):
        def call(*args, **kwargs):
            with OnStreams(numel, on_streams):
                return function(*args, **kwargs)

        return call

    def start(numel):
        monkeypatch.setattr(Launch, "run", run_counted)
        for name in OPERATIONS:
            monkeypatch.setattr(kernels, name, watched(getattr(kernels, name), numel))
        return launches, on_streams

    return start


def test_launches_of_a_training_step(counted):
    """Forward one a layer and one to enter, backward two a layer and one to begin; no other operator on a stream."""
    model = make_reversible(build().to(DEVICE))
    ids = token_ids().to(DEVICE)
    numel = ids.numel() * model.config.hidden_size
    launches, on_streams = counted(numel)
    with OnStreams(numel, on_streams):
        loss = model(input_ids=ids, labels=ids).loss
    assert launches == ["momentum_enter", *["momentum_forward"] * LAYERS]
    launches.clear()
    # In this thread, so that the mode is on there.
    with OnStreams(numel, on_streams), torch.autograd.set_multithreading_enabled(False):
        loss.backward()
    assert launches == ["momentum_rewind", *["momentum_gradient", "momentum_backward"] * LAYERS]
    assert on_streams == []


def test_launches_of_inference(counted):
    model = make_reversible(build().to(DEVICE)).eval()
    ids = token_ids().to(DEVICE)
    numel = ids.numel() * model.config.hidden_size
    launches, on_streams = counted(numel)
    with torch.no_grad(), OnStreams(numel, on_streams):
        model(input_ids=ids)
    assert launches == ["momentum_enter", *["momentum_forward"] * LAYERS]
    assert on_streams == []


def test_the_count_sees_what_it_should_not_find(counted, monkeypatch):
    """The reference under the operators, and an operator between the layers: both are seen."""
    from r3mem_fast.kernels.coupling import reference
    from r3mem_fast.kernels.coupling import triton as kernels

    model = make_reversible(build().to(DEVICE)).eval()
    ids = token_ids().to(DEVICE)
    for name in OPERATIONS:
        monkeypatch.setattr(kernels, name, getattr(reference, name))
    launches, on_streams = counted(ids.numel() * model.config.hidden_size)
    with torch.no_grad():
        model(input_ids=ids)
    assert launches == [] and "aten::bitwise_right_shift_.Tensor_Scalar" in on_streams
    on_streams.clear()
    with OnStreams(12, on_streams):
        torch.zeros(3, 4, dtype=torch.int32).view(-1)
    assert on_streams == ["aten::zeros", "aten::view"]


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


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_a_training_step_in_a_cuda_graph():
    """Replays give the gradients of an eager step, and a check after any replay hears of a branch that changed."""
    model = make_reversible(build(scale=2.0).to(DEVICE, torch.bfloat16))
    ids = token_ids().to(DEVICE)

    def step():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=False)
            step()
    torch.cuda.current_stream().wait_stream(side)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    check_integrity(model)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for parameter in model.parameters():
            parameter.grad.zero_()
        step()
    for _ in range(2):
        graph.replay()
        check_integrity(model)
        assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    graph.replay()
    with pytest.raises(IntegrityError, match="NaN"):
        check_integrity(model)
