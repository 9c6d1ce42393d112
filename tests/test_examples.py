"""The examples run, on a tiny model, and do what they say."""

import importlib.util
from pathlib import Path

import pytest

from r3mem_fast import MemoryStore, R3MemConfig, R3MemPipeline
from r3mem_fast.store import documents
from r3mem_fast.store.defaults import SETTINGS

EXAMPLES = Path(__file__).parents[1] / "examples"
# Sizes of a store's memories for which the 128 positions of the tiny model suffice.
SIZES = {"num_memory_tokens": 2, "memory_budget": 8, "segment_length": 16, "segment_overlap": 2}
TEXT = "Ahab of the Pequod was mad about the whale.\n\nStarbuck was not. Queequeg was at sea.\n\n" * 12


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def test_all_are_here():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    memories = {"chat_with_memory", "ask_your_documents"}
    assert (
        names == {"train_lora_reversible", "remember_page", "compress_book", "trl_sft", "kernel_roofline"} | memories
    )
    assert names <= {name.removeprefix("test_") for name in globals() if name.startswith("test_")}


@pytest.mark.slow
def test_train_lora_reversible(text, folder, capsys):
    example("train_lora_reversible").main([text, "--model", str(folder), "--steps", "3", "--tokens", "32"])
    printed = capsys.readouterr().out
    assert "exact, bit for bit" in printed and "step 3: loss" in printed and "the ordinary network" in printed


@pytest.mark.slow
def test_remember_page(tmp_path, folder, capsys):
    (tmp_path / "page.txt").write_text("Ahab was mad.")
    arguments = [str(tmp_path / "page.txt"), "--model", str(folder), "--folder", str(tmp_path / "page")]
    assert example("remember_page").main([*arguments, "--max-steps", "3"]) >= 0
    assert "contexts exact" in capsys.readouterr().out and (tmp_path / "page" / "r3mem.json").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_compress_book(text, folder, tmp_path, capsys):
    config = R3MemConfig(core=(1, 3), num_memory_tokens=4, segment_length=16)
    R3MemPipeline(str(folder), config=config).save(tmp_path / "adapter")
    example("compress_book").main([text, "Ahab", "--model", str(tmp_path / "adapter"), "--output", "m.safetensors"])
    printed = capsys.readouterr().out
    assert "Memory(rows=1" in printed and "with the memory:" in printed and (tmp_path / "m.safetensors").exists()


@pytest.mark.slow
def test_chat_with_memory(folder, tmp_path, capsys):
    """The second process knows what the first was told."""
    arguments = [
        "--store",
        str(tmp_path / "memories"),
        "--model",
        str(folder),
        "--max-new-tokens",
        "4",
        "--passages",
        "0",
    ]
    config = R3MemConfig(**{**SETTINGS, **SIZES})
    MemoryStore(tmp_path / "memories", str(folder), config=config, raw_tokens=16).memory("anna")  # a tiny one's sizes
    first = example("chat_with_memory").main(["anna", "Ida is allergic.", *arguments])
    assert "0 items are remembered of anna" in capsys.readouterr().out
    example("chat_with_memory").main(["anna", "Who is?", *arguments])
    assert "2 items are remembered of anna" in capsys.readouterr().out
    with MemoryStore(tmp_path / "memories") as store:
        assert [item.text for item in store.get_all()][:2] == ["Ida is allergic.", first.strip()]


@pytest.mark.slow
def test_ask_your_documents(folder, tmp_path, monkeypatch, capsys):
    """A document that was read is not read again."""
    monkeypatch.chdir(tmp_path)
    config = R3MemConfig(**{**SETTINGS, **SIZES, "segment_overlap": 0, "beyond_budget": "error"})
    monkeypatch.setattr(documents, "_CONFIG", config)
    (tmp_path / "mill.txt").write_text("The mill is open at six.")
    arguments = ["When?", "mill.txt", "--model", str(folder), "--store", "documents"]
    arguments += ["--max-new-tokens", "4"]
    answer = example("ask_your_documents").main(arguments)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "documents").glob("*.safetensors")}
    assert "from: mill.txt" in capsys.readouterr().out and files
    assert example("ask_your_documents").main(arguments) == answer
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "documents").glob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient checkpointing is turned off:UserWarning")
def test_trl_sft(text, folder):
    losses = example("trl_sft").main([text, "--model", str(folder), "--steps", "4"])
    assert len(losses) == 4 and all(0 < loss < 100 for loss in losses)


@pytest.mark.slow
def test_kernel_roofline(capsys):
    assert example("kernel_roofline").main(["--mebibytes", "1", "--rounds", "3"]) > 0
    assert "share of the copy's bandwidth" in capsys.readouterr().out
