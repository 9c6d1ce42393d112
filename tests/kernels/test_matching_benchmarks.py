"""What is said of the matching kernels without a GPU: machine code for every target, and the bytes that they move."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import compile_gate, matching, traffic
from bench.matching_cases import KERNELS, MatchingCase, Shape, matching_cases


@pytest.mark.parametrize("operation", matching.OPERATIONS)
def test_the_arms_that_are_timed_compute_the_same(operation):
    """Small, on a CPU; and the records say what ran."""
    arms = matching.arms_of(operation, "small", "cpu")
    ours = arms["r3mem"]()
    with matching.forced("reference"):
        assert all(torch.equal(*pair) for pair in zip(ours, arms["reference"](), strict=True))
    if operation == "attention_scores":  # the mark gives the same output, by another way
        torch.testing.assert_close(arms["attention"](), ours[2], atol=1e-5, rtol=1e-5)
    found = {record["arm"]: record for record in matching.records_of(operation, "small", "cpu", 2)}
    assert list(found) == list(arms) and found["r3mem"]["ratio"] == 1.0 and found["r3mem"]["runs"] == "reference"
    assert all(record["milliseconds"] > 0 for record in found.values())


def test_the_command_writes_a_result_file(tmp_path):
    path = tmp_path / "matching.jsonl"
    assert matching.main(["--device", "cpu", "--cases", "small", "--rounds", "2", "--output", str(path)]) == 0
    head, *records = map(json.loads, path.read_text().splitlines())
    assert (
        "environment" in head
        and [r["operation"] for r in records] == [matching.OPERATIONS[0]] * 3 + [matching.OPERATIONS[1]] * 2
    )


@pytest.mark.slow
def test_matching_compiles_for_every_target():
    """At one head_dim, in every variant; the committed result file has the others."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = ["-m", "bench.compile_gate", "--kernel", "matching", "--head-dims", "128", "--dtypes", "bfloat16"]
    result = subprocess.run([sys.executable, *command, "--json"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(records) == len(compile_gate.TARGETS) * len(matching_cases([torch.bfloat16], [128])) == 4 * 11
    for record in records:
        assert record["vector_bytes"] == 16 and not record["spills"], record
        assert record["matrix"] in ("mma", "wgmma", "tcgen05", "mfma")


def test_what_the_gate_wants_of_matching():
    right = {"kernel": "matching_forward/plain", "dtype": "bfloat16", "target": "cuda:90", "head_dim": 64, "spills": 0}
    right |= {"vector_bytes": 16, "shared_bytes": 0, "matrix": "wgmma"}
    assert compile_gate.problems(right) == []
    assert compile_gate.problems({**right, "matrix": "mma"}) == ["matrix products by mma, not wgmma"]
    assert compile_gate.problems({**right, "spills": 8}) == ["8 bytes of spills"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", [*(f"{kernel}/plain" for kernel in KERNELS), "forward/missing", "system/few"])
def test_matching_moves_what_its_blocks_need(name):
    """With blocks of a GPU's size, the last ones short."""
    shape = Shape(rows=1, heads=4, key_heads=2, queries=75, keys=150, kept=70, few=20)
    record = traffic.count_matching(MatchingCase(*name.split("/"), 64, torch.float16), shape)
    assert 1 <= record["ratio"] <= 1.001
    assert record["once_ratio"] < 3


def test_the_least_is_counted_by_hand():
    """All of a call that fits one block: every input and output once."""
    shape = Shape(rows=2, heads=4, key_heads=2, queries=30, keys=40, kept=40, few=20)
    case = MatchingCase("system", "few", 64, torch.float16)
    launch = case.launch("cuda:90", "meta", shape)
    lines, keys = 2 * 4 * 30, 2 * 2 * 20
    assert launch.arguments["splits"] == 1
    assert case.least_bytes(launch, shape) == (
        lines * (64 * 2 + 64 * 4 + 4 + 4) + keys * (2 * 64 * 2 + 4) + keys * (20 * 4 + 64 * 4)
    )
