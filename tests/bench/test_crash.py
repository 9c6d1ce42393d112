"""`bench.crash`: a process is killed again and again, and what is wrong with a store does not escape the checks."""

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bench.crash import Operation, _Bench
from r3mem_fast.store.memories import Histories

SIZES = {"segment_length": 16, "memory_tokens": 4, "memory_budget": 16, "raw_tokens": 8}


@pytest.mark.slow
def test_killed(folder, tmp_path):
    """In a process of its own, as threads of others do not survive a fork."""
    sizes = [word for name, size in SIZES.items() for word in (f"--{name.replace('_', '-')}", str(size))]
    output = tmp_path / "crash.jsonl"
    command = [sys.executable, "-m", "bench.crash", "--model", str(folder), "--kills", "5", "--compare", "2", *sizes]
    done = subprocess.run(
        [*command, "--seconds", "1", "--output", str(output), "--json"],
        cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    environment, record = (json.loads(line) for line in output.read_text().splitlines())
    assert "environment" in environment and record == json.loads(done.stdout)
    assert record["kills"] == 5 and record["compared"] == 2 and record["problems"] == []
    assert record["adds"] + record["deletes"] + record["unacknowledged_done"] > 0


@pytest.fixture
def bench(folder, tmp_path):
    options = argparse.Namespace(model=str(folder), seed=0, kills=1, seconds=1.0, compare=1, json=True, **SIZES)
    return _Bench(options, tmp_path)


def do(bench, count):
    """Let the bench's worker do some operations, and take over what it says."""
    store, numbers = bench._store(), random.Random(5)
    for _, (operation, item) in zip(range(count), bench._operations(numbers, store), strict=False):
        if operation.kind == "add":
            store.add(operation.text, user_id=operation.user)
        else:
            store.delete(item)
        bench._take_over(operation)
    store.close()


def test_what_the_checks_find(bench, monkeypatch):
    do(bench, 12)
    assert bench.counts["adds"] and bench.counts["deletes"]
    bench._check(None, compare=True)
    user, text = bench.expected[0]
    with bench._store() as store:
        bench._check(Operation("delete", user, text), compare=False)
        assert bench.counts["unacknowledged_not_done"] == 1
        store.delete(store.get_all()[0].id)
    bench._check(Operation("delete", user, text), compare=True)
    assert bench.counts["unacknowledged_done"] == 1 and bench.expected[0] != (user, text)
    bench._take_over(Operation("add", "anna", "0123456789abcdef never was added"))
    with pytest.raises(AssertionError, match=r"items, .* expected"):
        bench._check(None, compare=False)
    bench._take_over(Operation("delete", "anna", "0123456789abcdef never was added"))
    (bench.folder / "store" / "forgotten").write_text("an old note: 0123456789abcdef")
    with pytest.raises(AssertionError, match="a deleted word in forgotten"):
        bench._check(None, compare=False)
    (bench.folder / "store" / "forgotten").unlink()
    (bench.folder / "store" / "memories" / "0-0.safetensors").write_text("of nobody")
    bench._check(None, compare=False)
    assert bench.counts["leftover_files"] == 1  # and it is gone
    monkeypatch.setattr(Histories, "sweep_folder", staticmethod(lambda folder, database: set()))
    (bench.folder / "store" / "memories" / "0-0.safetensors").write_text("of nobody")
    with pytest.raises(AssertionError, match="files of memories that nobody knows of"):
        bench._check(None, compare=False)


def test_another_memory_is_found(bench):
    do(bench, 12)
    with bench._store() as store:
        histories = [store.answering().histories.history(user) for user in ("anna", "boris")]
    bench._compare(histories)
    memory = next(history.memory for history in histories if history.memory is not None)
    memory.states[..., -1].add_(1.0)
    with pytest.raises(AssertionError, match="other states of"):
        bench._compare(histories)
