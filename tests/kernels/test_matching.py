"""Attention Matching: the specification against a loop in float64, the operators, refusals, and what it is for."""

import pytest
import torch
from hypothesis import example, given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from r3mem_fast.kernels import matching
from r3mem_fast.kernels.common import dispatch
from r3mem_fast.kernels.matching import attention_scores, reference, value_system
from r3mem_fast.kernels.matching.arguments import MatchingInputs

from .matching import Case, assert_within_budget, cases, clean, expected_scores, expected_system

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)


def options(inputs, case):
    found = {name: getattr(inputs, name) for name in ("query_positions", "key_positions", "sinks")}
    return {**found, "softcap": case.softcap, "window": case.window}


def scores_of(inputs, case):
    """Through the API."""
    return attention_scores(*inputs[:3], **options(inputs, case))


def system_of(inputs, target, case):
    return value_system(*inputs[:3], target, **options(inputs, case))


@settings(max_examples=60)
@given(cases(DTYPES, most=24))
@example(Case(shared=2, group=3, queries=9, keys=11, ahead=9, sinks=True, softcap=2.0, key_padding=0.2))
@example(Case(shared=2, group=3, queries=9, keys=11, sinks=True, window=4, dtype=torch.float64, query_padding=0.2))
def test_it_is_what_a_loop_in_float64_gives(case):
    """In float64 to the last digits; in other dtypes within twice the error that eager has."""
    tensors = case.tensors()
    inputs, target = tensors
    found = (*scores_of(inputs, case), *system_of(inputs, target, case))
    exact, eager = (
        (*expected_scores(tensors, case.settings, eager=eager), *expected_system(tensors, case.settings, eager=eager))
        for eager in (False, True)
    )
    rows, shared, queries, keys, dim = case.rows, case.shared, case.queries, case.keys, case.head_dim
    heads = shared * case.group
    shapes = [(rows, shared, keys), (rows, heads, queries), (rows, heads, queries, dim)]
    shapes += [(rows, shared, keys, keys), (rows, shared, keys, dim), (rows, heads, queries)]
    for name, ours, one, other, shape in zip(
        ("scores", "lse", "output", "gram", "residual", "lse of the kept"), found, exact, eager, shapes, strict=True
    ):
        assert ours.shape == shape and ours.dtype == torch.promote_types(case.dtype, torch.float32), name
        # float64 has no eager of its own kind: its softmax is in float32.
        wide = case.dtype == torch.float64
        assert_within_budget(ours, one, one if wide else other, name, floor=1e-12 if wide else 2e-6)


@settings(max_examples=40)
@given(cases([torch.float32, torch.bfloat16], rows=3))
def test_a_padded_row_is_the_row_alone_bit_for_bit(case):
    """What exists of it, put together: other rows, and the places of padding, change no bit."""
    inputs, target = case.tensors()
    batched = (*scores_of(inputs, case), *system_of(inputs, target, case))
    for row in range(case.rows):
        queries = inputs.query_positions[row] >= 0
        for key_head in range(case.shared):
            keys = inputs.key_positions[row, key_head] >= 0
            heads = slice(key_head * case.group, (key_head + 1) * case.group)
            alone = MatchingInputs(
                inputs.query[row, None, heads, queries],
                inputs.key[row, None, key_head, None, keys],
                inputs.value[row, None, key_head, None, keys],
                inputs.query_positions[row, None, queries],
                inputs.key_positions[row, None, key_head, None, keys],
                None if inputs.sinks is None else inputs.sinks[heads],
            )
            scores, lse, output = scores_of(alone, case)
            gram, residual, kept = system_of(alone, target[row, None, heads, queries], case)
            of_batch = [
                batched[0][row, key_head, keys],
                batched[1][row, heads, queries],
                batched[2][row, heads, queries],
                batched[3][row, key_head][keys][:, keys],
                batched[4][row, key_head, keys],
                batched[5][row, heads, queries],
            ]
            for one, other in zip(
                (scores[0, 0], lse[0], output[0], gram[0, 0], residual[0, 0], kept[0]), of_batch, strict=True
            ):
                assert torch.equal(one, other)


