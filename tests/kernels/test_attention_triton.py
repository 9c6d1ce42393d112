"""The attention kernels against float64, within two or three times eager's error: on a GPU in every dtype, else
interpreted."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from r3mem_fast.kernels.attention import reference
from r3mem_fast.kernels.attention import triton as kernels
from r3mem_fast.kernels.attention.arguments import AttentionInputs, AttentionSettings
from r3mem_fast.kernels.common.launch import specialise

from .attention import NAMES, Case, assert_within_budget, cases, eager_attention, expected, wide

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter computes bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16, torch.bfloat16][: 3 if GPU else 2]
# Few, and not made smaller when they fail: interpreted or compiled, that would take minutes.
several = settings(max_examples=20, phases=[Phase.explicit, Phase.reuse, Phase.generate])
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")


@pytest.fixture(autouse=True)
def poisoned_empty():
    """New memory is full of NaN: an element that a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@several
@given(cases(DTYPES))
def test_forward(case):
    tensors = case.tensors(DEVICE)
    output, lse = kernels.memory_attention(AttentionInputs(**tensors), case.settings)
    exact, eager = expected(wide(tensors), case), expected(tensors, case, eager=True)
    assert output.dtype == case.dtype and lse.dtype == torch.float32
    assert_within_budget(output, exact[0], eager[0], "output")
    assert_within_budget(lse, exact[1], eager[1], "lse")


@several
@given(cases(DTYPES, most_tokens=24), st.booleans())
def test_backward(case, with_lse):
    """Against the derivative of the specification in float64, by autograd."""
    tensors = case.tensors(DEVICE)
    draw = torch.Generator().manual_seed(case.seed)
    output, lse = expected(tensors, case)
    grad_output = torch.randn(output.shape, generator=draw).to(case.dtype).to(DEVICE)
    # No gradient of what is infinite.
    grad_lse = torch.randn(lse.shape, generator=draw).to(DEVICE) if with_lse and lse.isfinite().all() else None
    found = kernels.memory_attention_backward(
        grad_output, grad_lse, AttentionInputs(**tensors), output, lse.contiguous(), case.settings
    )
    exact = gradients(wide(tensors), case, grad_output.double(), grad_lse)
    eager = gradients(tensors, case, grad_output, grad_lse, eager=True)
    for name, ours, one, other in zip((*NAMES, "sinks"), found, exact, eager, strict=True):
        assert (ours is None) == (one is None), name
        if ours is not None:
            assert ours.dtype == tensors[name].dtype, name
            # All go through g^o · o of the rounded o, which eager does not; of sinks nothing else is left.
            if name == "sinks":
                exactly = sinks_of_rounded(case, tensors, output, lse, grad_output, grad_lse)
                torch.testing.assert_close(ours.double(), exactly, atol=1e-5, rtol=1e-4)
            else:
                assert_within_budget(ours, one, other, name, factor=3)


def sinks_of_rounded(case, tensors, output, lse, grad_output, grad_lse):
    """g^sink in float64, of o and lse as the kernels are given them."""
    delta = (grad_output.double() * output.double()).sum(-1)
    if case.varlen:
        delta = delta.transpose(0, 1)
    if grad_lse is not None:
        delta = delta - grad_lse.double()
    if case.varlen:
        delta, lse = delta[None], lse[None]
    return reference.grad_of_sinks(tensors["sinks"].double(), lse.double(), delta)


def gradients(tensors, case, grad_output, grad_lse, eager=False):
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items() if t is not None and t.is_floating_point()}
    output, lse = expected({**tensors, **leaves}, case, eager=eager)
    results, grads = [output], [grad_output]
    if grad_lse is not None:
        results, grads = [output, lse], [grad_output, grad_lse.to(lse.dtype)]
    wanted = [leaves.get(name) for name in (*NAMES, "sinks")]
    given = [leaf for leaf in wanted if leaf is not None]
    found = iter(torch.autograd.grad(results, given, grads, allow_unused=True, materialize_grads=True))
    return [None if leaf is None else next(found) for leaf in wanted]


