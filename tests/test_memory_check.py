"""`check_memories`: right on models that read their memories, wrong where one is dropped; and nothing is left over."""

import contextlib

import pytest
import torch

from r3mem_fast import MemoryReport, check_memories, memory_check
from tests.reversible.tiny import EXACT_FAMILIES, GENERIC_FAMILIES, build, token_ids
from tests.test_model_memory import made

pytestmark = pytest.mark.filterwarnings("ignore:.*no exact branch is known:UserWarning")


@pytest.mark.parametrize("family", [*EXACT_FAMILIES, *GENERIC_FAMILIES])
def test_every_family(family):
    model = build(family, scale=2.0)
    names, before = [name for name, _ in model.named_modules()], model.training
    with torch.no_grad():
        logits = model.eval()(token_ids()).logits
        report = check_memories(model.train(before), token_ids(tokens=36))
        assert torch.equal(model.eval()(token_ids()).logits, logits)
    assert report.right and report.base_without_memory is True and report.layers == 4
    assert "read by all 4 layers" in str(report) and "the base model's, bit for bit" in str(report)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("adapter_rows", ["all", "memory"])
def test_a_memory_network(adapter_rows):
    report = check_memories(made(adapter_rows=adapter_rows), token_ids(tokens=36))
    assert report.right and report.base_without_memory is None


def test_what_is_wrong_is_said(monkeypatch):
    wrong = (
        (MemoryReport(4, 0.0, 1.0, True), "NOT read by all"),
        (MemoryReport(4, 1.0, 0.0, True), "NOT read by all"),
        (MemoryReport(4, 1.0, 1.0, False), "NOT the base model's"),
    )
    for report, message in wrong:
        assert not report.right and message in str(report)
    # A network that is not its base model without a memory: the adapters do not let go.
    with monkeypatch.context() as patched:
        patched.setattr(memory_check.R3MemModel, "without_memory", lambda self: contextlib.nullcontext())
        report = check_memories(build(scale=2.0), token_ids(tokens=36))
        assert report.base_without_memory is False and not report.right
    monkeypatch.setattr(memory_check.R3MemModel, "empty_memory", lambda self: (_ for _ in ()).throw(ValueError("why")))
    report = check_memories(build(), token_ids(tokens=36))
    assert report.right and report.refused == "why" and "not for this model: why" in str(report)
    with pytest.raises(ValueError, match="at least 12 tokens"):
        check_memories(build(), token_ids(tokens=11))