def test_long_rows_are_cut_into_blocks(monkeypatch):
    """Blocks of queries give what all of them give at once, and the same at every run."""
    case = Case(group=3, queries=50, keys=31, ahead=3, key_padding=0.2, sinks=True, window=25)
    inputs, target = case.tensors()
    whole = (*scores_of(inputs, case), *system_of(inputs, target, case))
    assert case.queries * case.keys > 10 * 100
    monkeypatch.setattr(reference, "_BLOCK", 100)
    cut = (*scores_of(inputs, case), *system_of(inputs, target, case))
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=2e-6)
    again = (*scores_of(inputs, case), *system_of(inputs, target, case))
    assert all(torch.equal(one, other) for one, other in zip(cut, again, strict=True))


def test_what_does_not_exist_may_be_nan():
    case = Case(shared=2, queries=20, keys=20, query_padding=0.4, key_padding=0.4)
    tensors = case.tensors()
    assert all(tensor.isnan().any() for tensor in (*tensors[0][:3], tensors[1]))
    inputs, target = clean(tensors)
    for one, other in zip(scores_of(tensors[0], case), scores_of(inputs, case), strict=True):
        assert torch.equal(one, other) and not one.isnan().any()
    for one, other in zip(system_of(*tensors, case), system_of(inputs, target, case), strict=True):
        assert torch.equal(one, other) and not one.isnan().any()


@pytest.mark.parametrize("sinks", [False, True])
def test_queries_that_see_nothing(sinks):
    """Those before all keys, and those that do not exist: an lse of -inf and zeros, even where there is a sink."""
    case = Case(queries=4, keys=3, sinks=sinks, poisoned=False)
    inputs, target = case.tensors()
    inputs.query_positions[:] = torch.tensor([0, 4, -1, 9])
    inputs.key_positions[:] = torch.tensor([5, 6, -1])
    scores, lse, output = scores_of(inputs, case)
    assert (lse[:, :, :3] == -torch.inf).all() and lse[:, :, 3].isfinite().all()
    assert (output[:, :, :3] == 0).all() and (output[:, :, 3] != 0).any() and (scores[..., 2] == 0).all()
    assert scores.sum() <= case.rows * (1 + 1e-6)
    one = system_of(inputs, target, case)
    other = system_of(inputs._replace(query_positions=torch.full_like(inputs.query_positions, -5)), target, case)
    assert (one[0][..., 2, :] == 0).all() and (one[0][..., 2] == 0).all() and (one[1][..., 2, :] == 0).all()
    assert (other[0] == 0).all() and (other[1] == 0).all() and (other[2] == -torch.inf).all()
    assert torch.equal(one[2], lse)


