"""Memory-token attention: the specification, the operators' gradients, the vendor's implementation, refusals."""

import pytest
import torch
from hypothesis import example, given, settings

from r3mem_fast.kernels import attention
from r3mem_fast.kernels.attention import dispatch, memory_attention, memory_attention_varlen, memory_decode, merge
from r3mem_fast.kernels.attention import vendor as vendor_module
from r3mem_fast.kernels.attention.arguments import AttentionInputs, AttentionSettings
from r3mem_fast.kernels.common import dispatch as common_dispatch

from .attention import NAMES, Case, assert_within_budget, cases, eager_attention, expected, wide


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for variable in (dispatch.VARIABLE, common_dispatch.VARIABLE):
        monkeypatch.delenv(variable, raising=False)


def called(case, tensors, **more):
    """Through the API."""
    options = {n: tensors[n] for n in ("memory_lengths", "sinks")}
    options |= {"window": case.window, "softcap": case.softcap, "return_lse": True, **more}
    if case.varlen:
        own, ends = [tensors[n] for n in NAMES], tensors["cu_seqlens"]
        return memory_attention_varlen(*own[:3], ends, case.tokens, *own[3:], **options)
    options |= {"segment_starts": tensors["segment_starts"], "query_offset": case.offset}
    return memory_attention(*(tensors[n] for n in NAMES), **options)


@settings(max_examples=60)
@given(cases([torch.float64, torch.float32, torch.bfloat16]))
def test_it_is_softmax_over_the_visible_keys(case):
    """Against concatenated keys and a mask tensor; rows one after the other as rows in a batch."""
    tensors = case.tensors()
    output, lse = called(case, tensors)
    assert output.dtype == case.dtype and lse.dtype == torch.promote_types(case.dtype, torch.float32)
    assert output.shape == tensors["query"].shape
    exact, eager = expected(wide(tensors), case), expected(tensors, case, eager=True)
    assert_within_budget(output, exact[0], eager[0], "output")
    assert_within_budget(lse, exact[1], eager[1], "lse")
    if not case.varlen:
        other = eager_attention(AttentionInputs(**wide(tensors)), case.settings)
        torch.testing.assert_close(exact[0], other[0], atol=1e-5, rtol=1e-5)


def test_rows_that_see_nothing_give_zeros():
    """A query in the padding before a segment, without a memory."""
    query, key, value = torch.randn(3, 1, 2, 4, 8).requires_grad_()
    starts = torch.tensor([2], dtype=torch.int32)
    output, lse = memory_attention(query, key, value, segment_starts=starts, return_lse=True)
    assert (output[:, :, :2] == 0).all() and (lse[:, :, :2] == -torch.inf).all() and lse[:, :, 2:].isfinite().all()
    gradients = torch.autograd.grad(output.sum(), (query, key, value))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][:, :, :2] == 0).all()
    # Nor do sinks that are switched off give them something to see.
    sinks = torch.tensor([-torch.inf, 0.0]).requires_grad_()
    output = memory_attention(query, key, value, segment_starts=starts, sinks=sinks)
    gradient = torch.autograd.grad(output.sum(), sinks)[0]
    assert gradient[0] == 0 and gradient[1].isfinite()


