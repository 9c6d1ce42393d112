"""The attention operations' speed: `pytest bench --benchmark-only -k attention`; the same cases as `bench.attention`.

pytest-benchmark's columns time a call with synchronisation. On a GPU `extra_info` has `milliseconds` from
`triton.testing.do_bench`, with a cold L2 cache.
"""

import pytest
import torch

from .attention import step_of, time_of, timed_cases

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
CASES = timed_cases(DEVICE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention(benchmark, case):
    """Time one case."""
    benchmark.group = case.name
    tensors = case.tensors(DEVICE)
    _, arm = case.arms(tensors)["r3mem"]
    step = step_of(case, arm, tensors)
    if not GPU:
        benchmark.pedantic(step, rounds=5, warmup_rounds=1)
        return
    benchmark.extra_info["milliseconds"] = time_of(step, DEVICE, graph=case.passed == "decode")

    def step_and_wait():
        step()
        torch.cuda.synchronize()

    benchmark.pedantic(step_and_wait, rounds=5, warmup_rounds=1)
