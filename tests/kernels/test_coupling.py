"""The coupling operations are exact on any streams, and report what they cannot hold."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r3mem_fast.kernels import coupling
from r3mem_fast.kernels.coupling import CHECKSUM_MISMATCH, NON_FINITE, OUT_OF_RANGE, fixed_point, reference, tiles

INT32 = st.integers(-(2**31), 2**31 - 1)
BITS = st.sampled_from([None, 1, 2, 4, 8])
FRACTION_BITS = st.integers(0, 24)
GAINS = st.one_of(st.none(), st.floats(0.25, 1.0, width=32))
SIZES = st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 1000, 4097]))


def random_stream(size, seed, low=-(2**31), high=2**31):
    return torch.randint(low, high, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


@given(
    SIZES,
    BITS,
    FRACTION_BITS,
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 99),
    GAINS,
)
def test_backward_undoes_forward_on_any_streams(size, bits, fraction_bits, dtype, seed, gain):
    """Bit for bit, also where additions wrap around: the whole int32 range, any branch, even a non-finite one."""
    position, velocity = random_stream(size, seed), random_stream(size, seed + 1)
    if bits is None:
        velocity.zero_()
    branch = (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 100).to(dtype)
    branch[0] = math.nan if seed % 3 == 0 else math.inf if seed % 3 == 1 else 1.0
    x, v = position.clone(), velocity.clone()
    flags = coupling.new_flags("cpu")
    settings = {"bits": bits, "fraction_bits": fraction_bits, "dtype": dtype, "flags": flags, "gain": gain}
    hidden, kept = coupling.momentum_forward(x, v, branch, **settings)
    assert kept.side.numel() == (0 if bits is None else coupling.side_bits_size(size, bits))
    assert torch.equal(hidden, reference.dequantize(x, fraction_bits, dtype))

    entered = coupling.momentum_rewind(x, v, fraction_bits=fraction_bits, dtype=dtype)
    assert torch.equal(x, position)
    assert torch.equal(entered, reference.dequantize(position, fraction_bits, dtype))
    below, _ = coupling.momentum_backward(x, v, branch, kept, None, None, last=False, **settings)
    assert torch.equal(v, velocity)
    assert torch.equal(x, position - velocity)
    assert torch.equal(below, reference.dequantize(x, fraction_bits, dtype))


@given(st.floats(-40000, 40000, width=32), FRACTION_BITS, BITS)
def test_quantize_rounds_half_to_even(value, fraction_bits, bits):
    """Against exact rational arithmetic; the gain (1 - m) costs one float32 rounding and no more."""
    gain = 1.0 if bits is None else 1.0 - 2.0**-bits
    product = torch.tensor(value, dtype=torch.float32) * (gain * 2.0**fraction_bits)
    expected = round(Fraction(product.item()))
    expected = max(-int(reference.QUANTIZED_MAX), min(int(reference.QUANTIZED_MAX), expected))
    flags = coupling.new_flags("cpu")
    quantized = reference.quantize(torch.tensor([value, 0.0]), fraction_bits, flags, gain=gain)
    assert quantized[0].item() == expected
    assert flags.tolist() == [0, int(abs(product.item()) > reference.QUANTIZED_MAX), 0]


@pytest.mark.parametrize(("value", "expected"), [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (-2.5, -2)])
def test_ties(value, expected):
    assert reference.quantize(torch.tensor([value]), 0).item() == expected


@pytest.mark.parametrize(
    ("value", "expected", "flag"),
    [(math.nan, 0, NON_FINITE), (math.inf, 2147483520, NON_FINITE), (1e30, 2147483520, OUT_OF_RANGE)],
)
@pytest.mark.parametrize("size", [1, 33])
def test_what_cannot_be_quantized_is_reported(value, expected, flag, size):
    flags = coupling.new_flags("cpu")
    values = torch.ones(size)
    values[size // 2] = value
    quantized = reference.quantize(values, 16, flags)
    assert quantized[size // 2] == expected and flags[flag] == 1
    assert flags[CHECKSUM_MISMATCH] == 0
    assert (quantized == 65536).sum() == size - 1


@given(INT32, INT32, st.integers(1, 40))
def test_overflow_of_an_addition_is_reported_exactly(stream, addend, size):
    """OUT_OF_RANGE if and only if the true sum does not fit, whatever the other elements are."""
    streams = torch.zeros(size, dtype=torch.int32)
    addends = torch.zeros(size, dtype=torch.int32)
    streams[-1], addends[-1] = stream, addend
    flags = coupling.new_flags("cpu")
    fixed_point.add_checked_(streams, addends, flags)
    assert flags.tolist() == [0, int(not -(2**31) <= stream + addend < 2**31), 0]
    assert (streams[-1].item() - stream - addend) % 2**32 == 0


@given(SIZES, st.sampled_from([1, 2, 4, 8]), st.integers(0, 9))
def test_side_bits_take_their_bytes_and_no_more(size, bits, seed):
    velocity = random_stream(size, seed)
    packed = reference.pack_side_bits(velocity, bits)
    assert packed.dtype == torch.uint8
    assert packed.nbytes == coupling.side_bits_size(size, bits) < -(-size * bits // 8) + 16
    cleared = velocity >> bits << bits
    assert torch.equal(reference.unpack_side_bits_(cleared, packed, bits), velocity)


def test_side_bits_layout():
    """Planar within a tile: byte i holds elements i, i + P, ... from its low bits up. Kernels rely on it."""
    packed = reference.pack_side_bits(torch.arange(40, dtype=torch.int32), 4)
    assert packed.numel() == 32
    assert packed.tolist() == [(i % 16) | (((i + 32) % 16) << 4 if i < 8 else 0) for i in range(32)]
    velocity = random_stream(coupling.TILE + 40, seed=0)
    packed = reference.pack_side_bits(velocity, 4)
    half = coupling.TILE // 2
    low = velocity & 15
    assert torch.equal(packed[:half], (low[:half] | low[half : 2 * half] << 4).to(torch.uint8))
    assert torch.equal(packed[half:], reference.pack_side_bits(velocity[coupling.TILE :], 4))


@given(SIZES, st.data())
def test_stream_checksums_see_any_one_changed_element(size, data):
    position, velocity = random_stream(size, 1), random_stream(size, 2)
    before = reference.stream_sums(position, velocity)
    assert before.dtype == torch.int64 and before.numel() == -(-size // coupling.TILE)
    assert torch.equal(reference.stream_sums(position.clone(), velocity.clone()), before)
    changed = data.draw(st.sampled_from([position, velocity]))
    index = data.draw(st.integers(0, size - 1))
    changed[index] ^= 1 << data.draw(st.integers(0, 30))
    differs = reference.stream_sums(position, velocity) != before
    assert differs.nonzero().tolist() == [[index // coupling.TILE]]


def test_stream_checksums_formula_and_chunks():
    """The formula that other implementations follow, in Python's integers, over more than one chunk."""
    size = tiles._TILES_AT_ONCE * coupling.TILE + coupling.TILE + 3
    position, velocity = random_stream(size, 3), random_stream(size, 4)
    sums = reference.stream_sums(position, velocity).tolist()
    assert len(sums) == tiles._TILES_AT_ONCE + 2

    def signed(value, bits):
        return (value + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)

    for tile in (0, tiles._TILES_AT_ONCE, tiles._TILES_AT_ONCE + 1):
        of_tile = slice(tile * coupling.TILE, (tile + 1) * coupling.TILE)
        expected = 0
        for i, (x, v) in enumerate(zip(position[of_tile].tolist(), velocity[of_tile].tolist(), strict=True)):
            expected += signed((2 * i + 1) * tiles.POSITION_WEIGHT, 32) * x
            expected += signed((2 * i + 1) * tiles.VELOCITY_WEIGHT, 32) * v
        assert sums[tile] == signed(expected, 64)
    assert reference.stream_sums(velocity, position).tolist() != sums


