"""The benchmark suite of the kernels runs, and its results name the machine but neither host nor path."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import report

ROOT = Path(__file__).parents[2]


def without_pytest():
    """Environment of a program that runs pytest: as one of pytest-xdist's workers, a benchmark measures nothing."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes on a GPU: bench/gpu.sh")
def test_the_suite_and_its_report(tmp_path, capsys):
    result = tmp_path / "result.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "bench/test_coupling.py",
        "--benchmark-only",
        "--benchmark-max-time=0.05",
    ]
    command.append(f"--benchmark-json={result}")
    subprocess.run(command, cwd=ROOT, env=without_pytest(), check=True, capture_output=True)
    assert platform.node() not in result.read_text() and str(ROOT) not in result.read_text()
    report.main([str(result), "--output", str(tmp_path / "lines.jsonl")])
    table = capsys.readouterr().out
    header, *records = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert header["environment"]["torch"] == torch.__version__
    assert {record["implementation"] for record in records} == {"eager"}
    assert [record["mib"] for record in records] == [1, 4] * 3
    for record in records:
        assert record["call_seconds"] > 0 and record["least_bytes"] > 10 * record["mib"] * 2**18
        assert record["group"] in table


def test_a_file_that_is_no_result(tmp_path, capsys):
    for content in ("", "{}", "[1]"):
        (tmp_path / "file").write_text(content)
        with pytest.raises(SystemExit):
            report.main([str(tmp_path / "file")])
        assert "is no result of pytest --benchmark-json" in capsys.readouterr().err