@several
@given(cases(DTYPES, most_tokens=4, varlen=False, offset=0), st.integers(0, 60), st.booleans())
def test_decode(case, more, ragged):
    """Rows of different lengths in caches with room for more."""
    tensors = case.tensors(DEVICE)
    draw = torch.Generator().manual_seed(case.seed)
    cache = torch.randn(2, case.rows, case.shared, case.tokens + more, case.head_dim, generator=draw)
    key, value = cache.to(case.dtype).to(DEVICE)
    lengths = None
    if ragged:
        lengths = torch.randint(case.tokens, case.tokens + more + 1, (case.rows,), generator=draw, dtype=torch.int32)
        lengths = lengths.to(DEVICE)
    tensors |= {"key": key, "value": value}
    output, lse = kernels.memory_decode(AttentionInputs(**tensors), lengths, case.settings)
    settings = case.settings._replace(query_offset=(key.shape[2] if lengths is None else lengths) - case.tokens)
    exact = reference.memory_attention(AttentionInputs(**wide(tensors)), settings)
    eager = eager_attention(AttentionInputs(**tensors), settings)
    assert_within_budget(output, exact[0], eager[0], "output")
    assert_within_budget(lse, exact[1], eager[1], "lse")


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("sinks", [False, True])
def test_decode_in_parts(splits, sinks, monkeypatch):
    """One part writes the output itself, sinks included; several are merged."""
    monkeypatch.setattr(kernels.decode, "choose_splits", lambda pairs, most: splits)
    case = Case(rows=2, shared=2, group=3, tokens=2, memory=20, head_dim=24, dtype=torch.float16, sinks=sinks)
    tensors = case.tensors(DEVICE)
    cache = torch.randn(2, 2, 2, 50, 24, generator=torch.Generator().manual_seed(1))
    tensors["key"], tensors["value"] = cache.to(case.dtype).to(DEVICE)
    launches, _ = kernels.plan_memory_decode(AttentionInputs(**tensors), None, case.settings)
    assert len(launches) == (1 if splits == 1 else 2)
    output, lse = kernels.memory_decode(AttentionInputs(**tensors), None, case.settings)
    settings = case.settings._replace(query_offset=48)
    exact = reference.memory_attention(AttentionInputs(**wide(tensors)), settings)
    eager = eager_attention(AttentionInputs(**tensors), settings)
    assert_within_budget(output, exact[0], eager[0], "output")
    assert_within_budget(lse, exact[1], eager[1], "lse")


def test_keys_are_split_into_few_parts_that_keep_a_gpu_busy():
    assert kernels.decode.choose_splits(8, 64) == 15  # 120 programs of 132
    assert kernels.decode.choose_splits(132, 64) == 1 and kernels.decode.choose_splits(1000, 64) == 1
    assert kernels.decode.choose_splits(136, 64) == 7  # one would take two rounds, and the second would be empty
    assert kernels.decode.choose_splits(8, 3) == 3 and kernels.decode.choose_splits(8, 0) == 1
    assert kernels.decode.choose_splits(0, 64) >= 1


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(head_dim):
    case = Case(head_dim=head_dim, group=2, tokens=19, memory=18, dtype=torch.float16, segment_starts=True)
    tensors = case.tensors(DEVICE)
    output, lse = kernels.memory_attention(AttentionInputs(**tensors), case.settings)
    exact, eager = expected(wide(tensors), case), expected(tensors, case, eager=True)
    assert_within_budget(output, exact[0], eager[0], "output")
    found = kernels.memory_attention_backward(output, None, AttentionInputs(**tensors), output, lse, case.settings)
    one = gradients(wide(tensors), case, output.double(), None)
    other = gradients(tensors, case, output, None, eager=True)
    for name, *results in zip(NAMES, found[:5], one, other, strict=False):
        assert_within_budget(*results, name, factor=3)


def test_the_memory_s_gradient_in_several_parts():
    """Of so many queries that they are shared out, and of rows that share a memory."""
    # A GPU's blocks hold more queries, so that it takes more of them to have several parts.
    case = Case(rows=2, group=2, tokens=2000 if GPU else 200, memory=20, one_memory=True, sinks=True)
    tensors = case.tensors(DEVICE)
    output, lse = expected(tensors, case)
    launches, _ = kernels.plan_memory_attention_backward(
        output, None, AttentionInputs(**tensors), output, lse, case.settings
    )
    assert launches[-1].arguments["splits"] > 1
    found = kernels.memory_attention_backward(output, None, AttentionInputs(**tensors), output, lse, case.settings)
    again = kernels.memory_attention_backward(output, None, AttentionInputs(**tensors), output, lse, case.settings)
    assert all(torch.equal(left, right) for left, right in zip(found, again, strict=True))
    one = gradients(wide(tensors), case, output.double(), None)
    other = gradients(tensors, case, output, None, eager=True)
    for name, *results in zip((*NAMES, "sinks"), found, one, other, strict=True):
        assert_within_budget(*results, name, factor=3)


