"""The Triton kernels give the reference's bits: on a GPU in every dtype, without one in Triton's interpreter."""

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r3mem_fast.kernels import coupling
from r3mem_fast.kernels.common.launch import specialise
from r3mem_fast.kernels.coupling import reference
from r3mem_fast.kernels.coupling import triton as kernels

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter computes bfloat16 wrongly.
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16][: 3 if GPU else 2])
BITS = st.sampled_from([None, 1, 2, 4, 8])
FRACTION_BITS = st.sampled_from([0, 14, 16, 24])  # on a GPU, each is a compilation
GAINS = st.one_of(st.none(), st.floats(0.25, 1.0, width=32))
TILE = coupling.TILE
SIZES = st.one_of(
    st.integers(1, 70), st.integers(TILE - 9, TILE + 9), st.integers(1, 3 * TILE), st.sampled_from([16, 2 * TILE])
)
SPECIAL = [math.nan, math.inf, -math.inf, 1e30, -1e30, 0.5, 1.5, -2.5, 2.0**22 + 0.5, 2.0**23 + 1, 3.4e38, -0.0]


def assert_same(left, right):
    """Bit for bit, NaNs too; or both absent."""
    assert (left is None) == (right is None)
    if left is not None:
        assert left.dtype == right.dtype and left.shape == right.shape
        if left.is_floating_point():
            width = {2: torch.int16, 4: torch.int32}[left.element_size()]
            # NaNs are one value: which of their patterns comes out is the hardware's choice.
            left, right = (torch.where(t.isnan(), torch.nan, t).view(width) for t in (left, right))
        assert torch.equal(left, right)


