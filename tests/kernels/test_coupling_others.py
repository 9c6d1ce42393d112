"""The other couplings are exact on any streams, and compute what their formulas say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r3mem_fast.kernels import coupling
from r3mem_fast.kernels.coupling import CHECKSUM_MISMATCH, OUT_OF_RANGE, others

SHAPES = st.tuples(st.integers(1, 3), st.one_of(st.integers(1, 70), st.sampled_from([127, 1365, 4097])))
BITS = st.sampled_from([None, 1, 2, 4, 8])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SETTINGS = {"fraction_bits": 14, "dtype": torch.float32}


def streams_of(shape, seed, reach=2**31):
    generator = torch.Generator().manual_seed(seed)
    x, v = (torch.randint(-reach, reach, shape, generator=generator, dtype=torch.int32) for _ in range(2))
    return x, v, torch.randn(shape, generator=generator) * 100


def signs_of(rows, seed):
    return torch.randint(0, 2, (rows,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32) * 2 - 1


@given(SHAPES, BITS, st.integers(0, 24), DTYPES, st.integers(0, 99))
def test_backward_undoes_bdia_on_any_streams(shape, bits, fraction_bits, dtype, seed):
    """Bit for bit, also where additions wrap around."""
    x, v, branch = streams_of(shape, seed)
    v = torch.zeros_like(v) if bits is None else v
    position, velocity, branch, signs = x.clone(), v.clone(), branch.to(dtype), signs_of(shape[0], seed)
    flags = coupling.new_flags("cpu")
    settings = {"bits": bits, "fraction_bits": fraction_bits, "flags": flags}
    _, kept = others.bdia_forward(position, velocity, branch, signs, dtype=dtype, sum_streams=True, **settings)
    coupling.momentum_rewind(position, velocity, fraction_bits=fraction_bits, dtype=dtype)
    flags.zero_()
    others.bdia_backward(position, velocity, branch, kept, signs, last=True, **settings)
    assert torch.equal(position, x) and torch.equal(velocity, v) and not flags.any()


@given(SHAPES, BITS, st.booleans(), st.integers(0, 24), DTYPES, st.integers(0, 99))
def test_backward_undoes_two_steps_on_any_streams(shape, bits, residual, fraction_bits, dtype, seed):
    """Bit for bit, also where additions wrap around."""
    x, w, branch = streams_of(shape, seed)
    position, previous, branch = x.clone(), w.clone(), branch.to(dtype)
    flags = coupling.new_flags("cpu")
    settings = {"bits": bits, "residual": residual, "fraction_bits": fraction_bits, "flags": flags}
    _, kept = others.two_step_forward(position, previous, branch, dtype=dtype, sum_streams=True, **settings)
    assert torch.equal(previous, x)
    others.two_step_rewind(position, previous, fraction_bits=fraction_bits, dtype=dtype)
    flags.zero_()
    others.two_step_backward(position, previous, branch, kept, last=True, **settings)
    assert torch.equal(position, x) and torch.equal(previous, w) and not flags.any()


@pytest.mark.parametrize("sign", [1, -1, 0])
def test_bdia_computes_its_formula(sign):
    x, v, branch = streams_of((2, 50), 0, reach=2**20)
    position, velocity, flags = x.clone(), v.clone(), coupling.new_flags("cpu")
    signs = torch.full((2,), sign, dtype=torch.int32)
    hidden, _ = others.bdia_forward(position, velocity, branch, signs, bits=2, flags=flags, **SETTINGS)
    real_x, real_v = x.double() / 2**14, v.double() / 2**14
    expected = sign * real_v / 4 + (1 - sign / 4) * branch.double()
    assert (velocity.double() / 2**14 - expected).abs().max() <= 2 * 2**-14
    assert (hidden.double() - real_x - expected).abs().max() <= 3 * 2**-14


@pytest.mark.parametrize(("residual", "bits", "scale"), [(False, None, 1.0), (True, 2, 0.25), (True, 8, 2.0**-8)])
def test_two_steps_compute_their_formula(residual, bits, scale):
    x, w, branch = streams_of((2, 50), 0, reach=2**20)
    flags = coupling.new_flags("cpu")
    hidden, _ = others.two_step_forward(
        x.clone(), w.clone(), branch, bits=bits, residual=residual, flags=flags, **SETTINGS
    )
    real_x, real_w = x.double() / 2**14, w.double() / 2**14
    expected = scale * real_w + residual * real_x + branch.double()
    assert (hidden.double() - expected).abs().max() <= 3 * 2**-14


def test_what_is_out_of_range_is_reported():
    x = torch.full((1, 40), 2**31 - 5, dtype=torch.int32)
    for forward, more in (
        (others.bdia_forward, {"bits": None}),
        (others.two_step_forward, {"bits": None, "residual": True}),
    ):
        flags = coupling.new_flags("cpu")
        signs = [torch.ones(1, dtype=torch.int32)] if forward is others.bdia_forward else []
        forward(x.clone(), x.clone(), torch.ones(1, 40), *signs, flags=flags, **SETTINGS, **more)
        assert flags[OUT_OF_RANGE] == 1


def test_another_branch_or_sign_is_found_out():
    """A gradient is NaN where the branch is another one; streams that were taken apart wrongly set a flag."""
    x, v, branch = streams_of((2, 5000), 0, reach=2**20)
    position, velocity, signs, flags = x.clone(), v.clone(), signs_of(2, 0), coupling.new_flags("cpu")
    _, kept = others.bdia_forward(position, velocity, branch, signs, bits=2, flags=flags, sum_streams=True, **SETTINGS)
    changed = branch.clone()
    changed[0, 0] += 1
    gradient, _ = others.bdia_gradient(
        torch.ones_like(branch), None, changed, kept, signs, bits=2, flags=flags, dtype=torch.float32
    )
    assert gradient.flatten()[:4096].isnan().all() and gradient.flatten()[4096:].isfinite().all()
    assert flags[CHECKSUM_MISMATCH] == 1
    flags.zero_()
    coupling.momentum_rewind(position, velocity, **SETTINGS)
    others.bdia_backward(position, velocity, branch, kept, -signs, bits=2, fraction_bits=14, flags=flags, last=True)
    assert flags[CHECKSUM_MISMATCH] == 1