def test_a_frozen_memory_costs_no_gradient():
    """One kernel less; the other gradients are what they were."""
    case = Case(rows=2, group=2, memory=20, one_memory=True, sinks=True)
    tensors = case.tensors(DEVICE)
    output, lse = expected(tensors, case)
    arguments = (output, None, AttentionInputs(**tensors), output, lse, case.settings)
    frozen, _ = kernels.plan_memory_attention_backward(*arguments, frozen_memory=True)
    launches, _ = kernels.plan_memory_attention_backward(*arguments)
    kept = [launched.kernel for launched in launches if launched.kernel.__name__ != "attention_memory_kernel"]
    assert [launched.kernel for launched in frozen] == kept and len(kept) == len(launches) - 1
    found = kernels.memory_attention_backward(*arguments, frozen_memory=True)
    of_all = kernels.memory_attention_backward(*arguments)
    assert found[3] is None and found[4] is None
    assert all(torch.equal(found[i], of_all[i]) for i in (0, 1, 2, 5))


def assert_as_the_reference(case, tensors):
    output, lse = kernels.memory_attention(AttentionInputs(**tensors), case.settings)
    for left, right in zip((output, lse), expected(tensors, case), strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)
    found = kernels.memory_attention_backward(output, None, AttentionInputs(**tensors), output, lse, case.settings)
    exact = gradients(tensors, case, output, None)
    for left, right in zip(found, exact, strict=True):
        if left is not None:
            torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


def test_keys_that_no_query_sees():
    """Long before the window, in a block where padding begins; and nothing is read outside of the tensors."""
    case = Case(rows=1, tokens=4, offset=80, window=2, memory=None)
    tensors = case.tensors(DEVICE) | {"segment_starts": torch.tensor([5], dtype=torch.int32, device=DEVICE)}
    assert_as_the_reference(case, tensors)
    output, lse = expected(tensors, case)
    poisoned = torch.full((1, 1, 68), torch.nan, device=DEVICE)
    poisoned[..., 64:] = lse
    found = kernels.memory_attention_backward(
        output, None, AttentionInputs(**tensors), output, poisoned[..., 64:], case.settings
    )
    assert all(grad.isfinite().all() for grad in found if grad is not None)


def test_what_is_not_seen_may_be_anything():
    """The part of a memory that is not filled, and padding: also NaN; in the reference, too."""
    case = Case(rows=1, tokens=9, memory=20)
    tensors = case.tensors(DEVICE)
    tensors |= {name: torch.tensor([n], dtype=torch.int32, device=DEVICE) for name, n in LENGTHS.items()}
    right = [*kernels.memory_attention(AttentionInputs(**tensors), case.settings)]
    for name in NAMES[1:]:
        tensors[name][:, :, : 3 if name.startswith("memory") else 2] = torch.nan
    output, lse = kernels.memory_attention(AttentionInputs(**tensors), case.settings)
    assert torch.equal(output, right[0]) and torch.equal(lse, right[1])
    assert_as_the_reference(case, tensors)
    decoded, _ = kernels.memory_decode(AttentionInputs(**tensors), None, case.settings)
    torch.testing.assert_close(decoded, output, atol=1e-5, rtol=1e-5)


LENGTHS = {"memory_lengths": 17, "segment_starts": 2}


def test_sinks_of_any_layout_and_of_no_weight():
    case = Case(rows=1, shared=2, group=2, tokens=5, sinks=True)
    tensors = case.tensors(DEVICE)
    tensors["sinks"] = torch.tensor([0.0, 100.0, 5.0, 100.0, -torch.inf, 0.0, 1.0, 0.0], device=DEVICE)[::2]
    assert_as_the_reference(case, tensors)
    # Rows that see nothing but a sink of no weight.
    tensors |= {"memory_key": None, "memory_value": None}
    tensors["segment_starts"] = torch.tensor([3], dtype=torch.int32, device=DEVICE)
    output, lse = kernels.memory_attention(AttentionInputs(**tensors), case.settings)
    assert (output[:, 2, :3] == 0).all() and (lse[:, 2, :3] == -torch.inf).all() and output.isfinite().all()


