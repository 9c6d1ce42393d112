"""The forward pass whose warps share out the work: against float64 like the other one, and who is told to run it."""

import pytest
import torch
import triton
from hypothesis import Phase, given, settings

from r3mem_fast.kernels.attention import dispatch, memory_attention
from r3mem_fast.kernels.attention.arguments import AttentionInputs, AttentionSettings
from r3mem_fast.kernels.attention.triton import forward_specialised as specialised
from r3mem_fast.kernels.common.launch import specialise

from .attention import NAMES, Case, assert_within_budget, cases, expected, wide

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter computes bfloat16 wrongly.
DTYPES = [torch.float16, torch.bfloat16] if GPU else [torch.float16]
several = settings(max_examples=20, phases=[Phase.explicit, Phase.reuse, Phase.generate])
WHY_NOT = specialised.why_not_on(torch.empty(0, dtype=torch.float16, device=DEVICE)) if GPU else None
pytestmark = [
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def poisoned_empty():
    """New memory is full of NaN: an element that the kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_exact(case, tensors=None):
    tensors = tensors or case.tensors(DEVICE)
    inputs = AttentionInputs(**tensors)
    assert specialised.why_not(inputs, case.settings) is None
    output, lse = specialised.memory_attention(inputs, case.settings)
    exact, eager = expected(wide(tensors), case), expected(tensors, case, eager=True)
    assert output.dtype == case.dtype and lse.dtype == torch.float32
    assert_within_budget(output, exact[0], eager[0], "output")
    assert_within_budget(lse, exact[1], eager[1], "lse")


@several
@given(cases(DTYPES, head_dim=64, varlen=False, softcap=None))
def test_random_cases(case):
    assert_exact(case)


LONG = [(1000, 300, 64), (4096, 128, 128), (4096, 1024, 128)] if GPU else [(150, 70, 64), (60, 40, 128)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("tokens", "memory", "head_dim"), LONG)
def test_many_blocks(tokens, memory, head_dim, window, dtype):
    """Forward pass over a memory and a segment whose lengths differ by row and are multiples of no block."""
    assert_exact(
        Case(
            shared=2, group=4, tokens=tokens, memory=memory, head_dim=head_dim, dtype=dtype, window=window,
            memory_lengths=True, segment_starts=True, sinks=True,
        )
    )  # fmt: skip


@pytest.mark.parametrize("memory", [None, 0, 1, 16])
def test_a_short_memory_or_none(memory):
    assert_exact(Case(group=2, tokens=33, offset=5, memory=memory, head_dim=64, dtype=torch.float16))


def test_a_memory_that_no_row_reads():
    case = Case(rows=2, tokens=20, memory=20, head_dim=64, dtype=torch.float16)
    assert_exact(case, case.tensors(DEVICE) | {"memory_lengths": torch.zeros(2, dtype=torch.int32, device=DEVICE)})


def test_what_is_not_seen_may_be_anything():
    """The part of a memory that is not filled, and padding: also NaN."""
    case = Case(rows=1, tokens=40, memory=40, head_dim=64, dtype=torch.float16)
    tensors = case.tensors(DEVICE)
    for name, number in (("memory_lengths", 17), ("segment_starts", 21)):
        tensors[name] = torch.tensor([number], dtype=torch.int32, device=DEVICE)
    right = specialised.memory_attention(AttentionInputs(**tensors), case.settings)
    for name in NAMES[1:]:
        tensors[name][:, :, : 23 if name.startswith("memory") else 21] = torch.nan
    found = specialised.memory_attention(AttentionInputs(**tensors), case.settings)
    assert all(torch.equal(*pair) for pair in zip(found, right, strict=True))


def test_it_is_not_compiled_anew_for_other_lengths():
    variants = set()
    for rows, tokens, memory in ((1, 1, 1), (2, 16, 16), (3, 37, 5), (1, 4096, 128), (66, 1000, 1024)):
        query = torch.empty(rows, 4, tokens, 64, dtype=torch.bfloat16, device="meta")
        key = torch.empty(rows, 2, tokens, 64, dtype=torch.bfloat16, device="meta")
        memory_key = torch.empty(rows, 2, memory, 64, dtype=torch.bfloat16, device="meta")
        inputs = AttentionInputs(query, key, key, memory_key, memory_key)
        launch, _ = specialised.plan_memory_attention(inputs, AttentionSettings(1.0, window=tokens), target="cuda:90")
        variants.add(str(specialise(launch, 32)))
    assert len(variants) == 1 and "tensordesc<bf16[1, 1, 128, 64]>" in variants.pop()


def test_the_user_s_allocator_stays():
    """The one that a launch needs is known to the launch alone."""
    asked = []

    def allocate(size, alignment, stream):
        asked.append(size)

    before = triton.runtime._allocation._allocator.get()
    triton.set_allocator(allocate)
    try:
        assert_exact(Case(tokens=5, head_dim=64, dtype=torch.float16))
        assert triton.runtime._allocation._allocator.get() is allocate and not asked
    finally:
        triton.set_allocator(before)


def inputs_of(head_dim=64, dtype=torch.float16, **others):
    query, key = torch.ones(1, 2, 4, head_dim, dtype=dtype), torch.ones(1, 1, 4, head_dim, dtype=dtype)
    return AttentionInputs(query, **({"key": key, "value": key} | others))


def test_what_it_does_not_take():
    def why_not(inputs, **more):
        return specialised.why_not(inputs, AttentionSettings(0.125, **more))

    assert why_not(inputs_of()) is None and why_not(inputs_of(128), window=2, query_offset=7) is None
    assert why_not(inputs_of(key=None, value=None)) == "not for a memory alone"
    assert why_not(inputs_of(), softcap=1.0) == "not for a softcap"
    assert why_not(inputs_of(80)) == "not for head_dim 80"
    ends = torch.tensor([0, 4], dtype=torch.int32)
    assert why_not(inputs_of(cu_seqlens=ends)) == "not for sequences one after the other"
    assert why_not(inputs_of()._replace(query=torch.ones(1, 2, 0, 64))) == "not for nothing"
    uneven = torch.ones(1, 1, 4, 65, dtype=torch.float16)[..., :64]
    strided = torch.ones(1, 1, 4, 128, dtype=torch.float16)[..., ::2]
    moved = torch.ones(257, dtype=torch.float16)[1:].view(1, 1, 4, 64)
    shared = torch.ones(1, 1, 1, 64, dtype=torch.float16).expand(1, 1, 4, 64)
    for key in (uneven, strided, moved, shared):
        assert why_not(inputs_of(key=key)).startswith("tensor descriptors need contiguous heads")
    one = torch.ones(1, 1, 1, 65, dtype=torch.float16)[..., :64]  # of no other token, so that its stride is no matter
    assert why_not(inputs_of(memory_key=one, memory_value=one)) is None


@pytest.mark.skipif(GPU, reason="interpreted")
def test_who_runs(monkeypatch):
    plain = AttentionSettings(0.125)
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    monkeypatch.delenv(dispatch.FORWARD_VARIABLE, raising=False)
    assert dispatch.choose_forward(inputs_of(), plain).implementation == "triton"
    monkeypatch.setenv(dispatch.FORWARD_VARIABLE, "specialised")
    assert dispatch.choose_forward(inputs_of(), plain) == ("specialised", "R3MEM_ATTENTION_FORWARD=specialised")
    capped = dispatch.choose_forward(inputs_of(), plain._replace(softcap=1.0))
    assert capped.implementation == "triton" and capped.why.endswith("=specialised: not for a softcap")
    with pytest.raises(RuntimeError, match="specialised cannot run: it takes bfloat16 and float16"):
        dispatch.choose_forward(inputs_of(dtype=torch.float32), plain)
    monkeypatch.setattr(specialised, "interpreting", lambda: False)
    monkeypatch.setattr(specialised, "target_of", lambda device: "cuda:89")
    with pytest.raises(RuntimeError, match="it runs on cuda:90 and cuda:100, and this is cuda:89"):
        dispatch.choose_forward(inputs_of(), plain)
    monkeypatch.setenv(dispatch.FORWARD_VARIABLE, "fast")
    with pytest.raises(ValueError, match="R3MEM_ATTENTION_FORWARD must be specialised, or unset; it is 'fast'"):
        dispatch.choose_forward(inputs_of(), plain)
    monkeypatch.setenv(dispatch.FORWARD_VARIABLE, "specialised")
    monkeypatch.setenv(dispatch.VARIABLE, "vendor")
    with pytest.raises(RuntimeError, match=r"not Triton is chosen, but vendor \(R3MEM_ATTENTION=vendor\)"):
        dispatch.choose_forward(inputs_of(), plain)


def test_the_operation_runs_it(monkeypatch):
    """Forward; the backward pass is the other kernels', and needs only its output and lse."""
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    case = Case(group=2, tokens=19, memory=5, head_dim=64, dtype=torch.float16)
    given = [tensor.requires_grad_() for tensor in map(case.tensors(DEVICE).get, NAMES)]
    found = []
    for forced in ("", "specialised"):
        monkeypatch.setenv(dispatch.FORWARD_VARIABLE, forced)
        calls = []
        run = specialised.memory_attention
        monkeypatch.setattr(
            specialised, "memory_attention", lambda *a, run=run, calls=calls: calls.append(1) or run(*a)
        )
        output = memory_attention(*given)
        assert bool(calls) == bool(forced)
        found.append([output, *torch.autograd.grad(output.sum(), given)])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, atol=2e-3, rtol=2e-3)