@contextlib.contextmanager
def poisoned_empty():
    """New memory is full of NaN, or of the largest integer: an element that a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Draw:
    """Random tensors on the device, from a seed."""

    def __init__(self, seed, size):
        self.generator, self.size = torch.Generator().manual_seed(seed), size

    def stream(self, low=-(2**31), high=2**31):
        return torch.randint(low, high, (self.size,), generator=self.generator, dtype=torch.int32).to(DEVICE)

    def values(self, dtype, special=False):
        values = torch.randn(self.size, generator=self.generator) * 100
        if special:
            where = torch.randint(0, self.size, (len(SPECIAL),), generator=self.generator)
            values[where] = torch.tensor(SPECIAL)
        return values.to(dtype).to(DEVICE)


@settings(max_examples=60)
@given(SIZES, BITS, FRACTION_BITS, DTYPES, DTYPES, st.booleans(), st.integers(0, 99), GAINS)
def test_forward(size, bits, fraction_bits, dtype, branch_dtype, small, seed, gain):
    """Any streams, any branch: wrapping sums, clamped and non-finite values, their flags, side bits, checksums."""
    draw = Draw(seed, size)
    limits = (-1000, 1000) if small else (-(2**31), 2**31)
    position, velocity = draw.stream(*limits), draw.stream(*limits)
    branch = draw.values(branch_dtype, special=not small)
    for keep in (True, False):
        found = []
        for module in (reference, kernels):
            x, v, flags = position.clone(), velocity.clone(), coupling.new_flags(DEVICE)
            with poisoned_empty() if module is kernels else contextlib.nullcontext():
                outputs = module.momentum_forward(
                    x,
                    v,
                    branch,
                    bits=bits,
                    fraction_bits=fraction_bits,
                    flags=flags,
                    dtype=dtype,
                    keep=keep,
                    sum_streams=keep,
                    gain=gain,
                )
            found.append([x, v, flags, *outputs])
        for left, right in zip(*found, strict=True):
            assert_same(left, right)


@settings(max_examples=60)
@given(SIZES, BITS, FRACTION_BITS, DTYPES, st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99), GAINS)
def test_backward(size, bits, fraction_bits, dtype, last, with_gradients, corrupt, seed, gain):
    draw = Draw(seed, size)
    position, velocity, branch = draw.stream(), draw.stream(), draw.values(dtype, special=True)
    grad_output, grad_branch = (draw.values(dtype), draw.values(dtype)) if with_gradients else (None, None)
    side = None if bits is None else Draw(seed, coupling.side_bits_size(size, bits)).stream(0, 256).to(torch.uint8)
    common = {"bits": bits, "fraction_bits": fraction_bits, "dtype": dtype, "last": last, "gain": gain}
    sums = None
    if last:  # what the streams will be: taken from a trial run
        x, v = position.clone(), velocity.clone()
        sums = torch.zeros(coupling.reference.num_tiles(size), dtype=torch.int64, device=DEVICE)
        trial = coupling.new_flags(DEVICE)
        reference.momentum_backward(x, v, branch, side, sums, None, None, flags=trial, **common)
        sums = reference.stream_sums(x, v) + int(corrupt)
    found = []
    for module in (reference, kernels):
        x, v, flags = position.clone(), velocity.clone(), coupling.new_flags(DEVICE)
        with poisoned_empty() if module is kernels else contextlib.nullcontext():
            outputs = module.momentum_backward(
                x, v, branch, side, sums, grad_output, grad_branch, flags=flags, **common
            )
        found.append([x, v, flags, *outputs])
    for left, right in zip(*found, strict=True):
        assert_same(left, right)
    assert found[0][2].tolist() == [0, 0, int(last and corrupt)]


@settings(max_examples=40)
@given(SIZES, BITS, BITS, DTYPES, DTYPES, st.booleans(), st.booleans(), st.integers(0, 99), GAINS)
def test_gradient(size, bits, bits_above, dtype, grad_dtype, top, changed, seed, gain):
    draw = Draw(seed, size)
    branch, grad_output = draw.values(dtype, special=True), draw.values(grad_dtype)
    carried = draw.values(torch.float32)
    sums = reference.branch_sums(branch)
    if changed:
        sums[-1] += 1
    found = []
    for module in (reference, kernels):
        flags, grad_velocity = coupling.new_flags(DEVICE), None if top else carried.clone()
        with poisoned_empty() if module is kernels else contextlib.nullcontext():
            outputs = module.momentum_gradient(
                grad_output,
                grad_velocity,
                branch,
                sums,
                bits=bits,
                bits_above=bits_above,
                flags=flags,
                dtype=dtype,
                gain=gain,
            )
        assert top or outputs[1] is grad_velocity
        found.append([flags, *outputs])
    for left, right in zip(*found, strict=True):
        assert_same(left, right)
    assert found[1][0].tolist() == [0, 0, int(changed)]


@settings(max_examples=40)
@given(SIZES, FRACTION_BITS, DTYPES, st.integers(0, 99))
def test_enter_and_rewind(size, fraction_bits, dtype, seed):
    draw = Draw(seed, size)
    hidden, velocity = draw.values(dtype, special=seed % 2 == 0), draw.stream()
    found = []
    for module in (reference, kernels):
        flags = coupling.new_flags(DEVICE)
        with poisoned_empty() if module is kernels else contextlib.nullcontext():
            position, zero, entered = module.momentum_enter(hidden, fraction_bits=fraction_bits, flags=flags)
            rewound = position.clone()
            output = module.momentum_rewind(rewound, velocity, fraction_bits=fraction_bits, dtype=dtype)
        found.append([flags, position, zero, entered, rewound, output])
    for left, right in zip(*found, strict=True):
        assert_same(left, right)


@settings(max_examples=30)
@given(SIZES, BITS, DTYPES, st.booleans(), st.integers(0, 99))
def test_forward_by_one_and_backward_by_the_other_is_exact(size, bits, dtype, triton_first, seed):
    draw = Draw(seed, size)
    position, velocity, branch = draw.stream(), draw.stream(), draw.values(dtype, special=True)
    if bits is None:
        velocity.zero_()
    x, v, flags = position.clone(), velocity.clone(), coupling.new_flags(DEVICE)
    forward, backward = (kernels, reference) if triton_first else (reference, kernels)
    common = {"bits": bits, "fraction_bits": 14, "flags": flags, "dtype": dtype}
    _, side, sums, entry = forward.momentum_forward(x, v, branch, keep=True, sum_streams=True, **common)
    backward.momentum_rewind(x, v, fraction_bits=14, dtype=dtype)
    backward.momentum_gradient(branch, None, branch, sums, bits=bits, bits_above=None, flags=flags, dtype=dtype)
    backward.momentum_backward(x, v, branch, side, entry, None, None, last=True, **common)
    assert torch.equal(x, position) and torch.equal(v, velocity)
    assert flags[coupling.CHECKSUM_MISMATCH] == 0


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("module", [reference, kernels])
def test_no_elements_are_no_work(module, bits):
    flags = coupling.new_flags(DEVICE)
    empty = torch.empty(2, 0, 8, device=DEVICE)
    position, velocity, hidden = module.momentum_enter(empty, fraction_bits=14, flags=flags)
    common = {"bits": bits, "fraction_bits": 14, "flags": flags, "dtype": torch.float32}
    _, side, sums, entry = module.momentum_forward(position, velocity, hidden, sum_streams=True, **common)
    gradient, _ = module.momentum_gradient(
        hidden, None, hidden, sums, bits=bits, bits_above=None, flags=flags, dtype=torch.float32
    )
    _, grad = module.momentum_backward(position, velocity, hidden, side, entry, hidden, gradient, last=True, **common)
    assert grad.shape == empty.shape and sums.numel() == entry.numel() == 0 and not flags.any()


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
def test_layouts_that_models_produce(layout):
    """Branches and gradients need not be contiguous; streams are, and have any shape."""
    whole = Draw(0, 6 * 40 * 10).values(torch.float32).view(6, 40, 10)
    tensor = {
        "transposed": whole.transpose(1, 2).reshape(6, 10, 40).transpose(1, 2),
        "expanded": whole[:1].expand(6, 40, 10),
        "strided": torch.cat([whole, whole], -1)[..., ::2],
    }[layout]
    position = Draw(1, 6 * 40 * 10).stream(-1000, 1000).view(6, 40, 10)
    velocity = position * 3
    found = []
    for module in (reference, kernels):
        x, v, flags = position.clone(), velocity.clone(), coupling.new_flags(DEVICE)
        common = {"bits": 4, "fraction_bits": 14, "flags": flags, "dtype": torch.float32}
        hidden, side, sums, _ = module.momentum_forward(x, v, tensor, **common)
        gradient, carried = module.momentum_gradient(
            tensor, None, tensor, sums, bits=4, bits_above=None, flags=flags, dtype=torch.float32
        )
        below, grad = module.momentum_backward(x, v, tensor, side, None, tensor, tensor, last=False, **common)
        found.append([hidden, side, sums, gradient, carried, below, grad, x, v])
        assert hidden.shape == gradient.shape == carried.shape == below.shape == grad.shape == (6, 40, 10)
    for left, right in zip(*found, strict=True):
        assert_same(left, right)


@pytest.mark.skipif(GPU, reason="the next test does all of it on a GPU")
def test_offsets_past_two_to_the_31(monkeypatch):
    """The last two programs of a launch over more elements, in memory of which only their tiles are touched."""
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    size = 2**31 + TILE + 5
    first, tail = 2**31, TILE + 5
    try:
        position, velocity = (torch.empty(size, dtype=torch.int32) for _ in range(2))
        branch = torch.empty(size, dtype=torch.float16)
        common = {"bits": 4, "fraction_bits": 14, "flags": coupling.new_flags("cpu"), "dtype": torch.float16}
        launch, outputs = kernels.plan_momentum_forward(position, velocity, branch, **common)
    except RuntimeError as error:
        pytest.skip(f"the system grants no 27 GB of address space: {error}")
    draw = Draw(0, tail)
    position[first:], velocity[first:] = draw.stream(-999, 999), draw.stream(-999, 999)
    branch[first:] = draw.values(torch.float16)
    x, v = position[first:].clone(), velocity[first:].clone()
    expected = reference.momentum_forward(x, v, branch[first:], **common)

    set_grid_dim, set_grid_idx = interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx
    monkeypatch.setattr(interpreter_builder, "set_grid_dim", lambda *_: set_grid_dim(launch.grid, 1, 1))
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda i, j, k: set_grid_idx(i + first // TILE, j, k))
    # It would copy all memory onto itself.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    launch._replace(grid=2).run()
    hidden, side, sums, _ = outputs
    for left, right in zip((hidden[first:], side[first // 2 :], sums[first // TILE :]), expected, strict=False):
        assert_same(left, right)
    assert torch.equal(position[first:], x) and torch.equal(velocity[first:], v)


@pytest.mark.skipif(not GPU or torch.cuda.mem_get_info()[0] < 40e9, reason="needs 40 GB on a GPU")
def test_more_than_two_to_the_31_elements():
    size = 2**31 + 3 * TILE + 5
    position = torch.zeros(size, dtype=torch.int32, device=DEVICE)
    velocity = torch.zeros_like(position)
    branch = torch.zeros(size, dtype=torch.float16, device=DEVICE)
    tail = Draw(0, 2 * TILE).values(torch.float16)
    branch[-2 * TILE :] = tail
    position[-2 * TILE :] = 12345
    velocity[-2 * TILE :] = -777
    flags = coupling.new_flags(DEVICE)
    common = {"bits": 4, "fraction_bits": 14, "flags": flags, "dtype": torch.float16}
    hidden, side, _, _ = kernels.momentum_forward(position, velocity, branch, **common)
    expected = ((-777 >> 4) + torch.round(tail.float() * (15 / 16 * 2**14))).to(torch.int32)
    assert torch.equal(velocity[-2 * TILE :], expected)
    assert torch.equal(position[-2 * TILE :], expected + 12345)
    del hidden
    kernels.momentum_rewind(position, velocity, fraction_bits=14, dtype=torch.float16)
    kernels.momentum_backward(position, velocity, branch, side, None, None, None, last=False, **common)
    assert (velocity[-2 * TILE :] == -777).all() and (velocity[: 2 * TILE] == 0).all()


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_cuda_graph_replays_the_same_bits():
    """Captured on a side stream, so that the kernels are also shown to follow the current stream."""
    draw = Draw(0, 5 * TILE + 3)
    position, velocity, branch = draw.stream(-999, 999), draw.stream(-999, 999), draw.values(torch.bfloat16)
    x, v, flags = position.clone(), velocity.clone(), coupling.new_flags(DEVICE)
    common = {"bits": 4, "fraction_bits": 14, "flags": flags, "dtype": torch.bfloat16}

    def step():
        hidden, kept = coupling.momentum_forward(x, v, branch, **common)
        coupling.momentum_rewind(x, v, fraction_bits=14, dtype=torch.bfloat16)
        gradient, _ = coupling.momentum_gradient(
            hidden, None, branch, kept, bits=4, bits_above=None, flags=flags, dtype=torch.bfloat16
        )
        coupling.momentum_backward(x, v, branch, kept, hidden, gradient, last=False, **common)
        return hidden

    expected = step()
    x.copy_(position), v.copy_(velocity)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden = step()
    x.copy_(position), v.copy_(velocity)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(hidden, expected)
    assert torch.equal(v, velocity) and torch.equal(x, position - velocity) and not flags.any()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_a_device_that_is_not_the_current_one():
    values = torch.randn(100, device="cuda:1")
    with torch.cuda.device(0):
        position, _, _ = kernels.momentum_enter(values, fraction_bits=14, flags=coupling.new_flags("cuda:1"))
    assert torch.equal(position, reference.quantize(values, 14))


def test_specialise_describes_what_the_launch_compiles():
    """Alignment of pointers and sizes, constants, absent tensors: by the rules of Triton's own specialisation."""
    tensors = [torch.empty(4096, dtype=dtype, device="meta") for dtype in (torch.int32, torch.int32, torch.float16)]
    common = {"fraction_bits": 14, "flags": coupling.new_flags("meta"), "dtype": torch.float32}
    launch, _ = kernels.plan_momentum_forward(*tensors, bits=2, keep=True, **common)
    variant = specialise(launch, threads_per_warp=32)
    names = launch.kernel.arg_names
    assert variant.signature["position"] == "*i32" and variant.signature["branch"] == "*fp16"
    assert variant.signature["numel"] == "i32" and variant.signature["stream_sums"] == "constexpr"
    assert variant.constexprs[(names.index("stream_sums"),)] is None
    assert variant.constexprs[(names.index("PLANES"),)] == 4
    assert variant.options == {"enable_fp_fusion": False, "num_warps": 4}
    assert variant.attrs[(names.index("numel"),)] == [["tt.divisibility", 16]]

    odd = [torch.empty(2**31 + 1, dtype=tensor.dtype, device="meta") for tensor in tensors]
    variant = specialise(kernels.plan_momentum_forward(*odd, bits=2, keep=True, **common)[0], threads_per_warp=64)
    assert variant.signature["numel"] == "i64" and variant.options["num_warps"] == 2
    assert (names.index("numel"),) not in variant.attrs
    one = [torch.empty(1, dtype=tensor.dtype, device="meta") for tensor in tensors]
    variant = specialise(kernels.plan_momentum_forward(*one, bits=2, keep=True, **common)[0], threads_per_warp=32)
    assert variant.constexprs[(names.index("numel"),)] == 1
    unaligned = [torch.empty(4097, dtype=torch.int32)[1:], torch.empty(4096, dtype=torch.int32)]
    launch, _ = kernels.plan_momentum_rewind(*unaligned, fraction_bits=14, dtype=torch.float32)
    variant = specialise(launch, threads_per_warp=32)
    assert (0,) not in variant.attrs and (1,) in variant.attrs
