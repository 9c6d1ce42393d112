"""What is said of the kernels without a GPU is read from machine code and from loads, and can be found wanting."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import compile_gate, traffic
from bench.attention_cases import KERNELS, AttentionCase
from bench.coupling_cases import Case, cases
from r3mem_fast.kernels import coupling

SIZE = 2 * coupling.TILE + 48


def without_interpreter():
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(*command):
    return subprocess.run([sys.executable, *command], env=without_interpreter(), capture_output=True, text=True)


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target_without_spills_and_with_16_byte_accesses():
    result = run("-m", "bench.compile_gate", "--json", "--kernel", "momentum")
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(records) == 4 * len(cases([torch.bfloat16, torch.float16, torch.float32])) > 200
    for record in records:
        assert record["spills"] == record["fused"] == 0 and record["vector_bytes"] == 16
        assert record["shared_bytes"] <= 64 and 0 < record["registers"] <= 128
        assert set(record) >= {"kernel", "target", "dtype", "bits"}


@pytest.mark.slow
def test_attention_compiles_for_every_target_to_matrix_instructions():
    """At one head_dim, plain, with everything, packed, a memory alone; the committed result files have the others."""
    command = ["--kernel", "attention", "--dtypes", "bfloat16", "--head-dims", "128", "--json"]
    result = run("-m", "bench.compile_gate", *command, "--targets", "cuda:80,cuda:89,cuda:90,cuda:100,hip:gfx942")
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    # The specialised forward pass is for two targets, plain and with everything.
    assert len(records) == 5 * (2 * len(KERNELS) + 1 + 9) + 2 * 2
    for record in records:
        kernel, variant = record["kernel"].removeprefix("attention_").split("/")
        assert record["vector_bytes"] == 16 and (variant in ("all", "packed") or not record["spills"]), record
        if record["target"] == "cuda:90" and kernel in ("forward", "query", "key", "memory"):
            assert record["matrix"] == "wgmma"


def test_the_gate_sees_narrow_accesses_and_fused_multiply_adds():
    """Without the divisibility attributes, and with the compiler's default of fusing: what the launchers prevent."""
    code = """
import json, torch
from bench import compile_gate
from bench.coupling_cases import Case
from r3mem_fast.kernels.common import launch
case = Case("momentum_gradient", "training", 4, torch.float16)
original, records = launch.specialise, []
for change in ({}, {"attrs": {}}, {"options": {"num_warps": 4, "enable_fp_fusion": True}}):
    launch.specialise = lambda *arguments: original(*arguments)._replace(**change)
    records += [compile_gate.compile_case(case, target) for target in ("cuda:90", "hip:gfx942")]
print(json.dumps([compile_gate.problems(record) for record in records]))
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    right, right_amd, narrow, narrow_amd, fused, _ = json.loads(result.stdout)
    assert right == right_amd == []
    assert "not 16" in narrow[0] and "not 16" in narrow_amd[0]
    assert "fused multiply-adds" in fused[0]


def test_what_the_gate_calls_a_problem():
    right = {
        "kernel": "momentum_enter/training",
        "dtype": "float16",
        "target": "hip:gfx942",
        "spills": 0,
        "vector_bytes": 16,
        "fused": 0,
        "shared_bytes": 65536,
    }
    assert compile_gate.problems(right) == []
    for wrong, message in [
        ({"spills": 8}, "8 bytes of spills"),
        ({"vector_bytes": 4}, "widest access 4 bytes, not 16"),
        ({"fused": 2}, "2 fused multiply-adds"),
        ({"shared_bytes": 65537}, "65537 bytes of shared memory"),
        ({"error": "CompilationError: no"}, "CompilationError: no"),
    ]:
        assert compile_gate.problems({**right, **wrong}) == [message]
    right = {"kernel": "attention_forward/plain", "dtype": "float16", "target": "cuda:90", "head_dim": 64, "spills": 0}
    right |= {"vector_bytes": 16, "shared_bytes": 0, "matrix": "wgmma"}
    assert compile_gate.problems(right) == compile_gate.problems({**right, "dtype": "float32", "matrix": None}) == []
    assert compile_gate.problems({**right, "matrix": "mma"}) == ["matrix products by mma, not wgmma"]
    assert compile_gate.problems({**right, "kernel": "attention_decode/plain", "matrix": "mma"}) == []
    right |= {"kernel": "attention_specialised/plain", "warps_asked": 4, "warps": 12, "setmaxnreg": 8, "tma": 4}
    assert compile_gate.problems(right) == []
    for wrong in ({"warps": 4}, {"setmaxnreg": 0}):
        assert compile_gate.problems({**right, **wrong}) == ["its warps do not share out the work"]
    assert compile_gate.problems({**right, "tma": 0}) == ["no copy by a tensor descriptor"]


@pytest.mark.parametrize("target", ["cuda:90", "cuda:100"])
def test_the_gate_sees_that_warps_share_out_the_work(target):
    """Asked for by the loop and by the number of warps: with another number on Hopper, they all do the same."""
    code = f"""
