"""Reading backward: both forms are exact, train with the gradients of stored activations, and decode with a cache."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

from r3mem_fast import IntegrityError, MomentumCoupling, check_gradients, check_inverse, make_reversible
from r3mem_fast.kernels import coupling
from r3mem_fast.reversible.convert import stack_of
from r3mem_fast.reversible.direction import core_of, momentum_bits, reading_backward
from r3mem_fast.reversible.stack import Mode

from .tiny import EXACT_FAMILIES, GENERIC_FAMILIES, assert_gradients_as_stored, build, token_ids

FAMILIES = [*EXACT_FAMILIES, *GENERIC_FAMILIES]
pytestmark = pytest.mark.filterwarnings("ignore:.*no exact branch is known:UserWarning")


@pytest.mark.parametrize("form", ["reversed", "inverse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_backward_exactly(family, form):
    model = make_reversible(build(family, scale=2.0), MomentumCoupling(bits=2))
    ids = token_ids()
    for core in ("all", (1, 3), (0, 2), (2, 4)):
        with reading_backward(model, core, form=form):
            report = check_inverse(model, ids)
            assert report.exact and report.layers == 4
            assert check_gradients(model, ids).max_relative_error == 0.0


@pytest.mark.parametrize("form", ["reversed", "inverse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(form, dtype):
    model = make_reversible(build(dtype=dtype, scale=2.0))
    with reading_backward(model, (1, 3), form=form, backward_momentum=1 / 4):
        assert check_inverse(model, token_ids()).exact
        assert_gradients_as_stored(model, token_ids(), tolerance=0.02)


@pytest.mark.parametrize("form", ["reversed", "inverse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_is_valid_in_this_direction(family, form):
    """Token by token, with each layer's own place in the cache, as all tokens at once."""
    # A fine grid: the inverse form amplifies what differs by a step of it.
    model = make_reversible(build(family, scale=2.0).eval(), MomentumCoupling(fraction_bits=22))
    ids = token_ids(batch=1, tokens=20)  # longer than the sliding windows
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        with reading_backward(model, (1, 4), form=form):
            whole = model(input_ids=ids, use_cache=False).logits
            steps = [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(20)]
    assert (torch.cat(steps, 1) - whole).abs().max() <= 1e-4 * whole.abs().max()


def test_the_order_is_the_one_of_the_design():
    """[0..a-1, b-1..a, b..L-1]; and nothing of it stays behind, also after an error."""
    model = make_reversible(build(scale=2.0))
    layers = list(model.model.layers)
    seen = []
    hooks = [layer.register_forward_hook(lambda m, a, o, i=i: seen.append(i)) for i, layer in enumerate(layers)]
    ids = token_ids()
    before = model(input_ids=ids).logits
    with pytest.raises(KeyError), reading_backward(model, (1, 3)):
        seen.clear()
        assert not torch.equal(model(input_ids=ids).logits, before)
        assert seen == [0, 2, 1, 3]
        raise KeyError
    seen.clear()
    assert torch.equal(model(input_ids=ids).logits, before)
    assert seen == [0, 1, 2, 3] and list(model.model.layers) == layers
    for hook in hooks:
        hook.remove()


def test_a_core_of_one_layer_is_the_forward_direction():
    model = make_reversible(build(scale=2.0))
    with reading_backward(model, (2, 3)):
        backward = model(input_ids=token_ids()).logits
    assert torch.equal(backward, model(input_ids=token_ids()).logits)


def test_masks_follow_the_layers():
    """A layer with a sliding window keeps it, wherever it runs."""
    changes = {
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2,
    }
    model = make_reversible(build("qwen3", scale=2.0, **changes).eval())
    windows = []

    def note(layer, args, kwargs, output):
        mask = kwargs["attention_mask"]
        windows.append((layer.self_attn.layer_idx, not bool(mask[0, 0, -1, 1])))

    for layer in model.model.layers:
        layer.register_forward_hook(note, with_kwargs=True)
    ids = token_ids(batch=1)
    padded = torch.ones_like(ids)
    padded[0, 0] = 0  # so that masks are made
    with torch.no_grad(), reading_backward(model, "all"):
        model(input_ids=ids, attention_mask=padded, use_cache=False)
    assert [index for index, _ in windows] == [3, 2, 1, 0]
    assert [cut for _, cut in windows] == [False, False, True, True]


def test_gradients_flow_between_both_directions():
    """One loss of a forward and a backward pass, as the bidirectional objective has it."""
    model = make_reversible(build(scale=2.0))
    ids = token_ids()

    def gradients():
        loss = model(input_ids=ids, labels=ids).loss
        with reading_backward(model, (1, 3), form="inverse"):
            loss = loss + model(input_ids=ids, labels=ids).loss
        return torch.autograd.grad(loss, list(model.parameters()))

    computed = gradients()
    stack_of(model).mode = Mode.STORED
    assert all(torch.equal(a, b) for a, b in zip(computed, gradients(), strict=True))