@given(st.lists(BITS.filter(lambda b: b is not None), min_size=1, max_size=5), st.integers(0, 9))
def test_gradients_are_autograds(bits, seed):
    """The vector-Jacobian product over several layers, against autograd through the float recurrence in float64."""
    generator = torch.Generator().manual_seed(seed)
    bits = [None, *bits]
    weights = [torch.randn(6, 6, generator=generator, dtype=torch.float64) / 3 for _ in bits]
    start = torch.randn(2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    inputs, x, v = [], start, torch.zeros(2, 6, dtype=torch.float64)
    for b, weight in zip(bits, weights, strict=True):
        m = 0.0 if b is None else 2.0**-b
        inputs.append(x)
        v = m * v + (1 - m) * torch.tanh(x @ weight)
        x = x + v
    grad = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad(x, start, grad, retain_graph=True)

    grad_velocity, bits_above, flags = None, None, coupling.new_flags("cpu")
    for b, weight, entered in reversed(list(zip(bits, weights, inputs, strict=True))):
        value = torch.tanh(entered @ weight).detach().float()
        grad_f, grad_velocity = reference.momentum_gradient(
            grad,
            grad_velocity,
            value,
            reference.branch_sums(value),
            bits=b,
            bits_above=bits_above,
            flags=flags,
            dtype=torch.float64,
        )
        entered = entered.detach().requires_grad_()
        (through,) = torch.autograd.grad(torch.tanh(entered @ weight), entered, grad_f)
        stream = torch.zeros(2, 6, dtype=torch.int32)
        side = None if b is None else torch.zeros(coupling.side_bits_size(12, b), dtype=torch.uint8)
        _, grad = reference.momentum_backward(
            stream,
            stream.clone(),
            value,
            side,
            None,
            grad,
            through,
            bits=b,
            fraction_bits=16,
            flags=flags,
            dtype=torch.float32,
            last=False,
        )
        bits_above = b
    torch.testing.assert_close(grad, expected)


def test_inputs_are_validated():
    stream, branch, flags = torch.zeros(2, 8, dtype=torch.int32), torch.zeros(2, 8), coupling.new_flags("cpu")
    settings = {"bits": 4, "fraction_bits": 16, "flags": flags, "dtype": torch.float32}
    forward = coupling.momentum_forward
    with pytest.raises(TypeError, match=r"position must be a contiguous int32 tensor, got torch.int64 \[2, 8\]"):
        forward(stream.long(), stream.clone(), branch, **settings)
    with pytest.raises(TypeError, match="velocity must be a contiguous"):
        forward(stream, stream.clone().t().contiguous().t(), branch, **settings)
    with pytest.raises(ValueError, match=r"velocity \[1, 8\] and position \[2, 8\] must agree"):
        forward(stream, stream[:1].clone(), branch, **settings)
    with pytest.raises(ValueError, match=r"branch \[8\] and position \[2, 8\] must agree"):
        forward(stream, stream.clone(), branch[0], **settings)
    with pytest.raises(TypeError, match=r"bfloat16, float16 or float32, got torch.float64"):
        forward(stream, stream.clone(), branch.double(), **settings)
    with pytest.raises(ValueError, match="bits must be one of"):
        forward(stream, stream.clone(), branch, **{**settings, "bits": 3})
    with pytest.raises(ValueError, match=r"flags must be contiguous int32 \[3\] on cpu, got torch.int64 \[3\] on cpu"):
        forward(stream, stream.clone(), branch, **{**settings, "flags": flags.long()})
    with pytest.raises(ValueError, match="branch on meta and position on cpu must be on one device"):
        forward(stream, stream.clone(), branch.to("meta"), **settings)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.24"):
        forward(stream, stream.clone(), branch, **{**settings, "fraction_bits": 25})
    sums = torch.zeros(1, dtype=torch.int32)
    backward = {**settings, "last": False}
    for side in (torch.zeros(3, dtype=torch.uint8), torch.zeros(16)):
        kept = coupling.Kept(side, sums, sums.long()[:0])
        with pytest.raises(
            ValueError, match=r"kept.side must be contiguous torch.uint8 \[16\] on cpu for 4 side bits"
        ):
            coupling.momentum_backward(stream, stream.clone(), branch, kept, None, None, **backward)
    kept = coupling.Kept(torch.zeros(16, dtype=torch.uint8), sums, sums.long()[:0])
    with pytest.raises(ValueError, match="of a forward pass with sum_streams=True"):
        coupling.momentum_backward(stream, stream.clone(), branch, kept, None, None, **{**backward, "last": True})
    with pytest.raises(TypeError, match=r"grad_branch must be bfloat16, float16 or float32, got torch.float64"):
        coupling.momentum_backward(stream, stream.clone(), branch, kept, branch, branch.double(), **backward)
    with pytest.raises(TypeError, match=r"dtype must be torch.bfloat16, float16 or float32, got torch.float64"):
        forward(stream, stream.clone(), branch, **{**settings, "dtype": torch.float64})
    with pytest.raises(ValueError, match=r"flags must be contiguous int32"):
        forward(stream, stream.clone(), branch, **{**settings, "flags": torch.zeros(3, 2, dtype=torch.int32)[:, 0]})
    with pytest.raises(ValueError, match="must both be given, or neither"):
        coupling.momentum_backward(stream, stream.clone(), branch, kept, branch, None, **backward)
    with pytest.raises(ValueError, match=r"grad_branch \[8\] and branch \[2, 8\] must agree"):
        coupling.momentum_backward(stream, stream.clone(), branch, kept, branch, branch[0], **backward)
    gradient = {"bits": 4, "bits_above": 4, "flags": flags, "dtype": torch.float32}
    for gradient_of in (coupling.momentum_gradient, coupling.inverse_gradient):
        with pytest.raises(TypeError, match="grad_velocity must be a contiguous float32"):
            gradient_of(branch, branch.half(), branch, kept, **gradient)
        with pytest.raises(ValueError, match=r"grad_velocity \[8\] and branch \[2, 8\] must agree"):
            gradient_of(branch, branch[0], branch, kept, **gradient)
    for wrong in (sums.expand(2), sums.long()):
        with pytest.raises(ValueError, match=r"kept.branch_sums must be contiguous torch.int32 \[1\] on cpu"):
            coupling.momentum_gradient(branch, None, branch, kept._replace(branch_sums=wrong), **gradient)
    with pytest.raises(ValueError, match=r"grad_output \[8\] and branch \[2, 8\] must agree"):
        coupling.momentum_gradient(branch[0], None, branch, kept, **gradient)


@given(SIZES, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.data())
def test_branch_checksums_see_any_one_changed_bit(size, dtype, data):
    branch = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    before = reference.branch_sums(branch)
    assert before.dtype == torch.int32 and before.numel() == -(-size // coupling.TILE)
    assert torch.equal(reference.branch_sums(branch.clone()), before)
    integers = branch.view(torch.int16 if branch.element_size() == 2 else torch.int32)
    index = data.draw(st.integers(0, size - 1))
    integers[index] ^= 1 << data.draw(st.integers(0, 14))
    assert (reference.branch_sums(branch) != before).nonzero().tolist() == [[index // coupling.TILE]]


@pytest.mark.parametrize("top", [True, False])
def test_a_changed_branch_poisons_the_gradient_of_its_tile(top):
    """The flag is set, and the tile's gradient is NaN; the others' are what they are otherwise."""
    size, tile = 3 * coupling.TILE - 5, coupling.TILE
    branch, grad = torch.randn(size), torch.randn(size)
    position, velocity, flags = random_stream(size, 0, -9, 9), random_stream(size, 1, -9, 9), coupling.new_flags("cpu")
    settings = {"bits": 4, "flags": flags, "dtype": torch.float32}
    _, kept = coupling.momentum_forward(position, velocity, branch, fraction_bits=14, **settings)

    def gradient():
        carried = None if top else torch.ones(size)
        return coupling.momentum_gradient(grad, carried, branch, kept, bits_above=2, **settings)[0]

    expected = gradient()
    assert flags.tolist() == [0, 0, 0] and expected.isfinite().all()
    branch[tile + 7] += 1
    computed = gradient()
    assert flags.tolist() == [0, 0, 1]
    assert computed[tile : 2 * tile].isnan().all()
    assert torch.equal(computed[:tile], expected[:tile]) and torch.equal(computed[2 * tile :], expected[2 * tile :])


def test_streams_that_do_not_come_back_are_reported_where_the_backward_pass_ends():
    size = coupling.TILE + 9
    for changed in (False, True):
        position, velocity = random_stream(size, 0, -9, 9), random_stream(size, 1, -9, 9)
        flags, branch = coupling.new_flags("cpu"), torch.randn(size)
        settings = {"bits": 2, "fraction_bits": 14, "flags": flags, "dtype": torch.float32}
        _, kept = coupling.momentum_forward(position, velocity, branch, sum_streams=True, **settings)
        coupling.momentum_rewind(position, velocity, fraction_bits=14, dtype=torch.float32)
        if changed:
            position[-1] ^= 1
        hidden, grad = coupling.momentum_backward(position, velocity, branch, kept, None, None, last=True, **settings)
        assert hidden is None and grad is None
        assert flags.tolist() == [0, 0, int(changed)]
