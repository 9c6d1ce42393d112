"""Times the coupling kernels: Triton against eager PyTorch and `torch.compile`.

    pytest bench --benchmark-only                                # on a GPU: sizes of a stream 1 MiB to 1 GiB
    pytest bench --benchmark-only --benchmark-autosave && pytest-benchmark compare

On a GPU the figures to read are in `extra_info`, from `triton.testing.do_bench` with a cold L2 cache and buffers that
rotate: `milliseconds` (median; 20th and 80th percentile beside it), `gigabytes_per_second` of the least traffic
(`bench/coupling_cases.py`), `copy_gigabytes_per_second` of a copy of 1 GiB in the same process, and `share`, the first
over the second. pytest-benchmark's own columns time a call with synchronisation. On the CPU the reference runs, and
they are the figures.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench.coupling_cases import Case
from r3mem_fast.kernels.coupling import reference

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
MIB = [1, 16, 64, 256, 1024] if GPU else [1, 4]
IMPLEMENTATIONS = ["triton", "eager", "compile"] if GPU else ["eager"]
CASES = [
    Case("momentum_forward", "training", 4, torch.bfloat16),
    Case("momentum_gradient", "training", 4, torch.bfloat16),
    Case("momentum_backward", "training", 4, torch.bfloat16),
    # Beyond the defaults, at one size.
    Case("momentum_enter", "training", None, torch.bfloat16),
    Case("momentum_rewind", "training", None, torch.bfloat16),
    Case("momentum_forward", "inference", 4, torch.bfloat16),
    Case("momentum_forward", "first", None, torch.bfloat16),
    Case("momentum_forward", "training", 1, torch.bfloat16),
    Case("momentum_forward", "training", 2, torch.bfloat16),
    Case("momentum_backward", "training", 1, torch.bfloat16),
    Case("momentum_backward", "training", 2, torch.bfloat16),
    Case("momentum_forward", "training", 4, torch.float32),
    Case("momentum_backward", "training", 4, torch.float32),
]
_SETS_OF_BUFFERS = 3
_MS_OF_WARMUP, _MS_OF_REPEATS = 10, 60


def parameters() -> Iterator[Any]:
    """Yield cases, sizes in MiB and implementations: the first cases at every size, the others at one."""
    for index, case in enumerate(CASES):
        for mib, implementation in itertools.product(MIB, IMPLEMENTATIONS):
            if index < 3 or (implementation == "triton" and mib == 256):
                yield pytest.param(case, mib, implementation, id=f"{title(case)} {mib} MiB {implementation}")


def title(case: Case) -> str:
    """Return the name of a case, with its side bits and dtype."""
    return f"{case.name} b={case.bits} {str(case.dtype).removeprefix('torch.')}"


def function_of(case: Case, implementation: str) -> Callable:
    """Return a function of tensors and settings that runs a case by an implementation."""
    if implementation == "triton":
        from r3mem_fast.kernels.coupling import triton

        return functools.partial(case.call, triton)
    if implementation == "eager":
        return functools.partial(case.call, reference)
    compiled = torch.compile(getattr(reference, case.operation), dynamic=True)
    return lambda tensors, settings: compiled(*tensors.values(), **settings)


@functools.cache
def copy_gigabytes_per_second() -> float:
    """Return the speed of copying 1 GiB on the device, reading and writing counted."""
    from triton.testing import do_bench

    source = torch.ones(1 << 28, dtype=torch.int32, device=DEVICE)
    target = torch.empty_like(source)
    milliseconds = do_bench(lambda: target.copy_(source), _MS_OF_WARMUP, _MS_OF_REPEATS, return_mode="median")
    return 2 * source.nbytes / milliseconds / 1e6


@pytest.mark.parametrize(("case", "mib", "implementation"), parameters())
def test_coupling(benchmark, case, mib, implementation):
    """Time a case."""
    numel = mib * 2**20 // 4
    function = function_of(case, implementation)
    sets = itertools.cycle([case.inputs(numel, DEVICE) for _ in range(_SETS_OF_BUFFERS if mib <= 64 else 2)])
    benchmark.group = f"{title(case)} {mib} MiB"
    least = case.least_bytes(numel)
    benchmark.extra_info |= {"least_bytes": least, "mib": mib, "implementation": implementation}
    if not GPU:
        benchmark(lambda: function(*next(sets)))
        return
    from triton.testing import do_bench

    def run():
        function(*next(sets))

    low, middle, high = do_bench(run, _MS_OF_WARMUP, _MS_OF_REPEATS, quantiles=[0.2, 0.5, 0.8])
    speed, copy = least / middle / 1e6, copy_gigabytes_per_second()
    benchmark.extra_info |= {
        "milliseconds": middle,
        "milliseconds_quantiles": [low, high],
        "gigabytes_per_second": speed,
        "copy_gigabytes_per_second": copy,
        "share": speed / copy,
    }

    def run_and_wait():
        run()
        torch.cuda.synchronize()

    benchmark.pedantic(run_and_wait, rounds=5, warmup_rounds=1)