def test_tokens_of_no_sequence():
    """Behind the last one: zeros, and no part of a sum."""
    case = Case(rows=3, shared=1, tokens=3, memory=2, sinks=True, varlen=True)
    tensors = case.tensors(DEVICE)
    total = len(tensors["query"])
    longer = {name: torch.cat([tensors[name], tensors[name][:2]]) for name in NAMES[:3]}
    output, lse = kernels.memory_attention(AttentionInputs(**(tensors | longer)), case.settings)
    assert (output[total:] == 0).all() and (lse[:, total:] == 0).all()
    found = kernels.memory_attention_backward(
        torch.ones_like(output), None, AttentionInputs(**(tensors | longer)), output, lse, case.settings
    )
    inputs = AttentionInputs(**tensors)
    shorter = kernels.memory_attention_backward(
        torch.ones_like(output)[:total], None, inputs, output[:total], lse[:, :total], case.settings
    )
    for left, right, cut in zip(found, shorter, [True] * 3 + [False] * 3, strict=True):
        torch.testing.assert_close(left[:total] if cut else left, right)
        assert not cut or (left[total:] == 0).all()


def test_decoding_of_as_many_queries_as_it_takes():
    case = Case(rows=1, shared=1, group=4, tokens=16, offset=20, memory=20, head_dim=64)
    tensors = case.tensors(DEVICE)
    found = kernels.memory_decode(AttentionInputs(**tensors), None, case.settings)
    for left, right in zip(found, expected(tensors, case), strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


def test_no_kernel_is_compiled_anew_for_other_lengths():
    """What the compiler would be given is the same for every batch, length and cache.

    Memories have a variant for each power of two up to a block of keys, and decoding has another for so many rows that
    the keys are not split.
    """
    variants = {}
    for rows, tokens, memory in ((1, 1, 1), (2, 16, 16), (3, 37, 5), (1, 4096, 128), (16, 1000, 1024), (66, 8, 9)):
        tensors = Case(rows=1, tokens=1, memory=1, head_dim=80).tensors("meta")
        tensors["query"] = torch.empty(rows, 4, tokens, 80, device="meta")
        tensors["key"] = tensors["value"] = torch.empty(rows, 2, tokens, 80, device="meta")
        tensors["memory_key"] = tensors["memory_value"] = torch.empty(rows, 2, memory, 80, device="meta")
        inputs, settings, target = AttentionInputs(**tensors), AttentionSettings(1.0), "cuda:90"
        lse = torch.empty(rows, 4, tokens, device="meta")
        forward, _ = kernels.plan_memory_attention(inputs, settings._replace(window=tokens), target=target)
        backward, _ = kernels.plan_memory_attention_backward(
            inputs.query, None, inputs, inputs.query, lse, settings._replace(window=3), target=target
        )
        inputs = inputs._replace(query=torch.empty(rows, 4, 1, 80, device="meta"))
        lengths = torch.empty(rows, dtype=torch.int32, device="meta")
        decode, _ = kernels.plan_memory_decode(inputs, lengths, settings, target=target)
        for launch in (forward, *backward, *decode):
            assert set(launch.unspecialised) & set(launch.kernel.arg_names)
            variants.setdefault(launch.kernel.__name__, set()).add(str(specialise(launch, 32)))
    counts = {name.removeprefix("attention_").removesuffix("_kernel"): len(found) for name, found in variants.items()}
    assert counts == {
        "forward": 2, "query": 2, "key": 1, "memory": 1, "delta": 1, "decode": 2, "combine": 1,
    }  # fmt: skip


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_decoding_in_a_cuda_graph():
    """With other lengths at each replay."""
    case = Case(rows=2, shared=2, group=4, tokens=1, offset=63, head_dim=64, dtype=torch.bfloat16, memory_lengths=True)
    tensors = case.tensors(DEVICE)
    inputs, settings = AttentionInputs(**tensors), AttentionSettings(0.125)
    lengths = torch.tensor([64, 10], dtype=torch.int32, device=DEVICE)
    kernels.memory_decode(inputs, lengths, settings)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, _ = kernels.memory_decode(inputs, lengths, settings)
    lengths.copy_(torch.tensor([5, 33]))
    graph.replay()
    assert torch.equal(output, kernels.memory_decode(inputs, lengths, settings)[0])
