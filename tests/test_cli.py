"""The `r3mem` command, as a user meets it: on a tiny model in a folder, and, slowly, on the embedded real one."""

import json

import pytest
import torch

from r3mem_fast import R3MemConfig, R3MemPipeline, load_model
from r3mem_fast.cli import main
from r3mem_fast.data.text import read_text, token_windows
from r3mem_fast.demo import _read_behind_memories, _write_behind_a_memory


def test_check(folder, capsys):
    arguments = ["check", str(folder), "--tokens", "40", "--bits", "2", "--device", "cpu", "--json", "--per-layer"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["exact"] is True and report["layers"] == 4 and report["bits"] == [2] * 4
    assert report["layer_errors"] == [0.0] * 4 and report["tokens"] == 40
    assert report["gradients"]["max_relative_error"] == 0.0 and report["gradients"]["parameters"] == 39
    assert main(arguments[:-2]) == 0
    assert "inverse of 4 layers over 40 tokens (float32): exact, bit for bit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "no-such-folder/model/x"], "no-such-folder"),
        (["check", "{folder}", "--text", "no-such-file.txt"], "No such file"),
        (["check", "{folder}", "--text", "{empty}"], "holds no text"),
        (["check", "{folder}", "--text", "{binary}"], "is not UTF-8 text"),
        (["check", "{folder}", "--text", "{short}", "--tokens", "40"], "the text has 5 tokens; 40 are needed"),
        (["check", "{folder}", "--tokens", "8"], "8 are too few to check memories: 12"),
        (["check", "{folder}", "--tokens", "5000"], "5000 are more than the model's 128 positions"),
        (["check", "{folder}", "--fraction-bits", "40", "--tokens", "40"], "fraction_bits must be"),
        (["demo", "--model", "{folder}", "--output", "no-such-folder/x.png"], "there is no folder no-such-folder"),
    ],
)
def test_bad_input_is_one_clear_line(folder, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00abc")
    (tmp_path / "short").write_text("five!")
    names = {"folder": folder, **{name: tmp_path / name for name in ("empty", "binary", "short")}}
    assert main([argument.format(**names) for argument in arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("r3mem ")]
    assert len(errors) == 1 and message in errors[0]


def test_env(capsys, monkeypatch):
    monkeypatch.delenv("R3MEM_KERNELS", raising=False)
    assert main(["env", "--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["torch"] == torch.__version__
    assert report["kernels"] == {
        "coupling": "reference (device type cpu)",
        "attention of a segment": "vendor (the fastest on a CPU)",
        "attention in decoding": "vendor (the fastest on a CPU)",
    }
    assert main(["env", "--device", "cpu"]) == 0
    assert "coupling: reference (device type cpu)" in capsys.readouterr().out
    monkeypatch.setenv("R3MEM_KERNELS", "nonsense")
    assert main(["env"]) == 2
    assert "R3MEM_KERNELS must be reference or triton" in capsys.readouterr().err


def test_demo_on_a_tiny_model(folder, tmp_path, capsys):
    picture = tmp_path / "demo.png"
    arguments = ["demo", "--model", str(folder), "--tokens", "32", "--steps", "3", "--remember-steps", "2"]
    assert main([*arguments, "--device", "cpu", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "contexts exact (document 0/1" in printed and "entity: " in printed
    assert "exact, bit for bit" in printed and "3 reversible steps" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"]


def test_the_demo_writes_behind_a_memory(folder, capsys):
    """With and without it, of a text that the model's positions have room for."""
    _write_behind_a_memory(str(folder), "cpu", "A key lies in the mill. ", {"The key lies": " in the mill"})
    first, prompt, behind, without, nats = capsys.readouterr().out.strip().splitlines()
    assert "24 tokens into 8 slots a layer and its last 4 tokens" in first and "The key lies" in prompt
    assert "behind the memory:" in behind and "without it:" in without
    ids = torch.tensor([[ord(letter) - 32 for letter in "A key lies in the mill. The key lies in the mill"]])
    base, _ = load_model(str(folder), dtype=torch.float32)
    with torch.no_grad():
        logits = base(ids).logits[0, -13:-1]
    whole = torch.nn.functional.cross_entropy(logits, ids[0, -12:]).item()
    assert float(nats.split()[-5]) == pytest.approx(whole, abs=0.05)


def test_the_demo_reads_behind_memories(folder, tmp_path, capsys):
    """Of any adapter that makes them: the three ways, of which the full context is that of the base model."""
    config = R3MemConfig(core=(1, 3), num_memory_tokens=2, segment_length=8, segment_overlap=3, adapter_rows="memory")
    pipeline = R3MemPipeline(str(folder), config=config)
    pipeline.save(tmp_path)
    text = read_text()
    _read_behind_memories(str(tmp_path), text, "cpu", count=3)
    *_, tail, memory, full = capsys.readouterr().out.splitlines()
    assert "its last 3 tokens" in tail and "a memory of it in 2 slots" in memory
    windows = token_windows(pipeline.tokenizer, text, tokens=16, count=3)
    with torch.no_grad():
        logits = pipeline.model(windows).logits[:, 8:-1].float()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 9:].flatten()).item()
    assert float(full.split()[-4]) == pytest.approx(expected, abs=1e-3 * expected)


def test_token_windows(folder):
    _, tokenizer = load_model(str(folder))
    assert token_windows(tokenizer, "abcdefg", tokens=3).shape == (2, 3)
    assert token_windows(tokenizer, "abcdefg", tokens=3, count=1).shape == (1, 3)
    with pytest.raises(ValueError, match="the text has 7 tokens; 9 are needed"):
        token_windows(tokenizer, "abcdefg", tokens=3, count=3)
    assert "assert" in read_text()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", ["1", "2", "4", "8"])
def test_check_of_a_real_model(capsys, dtype, bits):
    """SmolLM2-135M, 30 layers, real text: the inverse is exact and the gradients are those of stored activations."""
    assert main(["check", "smollm2-135m", "--tokens", "64", "--dtype", dtype, "--bits", bits, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["exact"] and report["layers"] == 30
    assert report["gradients"]["max_relative_error"] <= (1e-5 if dtype == "float32" else 0.1)


def test_a_misspelt_text_is_no_adapter(tmp_path, capsys, monkeypatch):
    """Nor is it looked for on the hub: it ends like the other text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.txt").write_text("A text.")
    assert main(["compress", "texts/missing.txt", "b.txt", "-o", "m"]) == 2
    assert capsys.readouterr().err.endswith("there is no file texts/missing.txt\n")
