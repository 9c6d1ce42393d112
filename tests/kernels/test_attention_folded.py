"""Attention where all queries of a row see the same keys: on a CPU, and for rows that share memories."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from r3mem_fast.kernels.attention import dispatch, folded, memory_decode, ops
from r3mem_fast.kernels.attention.arguments import AttentionInputs
from r3mem_fast.kernels.attention.shared import read_shared_memories, readers_of
from r3mem_fast.kernels.common import dispatch as common_dispatch

from .attention import Case, assert_within_budget, cases, expected, wide


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for variable in (dispatch.VARIABLE, common_dispatch.VARIABLE):
        monkeypatch.delenv(variable, raising=False)


@settings(max_examples=60)
@given(cases([torch.float64, torch.float32, torch.bfloat16, torch.float16], most_tokens=1, softcap=None, varlen=False))
@example(Case(rows=3, shared=2, group=3, tokens=1, offset=40, memory=20, head_dim=64, dtype=torch.bfloat16))
@example(Case(tokens=1, offset=3, memory=7, memory_lengths=True, segment_starts=True, sinks=True, window=2))
@example(Case(rows=2, tokens=1, memory=4, memory_lengths=True, seed=3))
@example(Case(rows=1, shared=2, tokens=1, memory=16, head_dim=8, dtype=torch.float16, seed=2))
@example(Case(rows=1, shared=2, tokens=1, memory=16, head_dim=64, dtype=torch.float16, seed=29, sinks=True,
              memory_lengths=True, segment_starts=True))  # fmt: skip
def test_decoding_one_token(case):
    """By the vendor's kernel, whose parts are rounded before they are merged; what no query sees may be NaN."""
    tensors = case.tensors()
    inputs = AttentionInputs(**tensors)
    assert dispatch.choose_for_decoding(inputs, case.settings) == ("vendor", "the fastest on a CPU")
    exact, eager = expected(wide(tensors), case), expected(tensors, case, eager=True)
    for name, lengths, memory in (("key", "segment_starts", False), ("memory_key", "memory_lengths", True)):
        if tensors[name] is not None and tensors[lengths] is not None and not case.one_memory:
            for row, length in enumerate(tensors[lengths].tolist()):
                hidden = tensors[name].shape[2] - length if memory else length
                tensors[name][row, :, :hidden] = torch.nan
    output, lse = memory_decode(
        tensors["query"], tensors["key"], tensors["value"], tensors["memory_key"], tensors["memory_value"],
        memory_lengths=tensors["memory_lengths"], segment_starts=tensors["segment_starts"], sinks=tensors["sinks"],
        window=case.window, return_lse=True,
    )  # fmt: skip
    assert_within_budget(output, exact[0], eager[0], "output")
    assert_within_budget(lse, exact[1], eager[1], "lse", dtype=case.dtype)


@settings(max_examples=40)
@given(cases([torch.float32, torch.bfloat16], softcap=None, varlen=False, window=None, segment_starts=False))
@example(Case(rows=3, tokens=70, group=3, memory=20, one_memory=True, dtype=torch.bfloat16, head_dim=64))
def test_a_memory_alone(case):
    """Any number of queries, of one memory for all rows or one of each."""
    tensors = {**case.tensors(), "key": None, "value": None}
    inputs = AttentionInputs(**tensors)
    if not case.memory:
        assert dispatch.choose(inputs, case.settings) == ("reference", "not for nothing")
        return
    assert dispatch.choose(inputs, case.settings) == ("vendor", "the fastest on a CPU")
    exact, eager = expected(wide(tensors), case), expected(tensors, case, eager=True)
    output, lse = ops.memory_attention(*inputs, case.settings.scale, 0, 0.0, 0)
    assert_within_budget(output, exact[0], eager[0], "output")
    assert_within_budget(lse, exact[1], eager[1], "lse")


def test_a_memory_alone_has_gradients():
    tensors = {**Case(group=2, dtype=torch.float64, sinks=True).tensors(), "key": None, "value": None}
    names = ("query", "memory_key", "memory_value", "sinks")
    leaves = [tensors[name].double().requires_grad_() for name in names]

    def attend(*given):
        inputs = AttentionInputs(**{**tensors, **dict(zip(names, given, strict=True))})
        return ops.memory_attention(*inputs, 0.25, 0, 0.0, 0)

    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize(
    "why, case",
    [
        ("several queries of a segment", Case(tokens=2)),
        ("a softcap", Case(tokens=1, softcap=2.0)),
        ("sequences of different lengths", Case(tokens=1, varlen=True)),
    ],
)
def test_what_cannot_be_folded(why, case):
    assert folded.why_not(AttentionInputs(**case.tensors()), case.settings) == f"not for {why}"


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=7), st.integers(1, 5), st.sampled_from([1, 3]), st.booleans(),
    st.sampled_from([None, 5.0]),
)  # fmt: skip
def test_rows_that_share_memories(memories, tokens, group, ragged, softcap):
    """As if each row had its memory to itself."""
    order = list(dict.fromkeys(memories))
    memories = [order.index(memory) for memory in memories]
    case = Case(rows=len(order), shared=2, group=group, memory=9, memory_lengths=ragged)
    tensors = case.tensors()
    query = torch.randn(len(memories), 2 * group, tokens, case.head_dim)
    keys, values, lengths = (tensors[name] for name in ("memory_key", "memory_value", "memory_lengths"))
    readers = readers_of(memories)
    assert readers.rows.shape[0] == len(order)
    assert readers.rows.flatten()[readers.places].tolist() == list(range(len(memories)))
    scale = case.settings.scale
    found = read_shared_memories(query, keys, values, readers, memory_lengths=lengths, scale=scale, softcap=softcap)
    its = None if lengths is None else lengths[memories]
    apart = (query, None, None, keys[memories], values[memories], its, None, None, None)
    for mine, other in zip(found, ops.memory_attention(*apart, scale, 0, softcap or 0.0, 0), strict=True):
        torch.testing.assert_close(mine, other)