def test_heads_larger_than_the_kernels_take():
    """Gemma 4's full attention has heads of 512: on a GPU, too, the reference computes them."""
    query, key, value = torch.randn(3, 1, 2, 4, 320)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(memory_attention(query, key, value), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize(
    "case",
    [
        Case(group=2, dtype=torch.float64),
        Case(group=2, dtype=torch.float64, memory=None),
        Case(shared=2, dtype=torch.float64, one_memory=True, memory_lengths=True, sinks=True),
        Case(
            dtype=torch.float64, segment_starts=True, memory_lengths=True, offset=2, window=3, softcap=3.0, sinks=True
        ),
        Case(group=2, dtype=torch.float64, varlen=True, window=2, one_memory=True, sinks=True),
    ],
)
def test_gradients(case, implementation, monkeypatch):
    """gradcheck of the operator, by the reference, and by the vendor's kernel where that is chosen; lse included."""
    if implementation:
        monkeypatch.setenv(dispatch.VARIABLE, implementation)
    tensors = case.tensors()
    names = [name for name, tensor in tensors.items() if tensor is not None and tensor.is_floating_point()]
    leaves = [tensors[name].double().requires_grad_() for name in names]

    def output_of(*leaves):
        return called(case, {**tensors, **dict(zip(names, leaves, strict=True))}, return_lse=False)

    def both_of(*leaves):
        output, lse = called(case, {**tensors, **dict(zip(names, leaves, strict=True))})
        return output, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(output_of, leaves)
    assert torch.autograd.gradcheck(both_of, leaves)


@settings(max_examples=40)
@given(cases([torch.float32], varlen=False, offset=0, window=None, softcap=None, segment_starts=False))
@example(Case(shared=2, group=3, tokens=70, memory=20, head_dim=64, dtype=torch.bfloat16, memory_lengths=True))
@example(Case(tokens=70, memory=20, head_dim=128, dtype=torch.float16, one_memory=True, sinks=True))
def test_the_vendor_s_attention_merged_with_the_memory(case):
    tensors = case.tensors()
    inputs = AttentionInputs(**tensors)
    why = vendor_module.why_not(inputs, case.settings)
    chosen = dispatch.choose(inputs, case.settings)
    if case.sinks and not case.memory:
        assert why == "not for sinks without a memory" and chosen.implementation == "reference"
        return
    assert why is None and chosen == ("vendor", "the fastest on a CPU")
    leaves = {n: t.requires_grad_() for n, t in tensors.items() if t is not None and t.is_floating_point()}
    output, lse = called(case, tensors)
    exact, eager = expected(wide(tensors), case), expected(tensors, case, eager=True)
    assert_within_budget(output, exact[0], eager[0], "output")
    assert_within_budget(lse, exact[1], eager[1], "lse")
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(case.dtype)
    given = list(leaves.values())
    ours, other = torch.autograd.grad(output, given, grad), torch.autograd.grad(eager[0], given, grad)
    exactly = torch.autograd.grad(exact[0], given, grad.double())
    for name, *results in zip(leaves, ours, exactly, other, strict=True):
        assert_within_budget(results[0], results[1].double(), results[2], name, factor=5 if name == "sinks" else 3)


@settings(max_examples=20)
@given(cases([torch.float64], varlen=False, offset=0, segment_starts=False, window=None, softcap=None, sinks=False))
def test_two_parts_merge_into_one(case):
    """Attention to the memory, of queries that come after all of it, and to the segment."""
    tensors = case.tensors()
    query, key, value, *memory = (tensors[n] for n in NAMES)
    if not case.memory:
        return
    whole = memory_attention(query, key, value, *memory, memory_lengths=tensors["memory_lengths"], return_lse=True)
    own = memory_attention(query, key, value, return_lse=True)
    nothing = key[:, :, :0], value[:, :, :0]
    inputs = AttentionInputs(query, *nothing, *memory, tensors["memory_lengths"])
    of_memory = attention.reference.memory_attention(inputs, case.settings)
    for left, right in zip(merge(*own, *of_memory), whole, strict=True):
        torch.testing.assert_close(left, right)
    for left, right in zip(merge(*of_memory, *own), whole, strict=True):
        torch.testing.assert_close(left, right)


def test_merging_nothing_with_nothing():
    nothing = torch.zeros(1, 1, 2, 4), torch.full((1, 1, 2), -torch.inf)
    output, lse = merge(*nothing, *nothing)
    assert (output == 0).all() and (lse == -torch.inf).all()
    lse = torch.full((1, 1, 2), -torch.inf).requires_grad_()
    merge(nothing[0], lse, *nothing)[1].masked_fill(torch.ones(1, 1, 2, dtype=torch.bool), 0.0).sum().backward()
    assert lse.grad.isfinite().all()
    some = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2)
    for left, right in zip(merge(*some, *nothing), some, strict=True):
        torch.testing.assert_close(left, right)


