"""The small benchmarks print what they measured and write it under its environment."""

import json

import pytest

from bench import exactness, loss_curve, perplexity


def read(path):
    header, *records = [json.loads(line) for line in path.read_text().splitlines()]
    assert header["environment"]["torch"]
    return records


def test_loss_curve(folder, tmp_path, capsys):
    output = tmp_path / "curve.jsonl"
    loss_curve.main(["--model", str(folder), "--steps", "5", "--tokens", "20", "--json", "--output", str(output)])
    record = json.loads(capsys.readouterr().out)
    assert read(output) == [record]
    assert len(record["reversible"]) == 5 and record["max_abs_difference"] == 0.0


def test_loss_curve_of_adapters(folder, tmp_path, capsys):
    output = tmp_path / "curve.jsonl"
    options = ["--compare", "adapters", "--learning-rate", "1e-3", "--steps", "5", "--tokens", "20"]
    loss_curve.main(["--model", str(folder), *options, "--output", str(output)])
    assert "masters from float32" in capsys.readouterr().out
    (record,) = read(output)
    assert len(record["masters"]) == len(record["bfloat16"]) == 5 and record["dtype"] == "bfloat16"
    assert record["max_abs_difference"] <= 1e-2 and record["max_abs_difference_of_bfloat16"] >= 0


def test_perplexity(folder, tmp_path, capsys):
    output = tmp_path / "perplexity.jsonl"
    perplexity.main(["--model", str(folder), "--tokens", "20", "--windows", "2", "--output", str(output)])
    records = read(output)
    assert [record["bits"] for record in records] == [None, *(bits for bits, _ in perplexity.SETTINGS)]
    assert records[1]["ratio"] == pytest.approx(1.0, abs=0.1)
    assert len(capsys.readouterr().out.splitlines()) == len(records)


def test_exactness(folder, tmp_path, capsys):
    output = tmp_path / "exactness.jsonl"
    assert exactness.main(["--model", str(folder), "--tokens", "20", "--output", str(output)]) == 0
    records = read(output)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == records
    assert len(records) == 8 and all(record["exact"] for record in records)
