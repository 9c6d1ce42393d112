"""The matching kernels against float64, within twice eager's error: on a GPU in every dtype, else interpreted."""

import pytest
import torch
from hypothesis import Phase, example, given, settings

from r3mem_fast.kernels.common.launch import specialise
from r3mem_fast.kernels.matching import reference
from r3mem_fast.kernels.matching import triton as kernels
from r3mem_fast.kernels.matching.arguments import MatchingInputs, MatchingSettings

from .matching import Case, assert_within_budget, cases, clean, expected_scores, expected_system

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter computes bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16, torch.bfloat16][: 3 if GPU else 2]
# Few, and not made smaller when they fail: interpreted or compiled, that would take minutes.
several = settings(max_examples=10, phases=[Phase.explicit, Phase.reuse, Phase.generate])
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")


@pytest.fixture(autouse=True)
def poisoned_empty():
    """New memory is full of NaN: an element that a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_scores(case):
    tensors = case.tensors()
    inputs, _ = case.tensors(DEVICE)
    found = kernels.attention_scores(inputs, case.settings)
    exact, eager = (expected_scores(tensors, case.settings, eager=eager) for eager in (False, True))
    for name, ours, one, other in zip(("scores", "lse", "output"), found, exact, eager, strict=True):
        assert ours.dtype == torch.float32
        assert_within_budget(ours, one, other, name)


def assert_system(case):
    tensors = case.tensors()
    inputs, target = case.tensors(DEVICE)
    found = kernels.value_system(inputs, target, case.settings)
    exact, eager = (expected_system(tensors, case.settings, eager=eager) for eager in (False, True))
    for name, ours, one, other in zip(("gram", "residual", "lse"), found, exact, eager, strict=True):
        assert ours.dtype == torch.float32
        assert_within_budget(ours, one, other, name)


@several
@given(cases(DTYPES, most=36))
def test_attention_scores(case):
    assert_scores(case)


@several
@given(cases(DTYPES, most=36))
@example(Case(group=3, queries=9, keys=33, ahead=50, sinks=True))  # three blocks of kept keys
@example(Case(group=3, queries=9, keys=16, ahead=50, sinks=True))  # one, full
def test_value_system(case):
    assert_system(case)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(head_dim):
    case = Case(head_dim=head_dim, group=2, queries=9, keys=18, ahead=3, dtype=torch.float16, key_padding=0.2)
    assert_scores(case)
    assert_system(case)
    assert_system(Case(head_dim=head_dim, group=2, queries=9, keys=15, ahead=3, dtype=torch.float16))


def test_it_is_the_reference_in_float32():
    """Also where many queries are shared out, and of one row that has no stride."""
    case = Case(rows=1, shared=2, group=3, queries=24, keys=35, ahead=1, window=30, softcap=9.0, sinks=True)
    inputs, target = case.tensors(DEVICE)
    for kernel in ("attention_scores", "value_system"):
        arguments = (inputs, case.settings) if kernel == "attention_scores" else (inputs, target, case.settings)
        found, wanted = (getattr(module, kernel)(*arguments) for module in (kernels, reference))
        for ours, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, other, atol=2e-6, rtol=2e-5)


def test_sums_in_several_parts_are_the_same_at_every_run():
    # A GPU's blocks hold more queries, so that it takes more of them to have several parts.
    case = Case(rows=1, group=4, queries=2000 if GPU else 36, keys=20, ahead=4, key_padding=0.1)
    inputs, target = case.tensors(DEVICE)
    launches, _ = kernels.plan_attention_scores(inputs, case.settings)
    assert launches[1].arguments["splits"] > 1
    launches, *_ = kernels.plan_value_system(inputs, target, case.settings)
    assert launches[1].arguments["splits"] > 1
    for run in (
        lambda: kernels.attention_scores(inputs, case.settings),
        lambda: kernels.value_system(inputs, target, case.settings),
    ):
        assert all(torch.equal(left, right) for left, right in zip(run(), run(), strict=True))
    assert_scores(case)
    assert_system(case)


def test_what_does_not_exist_may_be_anything():
    """NaN as well as zeros, bit for bit; and every place that is not written would be NaN."""
    case = Case(shared=2, group=2, queries=18, keys=21, ahead=5, query_padding=0.4, key_padding=0.4, sinks=True)
    tensors = case.tensors(DEVICE)
    assert any(tensor.isnan().any() for tensor in tensors[0][:3])
    other, target = clean(tensors)
    for found, wanted in (
        (kernels.attention_scores(tensors[0], case.settings), kernels.attention_scores(other, case.settings)),
        (kernels.value_system(*tensors, case.settings), kernels.value_system(other, target, case.settings)),
    ):
        for ours, same in zip(found, wanted, strict=True):
            assert torch.equal(ours, same) and not ours.isnan().any()


@pytest.mark.parametrize("queries, keys", [(0, 5), (5, 0), (0, 0), (3, 3)])
@pytest.mark.parametrize("rows", [0, 2])
def test_nothing_to_do(queries, keys, rows):
    case = Case(rows=rows, group=2, queries=queries, keys=keys, key_padding=1.0, sinks=True)
    inputs, target = case.tensors(DEVICE)
    scores, lse, output = kernels.attention_scores(inputs, case.settings)
    assert (scores == 0).all() and (lse == -torch.inf).all() and (output == 0).all()
    gram, residual, lse = kernels.value_system(inputs, target, case.settings)
    assert gram.shape == (rows, 1, keys, keys) and (gram == 0).all() and (residual == 0).all()
    assert (lse == -torch.inf).all()


def test_sinks_that_take_all_and_nothing():
    case = Case(rows=1, shared=2, group=2, queries=5, keys=20, ahead=9, key_padding=0.2)
    inputs, target = case.tensors(DEVICE)
    # Every second of a longer tensor.
    sinks = torch.tensor([0.0, 1.0, 300.0, 1.0, -torch.inf, 1.0, -300.0, 1.0], device=DEVICE)[::2]
    inputs = inputs._replace(sinks=sinks)
    for keys in (20, 16):
        cut = MatchingInputs(
            inputs.query, inputs.key[:, :, :keys], inputs.value[:, :, :keys], inputs.query_positions,
            inputs.key_positions[:, :, :keys], sinks,
        )  # fmt: skip
        for found, wanted in (
            (kernels.attention_scores(cut, case.settings), reference.attention_scores(cut, case.settings)),
            (kernels.value_system(cut, target, case.settings), reference.value_system(cut, target, case.settings)),
        ):
            for ours, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(ours, other, atol=2e-6, rtol=2e-5)


def test_no_kernel_is_compiled_anew_for_other_lengths():
    """What the compiler would be given is the same for every batch, length and window; two variants for kept keys."""
    variants = {}
    for rows, queries, keys in ((1, 1, 65), (2, 16, 128), (3, 37, 1000), (1, 4096, 1024), (16, 1000, 777)):
        query = torch.empty(rows, 4, queries, 80, device="meta")
        key = torch.empty(rows, 2, keys, 80, device="meta")
        positions = (
            torch.empty(size, dtype=torch.int32, device="meta") for size in ((rows, queries), (rows, 2, keys))
        )
        inputs, some = MatchingInputs(query, key, key, *positions), MatchingSettings(1.0, window=keys)
        launches, _ = kernels.plan_attention_scores(inputs, some, target="cuda:90")
        for launch in launches:
            variants.setdefault(launch.kernel.__name__, set()).add(str(specialise(launch, 32)))
        launches, *_ = kernels.plan_value_system(inputs, query, some, target="cuda:90")
        few = inputs._replace(key=key[:, :, :7], value=key[:, :, :7], key_positions=inputs.key_positions[:, :, :7])
        launches += kernels.plan_value_system(few, query, some, target="cuda:90")[0]
        for launch in launches:
            name = f"{launch.kernel.__name__}, kept, {launch.constexprs.get('WHOLE')}"
            variants.setdefault(name, set()).add(str(specialise(launch, 32)))
            assert {"queries", "keys", "window"} <= set(launch.unspecialised)
    assert len(variants) == 6 and all(len(found) == 1 for found in variants.values()), {
        name: len(found) for name, found in variants.items()
    }