@settings(max_examples=40)
@given(cases([torch.float64, torch.float32], varlen=False, most_tokens=4))
def test_decoding_is_attention_of_the_last_queries(case):
    """By row at another length, in a cache with room for more."""
    tensors = case.tensors()
    draw = torch.Generator().manual_seed(case.seed)
    query, key, value, *memory = (tensors[n] for n in NAMES)
    lengths = torch.randint(case.tokens, key.shape[2] + 1, (case.rows,), generator=draw, dtype=torch.int32)
    options = {"sinks": tensors["sinks"], "window": case.window, "softcap": case.softcap}
    starts, of_memory = tensors["segment_starts"], tensors["memory_lengths"]
    output, lse = memory_decode(
        query, key, value, *memory, lengths=lengths, memory_lengths=of_memory, segment_starts=starts,
        return_lse=True, **options,
    )  # fmt: skip
    for row in range(case.rows):
        length = int(lengths[row])
        one = slice(row, row + 1)
        mine = [t if t is None or len(t) == 1 else t[one] for t in memory]
        single, single_lse = memory_attention(
            query[one], key[one, :, :length], value[one, :, :length], *mine,
            memory_lengths=None if of_memory is None else of_memory[one],
            segment_starts=None if starts is None else starts[one],
            query_offset=length - case.tokens, return_lse=True, **options,
        )  # fmt: skip
        torch.testing.assert_close(output[one], single)
        torch.testing.assert_close(lse[one], single_lse)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("varlen", [False, True])
def test_operators(varlen, frozen):
    """Schemas, fake implementations, autograd and compilation, by PyTorch's own checks; with a frozen memory, too."""
    case = Case(group=2, varlen=varlen, sinks=True, memory_lengths=True, segment_starts=not varlen, offset=0)
    tensors = case.tensors()
    without = {"memory_key", "memory_value"} if frozen else set()
    inputs = [
        tensor.requires_grad_()
        if tensor is not None and tensor.is_floating_point() and name not in without
        else tensor
        for name, tensor in tensors.items()
    ]
    offset = case.tokens if varlen else case.offset
    torch.library.opcheck(torch.ops.r3mem.memory_attention.default, (*inputs, 0.25, 3, 5.0, offset))
    if not varlen:
        names = ("query", "key", "value", "memory_key", "memory_value", "memory_lengths")
        arguments = [None if tensors[n] is None else tensors[n].detach() for n in names]
        others = (None, tensors["segment_starts"], tensors["sinks"].detach(), 0.25, 0, 0.0)
        torch.library.opcheck(torch.ops.r3mem.memory_decode.default, (*arguments, *others))


@pytest.mark.parametrize("implementation", ["reference", "vendor"])
def test_a_second_derivative_is_an_error(implementation, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, implementation)
    query, key, value = torch.randn(3, 1, 1, 4, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(memory_attention(query, key, value).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="has no derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("window", [None, 3])
def test_autocast_does_not_reach_into_it(window):
    """Forward and backward, also where backward is called within; by the vendor's kernel and by the reference."""
    tensors = Case(group=2, tokens=9, memory=4, sinks=True, window=window).tensors()
    given = [tensors[n].requires_grad_() for n in NAMES]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = memory_attention(*given, sinks=tensors["sinks"], window=window)
            found.append([output, *torch.autograd.grad(output.sum(), given)])
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))