import json, torch
from bench import compile_gate
from bench.attention_cases import SPECIALISED, AttentionCase
from r3mem_fast.kernels.common import launch
case = AttentionCase(SPECIALISED, "plain", 128, torch.bfloat16)
original, records = launch.specialise, [compile_gate.compile_case(case, {target!r})]
changed = {{"num_warps": 8, "num_stages": 2}}
launch.specialise = lambda *arguments: original(*arguments)._replace(options=changed)
records += [compile_gate.compile_case(case, "cuda:90")]
print(json.dumps([(record, compile_gate.problems(record)) for record in records]))
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    (record, right), (_, wrong) = json.loads(result.stdout)
    assert right == [] and record["warps"] > record["warps_asked"] and record["registers"] <= 168
    assert "its warps do not share out the work" in wrong


def test_what_an_older_compiler_spills_is_known_to_be_its_own(monkeypatch):
    record = {"kernel": "attention_key/plain", "dtype": "float16", "target": "cuda:90", "head_dim": 128, "spills": 80}
    record |= {"vector_bytes": 16, "shared_bytes": 0, "matrix": "wgmma"}
    for version, wanted in (("3.6.0", []), ("3.7.1", ["80 bytes of spills"])):
        monkeypatch.setattr("triton.__version__", version)
        assert compile_gate.problems(record) == wanted


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
@pytest.mark.parametrize("case", cases([torch.float32]), ids=lambda case: f"{case.name}-{case.bits}")
def test_kernels_move_the_least_bytes(case):
    record = traffic.count(case, SIZE)
    assert 1 <= record["ratio"] <= 1.001
    # Eager takes several times as much, except where there is little to fuse.
    assert record["eager_ratio"] > (1.5 if case.operation in ("momentum_rewind", "momentum_gradient") else 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_moves_what_its_blocks_need(kernel):
    """With blocks of a GPU's size, the last ones short; no key is read that no query of a block sees."""
    record = traffic.count_attention(AttentionCase(kernel, "plain", 64, torch.float16), shape=(1, 2, 1, 300, 150))
    assert 1 <= record["ratio"] <= 1.001
    assert record["once_ratio"] < 3.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
def test_traffic_is_counted_at_loads_and_stores():
    """By hand: x, v and f read, x, v, hidden, half a byte and the checksum written. Twice the work counts twice."""
    from r3mem_fast.kernels.coupling import triton as kernels

    case = Case("momentum_forward", "training", 4, torch.float32)
    assert case.least_bytes(SIZE) == SIZE * (4 + 4 + 4 + 4 + 4 + 4) + SIZE // 2 - 24 + 32 + 3 * 4
    counter = traffic.Traffic()
    with counter.counted():
        for _ in range(2):
            case.call(kernels, *case.inputs(SIZE, "cpu"))
    assert counter.loaded == 2 * SIZE * 12
    assert counter.loaded + counter.stored == 2 * case.least_bytes(SIZE)


def test_eager_traffic_counts_operands_and_results_but_not_views():
    x, y = torch.ones(100), torch.ones(100)
    with traffic.EagerTraffic() as eager:
        x.view(10, 10)[0]
        torch.empty(50)
    assert eager.moved == 0
    with eager:
        x + y
    assert eager.moved == 1200
    with eager:
        x.add_(y)
        x.zero_()
    assert eager.moved == 1200 + 1200 + 400
