"""`bench/gpu.sh` and the tables that it prints: what can be known of them without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import summary
from tests.bench.test_coupling_benchmark import without_pytest

ROOT = Path(__file__).parents[2]
# They say what happens on a machine without a GPU; with one, bench/gpu.sh itself is to be run.
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run bench/gpu.sh itself")


def script(*arguments, **variables):
    environment = {**without_pytest(), "PYTHON": sys.executable, **variables}
    return subprocess.run([ROOT / "bench" / "gpu.sh", *arguments], env=environment, capture_output=True, text=True)


@without_gpu
def test_without_a_gpu_the_script_says_so():
    result = script()
    assert result.returncode == 2 and "sees no GPU, so nothing was measured" in result.stderr


def test_a_rehearsal_does_not_write_among_the_results():
    result = script(R3MEM_REHEARSE="1")
    assert result.returncode == 2 and "name a FOLDER" in result.stderr


def test_an_unknown_stage_is_said(tmp_path):
    result = script(str(tmp_path), "nothing", R3MEM_REHEARSE="1")
    assert result.returncode == 1 and "nothing (no such stage)" in result.stderr


@without_gpu
@pytest.mark.slow
def test_every_stage_runs_in_small(tmp_path):
    """Each step of the four stages ends well, leaves its records, and is in the tables at the end."""
    result = script(str(tmp_path), R3MEM_REHEARSE="1")
    assert result.returncode == 0, result.stdout + result.stderr
    names = {path.stem.removesuffix("_rehearsal") for path in tmp_path.glob("*.jsonl")}
    kernels = {"attention_few", "matching", "coupling"}
    assert names == kernels | {"training_llama8b_8k", "compress_llama8b", "decode_llama8b"}
    for path in tmp_path.glob("*.jsonl"):
        head, *records = map(json.loads, path.read_text().splitlines())
        assert "environment" in head and records
        assert f"\n{path.name}\n" in result.stdout.partition("== all")[2]


def test_a_table_has_what_differs(tmp_path, capsys):
    lines = [
        {"environment": {"gpu": "H200", "torch": "2.13", "cpu": None}},
        {"model": "m", "arm": "a", "ms": 1.23456789, "range": [1, 2.5]},
        {"model": "m", "arm": "b", "ms": 2.0, "range": [2, 3.0], "note": "slow"},
    ]
    path = tmp_path / "found.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert summary.main([str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "",
        "found.jsonl",
        "gpu H200, torch 2.13",
        "model m",
        "| arm | ms | range | note |",
        "| --- | --- | --- | --- |",
        "| a | 1.2346 | 1 to 2.5 | – |",
        "| b | 2 | 2 to 3 | slow |",
    ]
    assert summary.main([str(tmp_path / "missing.jsonl")]) == 1 and "no results" in capsys.readouterr().out
