"""`bench.memory` and `bench.expand` on a tiny model: every suite runs, counts, and can find what is wrong."""

import json
import pydoc_data.topics

import pytest
import torch

from bench import expand, memory
from r3mem_fast import Memory

TEXT = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


def run(module, arguments, capsys):
    status = module.main([*arguments, "--json"])
    return status, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_memory(folder, tmp_path, capsys, monkeypatch):
    output = tmp_path / "records.jsonl"
    # Of the tiny model's positions.
    monkeypatch.setattr(memory, "_HISTORIES", (0, 5, 20, 9))
    monkeypatch.setattr(memory, "_PROMPTS", (1, 7, 3, 12))
    settings = ["--memory-tokens", "4", "--segment-length", "16", "--tokens", "900", "--corruptions", "50"]
    status, records = run(memory, ["--model", str(folder), *settings, "--output", str(output)], capsys)
    assert status == 0
    assert [json.loads(line) for line in output.read_text().splitlines()][1:] == records
    *parts, compared = [record for record in records if record["suite"] == "stream"]
    assert compared["bit_for_bit"] and [part["tokens"] for part in parts] == [900, 550, 350]
    assert all(len(part["resident_mb"]) == 10 and part["tokens_per_second"] > 0 for part in parts)
    batch = [record for record in records if record["suite"] == "batch"]
    assert len(batch) == 6 and all(record["max_abs_difference"] < 1e-3 for record in batch)
    assert {(r["placement"], r["padding"]) for r in batch} == {
        (placement, side) for placement in memory.PLACEMENTS for side in ("left", "right")
    }
    times, corrupted = [record for record in records if record["suite"] == "file"]
    assert times["load_ms"] > 0 and times["file_bytes"] > 0
    assert corrupted["refused"] == corrupted["corruptions"] >= 45 and corrupted["whole_one_loads"]
    assert all("FILE is damaged" in text for kind, text in corrupted["errors"].items() if "model" not in kind)


def test_a_corruption_that_is_accepted_is_a_failure(folder, capsys, monkeypatch):
    load = Memory.load
    monkeypatch.setattr(Memory, "load", lambda path, model=None: load(path))  # another model's is not told
    settings = ["--memory-tokens", "4", "--segment-length", "16", "--corruptions", "10", "--suite", "file"]
    status, records = run(memory, ["--model", str(folder), *settings], capsys)
    assert status == 1 and records[-1]["by_kind"]["another model's file"] == 0


def test_expand(folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"In the year {n} we saw the boat at {n % 7} bells go to the {n} th shore." for n in range(900))
    )
    output = tmp_path / "records.jsonl"
    settings = ["--text", str(text), "--documents", "2", "--tokens", "55", "--max-steps", "1", "--memory-tokens", "2"]
    settings += ["--window", "8", "--steps", "2", "--windows", "30", "--batch", "3", "--output", str(output)]
    status, records = run(expand, ["--model", str(folder), *settings], capsys)
    assert status == 0
    assert [json.loads(line) for line in output.read_text().splitlines()][1:] == records
    assert [(r["suite"], r["placement"]) for r in records[::3]] == [
        ("seen", "every_layer"), ("seen", "input"), ("unseen", "every_layer"),
    ]  # fmt: skip
    for index, record in enumerate(records):
        assert record["control"] == expand.CONTROLS[index % 3]
        assert 0 <= record["exact"] <= record["rows"] == (2 if record["suite"] == "seen" else 30)
        assert 0 < record["edit_distance"] <= 1 and record["texts"] == ["text.txt"]
        if index % 3:
            low, high = record["more_than_own"]["ci95"]
            assert low <= record["more_than_own"]["mean"] <= high
    assert records[-1]["loss"] > 0 and records[-1]["steps"] == 2 and records[-1]["held_out"] == "the last tenth"


@pytest.mark.parametrize(
    "found, wanted, distance",
    [
        ([], [1, 2], 1.0),
        ([1, 2], [1, 2], 0.0),
        ([1, 3, 2], [1, 2], 1 / 3),
        ([5, 6], [1, 2], 1.0),
        ([2], [1, 2, 3], 2 / 3),
    ],
)
def test_the_distance(found, wanted, distance):
    assert expand._distance(found, wanted) == expand._distance(wanted, found) == pytest.approx(distance)


def test_the_interval():
    differences = torch.randn(200, generator=torch.Generator().manual_seed(0)) + 0.5
    mean, low, high = expand._interval(differences, seed=0)
    assert mean == pytest.approx(differences.mean().item(), abs=1e-4)
    width = 1.96 * differences.std().item() / 200**0.5
    assert low == pytest.approx(mean - width, abs=0.03) and high == pytest.approx(mean + width, abs=0.03)