@pytest.mark.parametrize("rows, queries, keys", [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_nothing_to_do(rows, queries, keys):
    case = Case(rows=rows, queries=queries, keys=keys)
    inputs, target = case.tensors()
    scores, lse, output = scores_of(inputs, case)
    assert (scores == 0).all() and (lse == -torch.inf).all() and (output == 0).all()
    gram, residual, lse = system_of(inputs, target, case)
    assert gram.shape == (rows, 1, keys, keys) and (gram == 0).all() and (residual == 0).all()
    assert (lse == -torch.inf).all()


def test_logits_of_any_size():
    """Where exponentials overflow or underflow, one weight is 1 and the others 0."""
    case = Case(queries=3, keys=5, ahead=9, poisoned=False)
    inputs, _ = case.tensors()
    for factor in (1e4, -1e4):
        scores, lse, output = scores_of(inputs._replace(query=inputs.query * factor), case)
        assert lse.isfinite().all() and output.isfinite().all()
        torch.testing.assert_close(scores.sum(-1), torch.full((2, 1), 3.0))


def test_a_window_longer_than_any_position():
    case = Case(queries=5, keys=6, query_padding=0.3)
    inputs, _ = case.tensors()
    for one, other in zip(
        attention_scores(*inputs[:3], **options(inputs, case) | {"window": 10**12}),
        scores_of(inputs, case),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_all_keys_kept_leave_no_residual():
    """The target is then what the kept keys give as they are."""
    case = Case(shared=2, group=3, queries=30, keys=20, key_padding=0.2, dtype=torch.float64, softcap=3.0, sinks=True)
    inputs, _ = case.tensors()
    _, lse, output = scores_of(inputs, case)
    _, residual, lse_of_kept = system_of(inputs, output, case)
    assert residual.abs().max() < 1e-12 and torch.equal(lse, lse_of_kept)


def test_matched_values_give_almost_what_all_keys_gave():
    """Least squares by these equations: a quarter of the keys, the best scored; much closer with their new values."""
    case = Case(rows=1, group=4, queries=64, keys=48, ahead=1, head_dim=8, dtype=torch.float64, poisoned=False)
    inputs, _ = case.tensors()
    scores, _, output = scores_of(inputs, case)
    kept = scores.topk(12).indices.sort().values
    places = kept[..., None].expand(-1, -1, -1, 8)
    key, value = inputs.key.gather(2, places), inputs.value.gather(2, places)
    few = inputs._replace(key=key, value=value, key_positions=inputs.key_positions.gather(2, kept))
    gram, residual, _ = system_of(few, output, case)
    change = torch.linalg.solve(gram, residual)
    matched = few._replace(value=value + change)
    before, after = ((scores_of(one, case)[2] - output).square().sum() for one in (few, matched))
    assert after < 0.7 * before
    # Where the squared error is least, there is nothing left to gain.
    assert system_of(matched, output, case)[1].abs().max() < 1e-10
    for _ in range(3):
        other = matched._replace(value=matched.value + 0.01 * torch.randn_like(value))
        assert (scores_of(other, case)[2] - output).square().sum() > after


@pytest.mark.parametrize("sinks", [False, True])
def test_operators(sinks):
    """Schemas, fake implementations and compilation, by PyTorch's own checks."""
    case = Case(group=2, shared=2, sinks=sinks, query_padding=0.2, key_padding=0.2, poisoned=False)
    inputs, target = case.tensors()
    tensors, others = inputs[:3], (*inputs[3:], 0.25, 3, 5.0)
    torch.library.opcheck(torch.ops.r3mem.matching_attention_scores.default, (*tensors, *others))
    torch.library.opcheck(torch.ops.r3mem.matching_value_system.default, (*tensors, target, *others))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tensors_without_values(dtype):
    """Shapes and dtypes, on no device."""
    case = Case(group=2, dtype=dtype)
    inputs, target = case.tensors()
    real = (*scores_of(inputs, case), *system_of(inputs, target, case))
    with FakeTensorMode() as mode:
        fake = MatchingInputs(*(None if tensor is None else mode.from_tensor(tensor) for tensor in inputs))
        found = (*scores_of(fake, case), *system_of(fake, mode.from_tensor(target), case))
    for one, other in zip(found, real, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_autocast_changes_nothing():
    case = Case()
    inputs, target = case.tensors()
    right = (*scores_of(inputs, case), *system_of(inputs, target, case))
    with torch.autocast("cpu", torch.bfloat16):
        found = (*scores_of(inputs, case), *system_of(inputs, target, case))
    assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts on the interpreter")
def test_the_implementation_can_be_forced(monkeypatch):
    """Triton's kernels run, interpreted; float64 is not theirs."""
    case = Case(queries=2, keys=3, ahead=2)
    inputs, target = case.tensors()
    right = (*scores_of(inputs, case), *system_of(inputs, target, case))
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    from r3mem_fast.kernels.matching import triton as kernels

    ran = []
    for name in ("attention_scores", "value_system"):
        function = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, name=name, function=function: ran.append(name) or function(*a))
    found = (*scores_of(inputs, case), *system_of(inputs, target, case))
    assert ran == ["attention_scores", "value_system"]
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    with pytest.raises(RuntimeError, match="R3MEM_KERNELS=triton cannot run on cpu: the kernels compute in float32"):
        scores_of(Case(dtype=torch.float64).tensors()[0], case)
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert torch.equal(scores_of(inputs, case)[0], right[0]) and len(ran) == 2


def test_gradients_are_refused():
    case = Case()
    inputs, target = case.tensors()
    wanting = inputs._replace(value=inputs.value.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="attention_scores has no gradient"):
        scores_of(wanting, case)
    with pytest.raises(RuntimeError, match="value_system has no gradient"):
        system_of(inputs, target.clone().requires_grad_(), case)
    with torch.no_grad():
        scores_of(wanting, case)
    scores, _, _ = torch.ops.r3mem.matching_attention_scores(*wanting, 0.25, 0, 0.0)
    with pytest.raises(RuntimeError, match="matching_attention_scores has no derivative"):
        scores.sum().backward()


def test_what_does_not_fit_is_refused():
    """Each by name, before anything runs."""
    case = Case(rows=2, shared=2, group=2, queries=3, keys=4, head_dim=8)
    inputs, target = case.tensors()
    query, key, value, query_positions, key_positions, _ = inputs

    def refused(error, message, target=None, **changes):
        changed = {**inputs._asdict(), **changes}
        tensors = [changed.pop(name) for name in ("query", "key", "value")]
        with pytest.raises(error, match=message):
            if target is None:
                attention_scores(*tensors, **changed)
            else:
                value_system(*tensors, target, **changed)

    refused(TypeError, "query must be bfloat16", query=query.int())
    refused(TypeError, "key is torch.float64, query torch.float32", key=key.double())
    refused(ValueError, "value on meta and query on cpu", value=value.to("meta"))
    refused(ValueError, "key must have 4 dimensions", key=key[0])
    refused(ValueError, "must agree", value=value[:, :, 1:])
    refused(ValueError, "key has 1 rows and query 2", key=key[:1], value=value[:1])
    refused(ValueError, "key has head_dim 4, query 8", key=key[..., :4], value=value[..., :4])
    refused(ValueError, "3 query heads must be a multiple of the 2 key heads", query=query[:, :3])
    none = torch.zeros(2, 2, 4, 0)
    refused(ValueError, "head_dim must be at least 1", query=torch.zeros(2, 4, 3, 0), key=none, value=none)
    refused(TypeError, "query_positions must be int32, got torch.int64", query_positions=query_positions.long())
    refused(ValueError, r"query_positions must be \[2, 3\] on cpu", query_positions=query_positions[:, 1:])
    refused(ValueError, r"key_positions must be \[2, 2, 4\] on cpu", key_positions=key_positions[:, 0])
    refused(ValueError, "key_positions must be .* got torch.int32 .* on meta", key_positions=key_positions.to("meta"))
    refused(TypeError, "sinks must be float32", sinks=torch.zeros(4, dtype=torch.float64))
    refused(ValueError, r"sinks must be \[4\] on cpu", sinks=torch.zeros(2))
    for window in (0, 2.0):
        refused(ValueError, "window must be an integer of at least 1", window=window)
    refused(ValueError, "softcap must be finite and above 0", softcap=-1.0)
    refused(TypeError, "target must be torch.float32 for a query in torch.float32", target=target.half())
    refused(ValueError, r"target must be \[2, 4, 3, 8\] on cpu", target=target[:, :, 1:])
    many = torch.zeros(2, 2, matching.MAX_KEPT + 1, 8)
    positions = torch.zeros(many.shape[:3], dtype=torch.int32)
    refused(ValueError, "1025 kept keys: at most 1024", target=target, key=many, value=many, key_positions=positions)
