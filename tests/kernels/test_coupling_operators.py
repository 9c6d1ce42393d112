"""The operators behave as PyTorch wants operators to: schemas tell the truth, fakes too, and graphs do not break."""

import itertools

import pytest
import torch

from r3mem_fast.kernels import coupling

SIZE = coupling.TILE + 24
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def arguments(operation, bits, last=False, gradients=True, keep=True, sum_streams=False, transposed=False):
    generator = torch.Generator().manual_seed(0)

    def stream():
        return torch.randint(-999, 999, (2, SIZE // 2), generator=generator, dtype=torch.int32).to(DEVICE)

    def values():
        drawn = torch.randn(2, SIZE // 2, generator=generator).to(DEVICE)
        return drawn.t().contiguous().t() if transposed else drawn

    flags, tiles = coupling.new_flags(DEVICE), 2
    if operation == "momentum_enter":
        return values(), flags, 14
    if operation == "momentum_rewind":
        return stream(), stream(), 14, torch.float16
    if operation == "momentum_forward":
        return stream(), stream(), values(), flags, bits, 14, torch.float16, keep, sum_streams, 0.75
    branch = values()
    sums = coupling.reference.branch_sums(branch)
    if operation == "momentum_gradient_top":
        return values(), branch, sums, flags, bits, torch.float16, 0.75
    if operation == "momentum_gradient":
        return values(), values(), branch, sums, flags, bits, 4, torch.float16, 0.75
    side = torch.zeros(coupling.side_bits_size(SIZE, bits) if bits else 0, dtype=torch.uint8, device=DEVICE)
    entry = torch.zeros(tiles if last else 0, dtype=torch.int64, device=DEVICE)
    grads = (values(), values()) if gradients else (None, None)
    return stream(), stream(), values(), side, entry, *grads, flags, bits, 14, torch.float16, last, 0.75


CALLS = [
    ("momentum_enter", {"bits": 0}),
    ("momentum_rewind", {"bits": 0}),
    *(
        ("momentum_forward", {"bits": bits, "keep": keep, "sum_streams": sums})
        for bits, keep, sums in [(0, True, True), (4, True, False), (1, True, True), (2, False, False)]
    ),
    *(("momentum_gradient_top", {"bits": bits}) for bits in (0, 4)),
    *(("momentum_gradient", {"bits": bits}) for bits in (0, 4)),
    *(
        ("momentum_backward", {"bits": bits, "last": last, "gradients": gradients})
        for bits, last, gradients in itertools.product((0, 8), (True, False), (True, False))
    ),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("operation", "settings"), CALLS)
def test_opcheck(operation, settings, transposed):
    """With the implementation that the device has: the reference, or on a GPU the kernels."""
    function = getattr(torch.ops.r3mem, operation).default
    torch.library.opcheck(function, arguments(operation, **settings, transposed=transposed))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize(("operation", "settings"), CALLS)
def test_fakes_have_the_shapes_dtypes_and_strides_of_the_real_ones(
    operation, settings, kernels, transposed, monkeypatch
):
    monkeypatch.setenv("R3MEM_KERNELS", kernels)
    settings = {**settings, "transposed": transposed}
    function = getattr(torch.ops.r3mem, operation).default
    real = function(*arguments(operation, **settings))
    with torch._subclasses.FakeTensorMode() as mode:
        inputs = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments(operation, **settings)]
        fake = function(*inputs)
    for left, right in zip(*([t] if isinstance(t, torch.Tensor) else t for t in (real, fake)), strict=True):
        assert (left.shape, left.dtype, left.stride()) == (right.shape, right.dtype, right.stride())


def test_a_compiled_function_has_no_graph_break_and_updates_the_streams():
    def layers(position, velocity, branch, flags):
        common = {"fraction_bits": 14, "flags": flags, "dtype": torch.float32}
        hidden, _ = coupling.momentum_forward(position, velocity, branch, bits=None, keep=False, **common)
        hidden, kept = coupling.momentum_forward(position, velocity, hidden.sin(), bits=4, **common)
        return hidden.cos(), kept.side

    found = []
    for function in (layers, torch.compile(layers, backend="aot_eager", fullgraph=True)):
        position, velocity, branch = (
            torch.arange(64, dtype=torch.int32),
            torch.ones(64, dtype=torch.int32),
            torch.ones(64),
        )
        found.append([*function(position, velocity, branch, coupling.new_flags("cpu")), position, velocity])
    for left, right in zip(*found, strict=True):
        assert torch.equal(left, right)
