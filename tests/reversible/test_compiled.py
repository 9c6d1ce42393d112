"""Compiled branches: the same graph in both evaluations, so that layers are reconstructed exactly; one for all layers.

With inductor, and with `aot_eager`, which traces and differentiates in the same way and compiles no code.
"""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters

from r3mem_fast import (
    MasterAdamW,
    MomentumCoupling,
    R3MemConfig,
    R3MemModel,
    check_gradients,
    check_inverse,
    compile_layers,
    make_reversible,
    restore,
    uncompile_layers,
)
from r3mem_fast.integrations.masters import masters_of
from r3mem_fast.measure import forward_memory
from r3mem_fast.reversible.convert import reversible_layers, stack_of
from tests.reversible.tiny import EXACT_FAMILIES, GENERIC_FAMILIES, assert_same_gradients, build, train_step

IDS = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))
inductor = pytest.param(
    "inductor", marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")]
)


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def adapted(family="llama", dtype=torch.float32, **settings):
    model = make_reversible(build(family, scale=2.0).to(dtype), MomentumCoupling(bits=4, fraction_bits=14))
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **settings)
    return get_peft_model(model, lora).train()


def gradients_of(model, ids=IDS):
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def graphs():
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def assert_near(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm().clamp_min(1e-6), name


@pytest.mark.parametrize("backend", ["aot_eager", inductor])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_layers_are_reconstructed_exactly(backend, dropout, dtype):
    """From other numbers than uncompiled, but the same ones twice: an inexact one would raise in the backward pass."""
    model = adapted(dtype=dtype, lora_dropout=dropout)
    loss, expected = gradients_of(model)
    compile_layers(model, backend=backend)
    found_loss, found = gradients_of(model)
    assert graphs() == 1, "one graph for all layers and both evaluations"
    if dropout == 0:  # inductor draws other random numbers
        assert found_loss == pytest.approx(loss, rel=1e-5 if dtype == torch.float32 else 1e-2)
        assert_near(found, expected, 1e-4 if dtype == torch.float32 else 0.1)
    assert check_inverse(model, input_ids=IDS).exact
    report = check_gradients(model, input_ids=IDS)
    assert report.loss == report.loss_stored and report.max_relative_error <= 1e-2


@pytest.mark.parametrize("family", EXACT_FAMILIES)
def test_families_share_one_graph(family):
    model = adapted(family)
    loss, expected = gradients_of(model)
    compile_layers(model, backend="aot_eager")
    found_loss, found = gradients_of(model)
    assert graphs() == 1
    assert found_loss == loss
    assert_near(found, expected, 1e-6)


def test_a_shape_has_a_graph_of_its_own():
    """What is compiled between the two evaluations of a layer does not change which graph it runs."""
    model = compile_layers(adapted(), backend="aot_eager")
    first = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    others = [model(input_ids=IDS[:, :n], labels=IDS[:, :n], use_cache=False).loss for n in (17, 9)]
    assert graphs() == 3
    sum(others, start=first).backward()
    assert graphs() == 3


def test_more_shapes_than_graphs():
    """Beyond the limit new shapes run uncompiled, in both evaluations, so that layers are reconstructed exactly."""
    with torch._dynamo.config.patch(recompile_limit=2):
        model = compile_layers(adapted(), backend="aot_eager")
        pieces = [IDS[:, :tokens] for tokens in (24, 20, 16, 12)]
        losses = [model(input_ids=piece, labels=piece, use_cache=False).loss for piece in pieces]
        sum(losses).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        uncompile_layers(model)
        sum(model(input_ids=piece, labels=piece, use_cache=False).loss for piece in pieces).backward()
    for name, gradient in found.items():
        expected = model.get_parameter(name).grad
        assert (gradient - expected).norm() <= 1e-4 * expected.norm(), name


def test_it_keeps_no_more_than_uncompiled():
    model = adapted()
    _, layers = reversible_layers(model)
    runs = []

    def backend(graph, inputs):
        return lambda *args: runs.append(graph) or graph.forward(*args)

    def kept():
        gradients_of(model)
        runs.clear()
        _, memory = forward_memory(lambda: model(input_ids=IDS, labels=IDS, use_cache=False).loss, layers[-1])
        return memory.on("cpu").layers, len(runs)

    before, _ = kept()
    compile_layers(model, backend=backend)
    assert kept() == (before, len(layers))


def test_with_master_weights_it_goes_on_in_one_graph():
    """Gradients in float32 of bfloat16 parameters would break the graph of a shape that comes later."""
    model = compile_layers(adapted(dtype=torch.bfloat16), backend="aot_eager")
    optimizer = MasterAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for n in (24, 17):
        model(input_ids=IDS[:, :n], labels=IDS[:, :n], use_cache=False).loss.backward()
    assert graphs() == 2
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert {gradient.dtype for gradient in before.values()} == {torch.float32}
    optimizer.step()
    assert set(masters_of(model)) == set(before)


def test_inference_and_memories_run_uncompiled():
    torch.manual_seed(0)
    config = R3MemConfig(core=(1, 3), num_memory_tokens=2, segment_length=8)
    model = R3MemModel(build(scale=2.0), config).train()
    expected = model(IDS, labels=IDS).loss
    compile_layers(model, backend="aot_eager")
    loss = model(IDS, labels=IDS).loss  # through three segments
    loss.backward()
    assert graphs() == 0 and loss.item() == expected.item()
    with torch.no_grad():
        model.eval()(IDS)
    assert graphs() == 0
    model.train()(IDS[:, :8], labels=IDS[:, :8]).loss.backward()
    assert graphs() == 1


def test_undoing():
    model = adapted()
    branches = stack_of(model).branches
    loss, expected = gradients_of(model)
    compile_layers(model, backend="aot_eager")
    with pytest.raises(ValueError, match="compiled already"):
        compile_layers(model)
    uncompile_layers(model)
    assert stack_of(model).branches == branches
    found_loss, found = gradients_of(model)
    assert graphs() == 0 and found_loss == loss
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    restore(compile_layers(model, backend="aot_eager"))
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert graphs() == 0


def test_what_it_refuses():
    with pytest.raises(ValueError, match="dynamic is not for compile_layers"):
        compile_layers(adapted(), dynamic=True)
    with pytest.raises(ValueError, match="not reversible"):
        compile_layers(build())
    with pytest.warns(UserWarning, match="no exact branch"):
        model = make_reversible(build(next(iter(GENERIC_FAMILIES))))
    with pytest.raises(ValueError, match="only layers with an exact branch"):
        compile_layers(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "tolerance"), [("eager", 0.0), pytest.param("inductor", 1e-5, marks=inductor.marks)]
)
def test_torch_compile_of_the_whole_model(backend, tolerance):
    """What is around the layers is compiled, the layers run as they are: the logits in evaluation, text that is
    written, and a step of training are those of before. Its depth makes no more graphs."""
    graphs = []
    for depth in (3, 12):
        torch._dynamo.reset()
        counters.clear()
        model = make_reversible(build(scale=2.0, num_hidden_layers=depth)).eval()
        compiled = torch.compile(model, backend=backend)
        for ids in (IDS, IDS[:, :9]):
            with torch.no_grad():
                expected = model(ids).logits
                assert (compiled(ids).logits - expected).abs().max() <= tolerance
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0
    written = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(compiled.generate(IDS, **written), model.generate(IDS, **written))
    (loss, found), (expected_loss, expected) = (train_step(each, IDS) for each in (compiled.train(), model.train()))
    assert loss == pytest.approx(expected_loss, abs=tolerance)
    names = {name.removeprefix("_orig_mod."): gradient for name, gradient in found.items()}
    assert_same_gradients(names, expected, 1e-4)


def test_one_graph_for_a_whole_model_is_refused():
    """The error of torch.compile says why, and what to do."""
    model = make_reversible(build()).eval()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"call torch\.compile without fullgraph"):
        torch.compile(model, backend="eager", fullgraph=True)(IDS)