def test_it_compiles_as_one_graph_for_all_lengths():
    compiled = torch.compile(memory_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens, memory in ((5, 3), (9, 17), (30, 2)):
        tensors = Case(tokens=tokens, memory=memory).tensors()
        given = [tensors[n].requires_grad_() for n in NAMES]
        output = compiled(*given)
        torch.testing.assert_close(output, memory_attention(*given))
        output.sum().backward()
    with torch.no_grad():
        assert memory_attention(*given).grad_fn is None


def test_who_runs(monkeypatch):
    query, key = torch.zeros(1, 2, 4, 8), torch.zeros(1, 1, 4, 8)

    def chosen(key=key, starts=None, **settings):
        inputs = AttentionInputs(query, key, segment_starts=starts)
        return dispatch.choose(inputs, AttentionSettings(1.0, **settings))

    assert chosen() == ("vendor", "the fastest on a CPU")
    assert chosen(window=4).implementation == "vendor" and chosen(window=3) == ("reference", "not for a window")
    assert chosen(softcap=1.0) == ("reference", "not for a softcap")
    assert chosen(starts=torch.zeros(1)) == ("reference", "not for left padding")
    monkeypatch.setenv(common_dispatch.VARIABLE, "reference")
    assert chosen() == ("reference", "R3MEM_KERNELS=reference")
    monkeypatch.setenv(dispatch.VARIABLE, "vendor")
    assert chosen() == ("vendor", "R3MEM_ATTENTION=vendor")
    with pytest.raises(RuntimeError, match="R3MEM_ATTENTION=vendor cannot run: not for a softcap"):
        chosen(softcap=1.0)
    monkeypatch.setenv(dispatch.VARIABLE, "flash")
    with pytest.raises(ValueError, match="R3MEM_ATTENTION must be reference, triton, vendor, or unset; it is 'flash'"):
        chosen()
    with pytest.raises(ValueError, match="it is 'flash'"):
        dispatch.choose_for_decoding(AttentionInputs(*torch.zeros(3, 1, 1, 1, 8)), AttentionSettings(1.0))


def test_what_is_refused():
    query, key, memory = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 5, 8), torch.zeros(1, 2, 3, 8)
    starts = torch.zeros(2, dtype=torch.int32)

    def refused(error, message, *tensors, function=memory_attention, **settings):
        with pytest.raises(error, match=message):
            function(*tensors, **settings)

    refused(TypeError, "query must be bfloat16", query.int(), key, key)
    refused(TypeError, "key is torch.float64, query torch.float32", query, key.double(), key)
    refused(ValueError, "key has head_dim 4, query 8", query, key[..., :4], key)
    refused(ValueError, "must agree", query, key, key[:, :, 1:])
    refused(ValueError, "key has 1 rows and query 2", query, key[:1], key[:1])
    refused(ValueError, "4 query heads must be a multiple of the 3 key heads", query, *torch.zeros(2, 2, 3, 5, 8))
    refused(ValueError, "key has 5 tokens; 5 queries behind query_offset=2 need 7", query, key, key, query_offset=2)
    refused(ValueError, "query_offset must be an integer", query, key, key, query_offset=-1)
    refused(ValueError, "must both be given", query, key, key, memory)
    refused(ValueError, r"memory_key must be \[2 or 1, 2, M, D\]", query, key, key, *torch.zeros(2, 3, 2, 3, 8))
    refused(ValueError, "memory_lengths must be int32", query, key, key, memory, memory, memory_lengths=starts[:1])
    refused(ValueError, "segment_starts must be int32", query, key, key, segment_starts=starts.float())
    refused(ValueError, r"sinks must be \[4\]", query, key, key, sinks=torch.zeros(3))
    refused(TypeError, "sinks must be float32", query, key, key, sinks=torch.zeros(4).double())
    refused(ValueError, "window must be an integer", query, key, key, window=0)
    for softcap in (-1.0, float("inf"), float("nan")):
        refused(ValueError, "softcap must be finite and above 0", query, key, key, softcap=softcap)
    refused(ValueError, "head_dim must be at least 1", *torch.zeros(3, 1, 1, 1, 0))
    ends = torch.tensor([0, 3], dtype=torch.int32)
    flat = torch.zeros(3, 2, 8)
    varlen = {"function": memory_attention_varlen}
    refused(ValueError, r"cu_seqlens must be int32", flat, flat, flat, ends.long(), 3, **varlen)
    refused(ValueError, r"query must be \[total, Hq, D\]", query, key, key, ends, 3, **varlen)
    refused(ValueError, "max_seqlen must be", flat, flat, flat, ends, 0, **varlen)
    refused(ValueError, "max_seqlen is 2, and a segment has 3 tokens", flat, flat, flat, ends, 2, **varlen)
    refused(ValueError, "key has 2 tokens and query 3", flat, flat[:2], flat[:2], ends, 3, **varlen)
    decode = {"function": memory_decode}
    refused(ValueError, "fewer than the 5 queries", query, key[:, :, :2], key[:, :, :2], **decode)
    refused(ValueError, "at most 64 together", torch.zeros(1, 65, 1, 8), *torch.zeros(2, 1, 1, 1, 8), **decode)
    refused(RuntimeError, "no gradient", query.clone().requires_grad_(), key, key, **decode)