def test_leaving_the_range_raises():
    model = make_reversible(build(scale=2.0, num_hidden_layers=8), MomentumCoupling(fraction_bits=20))
    with reading_backward(model, "all", form="inverse", backward_momentum=1 / 256):
        with pytest.raises(IntegrityError, match="left the range"):
            model(input_ids=token_ids())
        with torch.no_grad(), pytest.raises(IntegrityError, match="left the range"):
            model(input_ids=token_ids())


def test_a_branch_that_changes_is_noticed_in_the_inverse_form():
    model = make_reversible(build(scale=2.0))
    with reading_backward(model, (1, 3), form="inverse"):
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)
    with pytest.raises(IntegrityError, match="did not find again"):
        loss.backward()


@pytest.mark.parametrize("core", [(2, 2), (3, 1), (0, 5), (-1, 2), "some", (1,), 3, None])
def test_cores_that_do_not_fit(core):
    with pytest.raises(ValueError, match="core must be 'all' or"):
        core_of(core, 4)


def test_other_bad_settings():
    model = build()
    with pytest.raises(ValueError, match="not reversible"), reading_backward(model):
        pass
    make_reversible(model)
    with reading_backward(model), pytest.raises(ValueError, match="read backward already"), reading_backward(model):
        pass
    with pytest.raises(ValueError, match="form must be one of"), reading_backward(model, form="sideways"):
        pass
    for momentum in (0, 1, 0.3, 1 / 8, "half"):
        with pytest.raises(ValueError, match="backward_momentum must be one of"):
            momentum_bits(momentum)
    assert [momentum_bits(2.0**-bits) for bits in (1, 2, 4, 8)] == [1, 2, 4, 8]


@given(
    numel=st.integers(1, 300),
    bits=st.sampled_from([1, 2, 4, 8]),
    layers=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_the_inverse_form_is_undone_bit_for_bit(numel, bits, layers, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    flags = coupling.new_flags("cpu")
    hidden = torch.randn(numel, generator=generator)
    position, velocity, _ = coupling.momentum_enter(hidden, fraction_bits=8, flags=flags)
    start = position.clone()
    branches = [torch.randn(numel, generator=generator).to(dtype) for _ in range(layers)]
    settings = {"fraction_bits": 8, "flags": flags, "dtype": dtype, "bits": bits if bits < 8 or layers < 2 else 4}
    kept = [
        coupling.inverse_forward(position, velocity, branch, sum_streams=i == 0, **settings)[1]
        for i, branch in enumerate(branches)
    ]
    assert not flags.any()
    coupling.inverse_rewind(position, velocity, fraction_bits=8, dtype=dtype)
    for i in reversed(range(layers)):
        coupling.inverse_backward(position, velocity, branches[i], kept[i], None, None, last=i == 0, **settings)
    assert torch.equal(position, start) and not velocity.any() and not flags.any()


def test_the_inverse_form_is_the_inverse_of_the_coupling():
    """One layer of it, from rest, is what `momentum_backward` does to a velocity of zero, with no side bits set."""
    torch.manual_seed(0)
    branch = torch.randn(50)
    flags = coupling.new_flags("cpu")
    settings = {"bits": 2, "fraction_bits": 10, "flags": flags, "dtype": torch.float32}
    position, velocity, _ = coupling.momentum_enter(torch.randn(50), fraction_bits=10, flags=flags)
    other, at_rest = position.clone(), velocity.clone()
    coupling.inverse_forward(position, velocity, branch, **settings)
    _, kept = coupling.momentum_forward(other.clone(), at_rest.clone(), branch, **settings)
    coupling.momentum_backward(other, at_rest, branch, kept, None, None, last=False, **settings)
    assert torch.equal(position, other) and torch.equal(velocity, -at_rest)


def test_what_the_inverse_form_refuses():
    position = torch.zeros(4, dtype=torch.int32)
    flags = coupling.new_flags("cpu")
    settings = {"fraction_bits": 8, "flags": flags, "dtype": torch.float32}
    with pytest.raises(ValueError, match="no layer of the inverse form has m = 0"):
        coupling.inverse_forward(position, position.clone(), torch.zeros(4), bits=None, **settings)
    velocity = torch.full((4,), 2**30, dtype=torch.int32)
    coupling.inverse_forward(position, velocity, torch.zeros(4), bits=2, **settings)
    assert flags[coupling.OUT_OF_RANGE]
