"""Training on long texts: what is trained on, that it learns, and that an interrupted run ends as an uninterrupted."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from r3mem_fast import R3MemConfig, R3MemModel, R3MemPipeline, TrainSettings, load_model
from r3mem_fast.cli import main
from r3mem_fast.data.corpus import read_texts
from r3mem_fast.manifest import TRAIN_CHECKPOINTS
from r3mem_fast.training import history as module
from r3mem_fast.training.history import Windows, collate_windows, train

SETTINGS = TrainSettings(steps=6, segments=3, checkpoint_steps=2, learning_rate=1e-2, warmup_steps=1)
CONFIG = R3MemConfig(core=(1, 3), num_memory_tokens=2, segment_length=8, segment_overlap=2)
ANCHORED = {"memory_writer": "anchored", "adapter_rows": "memory", "num_memory_tokens": 4, "memory_budget": 4}
TEXT = "The ship left Nantucket. Ahab of the Pequod was mad about the whale, said Starbuck. " * 4


def fresh(folder, config=CONFIG):
    base, tokenizer = load_model(str(folder))
    torch.manual_seed(0)
    return R3MemModel(base, config), tokenizer


def rows(tokenizer):
    return [tokenizer(text, add_special_tokens=False).input_ids for text in (TEXT, TEXT[40:150])]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_windows_are_all_of_the_texts_that_reads_a_memory():
    windows = Windows([range(50), range(100, 108), range(200, 209)], 8, 3)
    found = [windows[i]["input_ids"].tolist() for i in range(len(windows))]
    assert found == [list(range(24)), list(range(24, 48)), list(range(200, 209))]  # not the rest of 2, nor 8 tokens
    batch = collate_windows([windows[0], windows[2]])
    assert batch["attention_mask"].sum(1).tolist() == [24, 9]
    assert batch["labels"][1].tolist() == [*range(200, 209), *[-100] * 15]
    assert windows.left_out == 2 + 8
    with pytest.raises(ValueError, match="no text has more than 8 tokens"):
        Windows([range(8)], 8, 3)
    # Without memories short texts are read, too; of longer ones the same windows.
    windows = Windows([range(50), range(100, 108), range(1)], 8, 3, memories=False)
    assert [len(windows[i]["input_ids"]) for i in range(len(windows))] == [24, 24, 8] and windows.left_out == 2 + 1
    with pytest.raises(ValueError, match="no text has two tokens"):
        Windows([range(1)], 8, 3, memories=False)


def test_it_learns(folder, tmp_path):
    """The loss of the text falls, the base model stays, and of what was held out nothing is seen."""
    model, tokenizer = fresh(folder)
    base = model.base_fingerprint()
    settings = dataclasses.replace(SETTINGS, steps=40, held_out=0.25, checkpoint_steps=100)
    report = train(model, rows(tokenizer), settings, folder=tmp_path, progress=False)
    assert report.steps == 40 and report.losses[0][0] == 1
    assert report.losses[-1][1] < report.losses[0][1] - 0.5
    kept = [len(row) - len(row) // 4 for row in rows(tokenizer)]
    assert report.windows == sum(-(-n // 24) - (0 < n % 24 <= 8) for n in kept)
    model.set_base_fingerprint(None)
    assert module.R3MemModel is type(model) and storage_fingerprint(model) == base


def storage_fingerprint(model):
    from r3mem_fast import fingerprints

    return fingerprints.fingerprint(model.peft_model)


@pytest.mark.parametrize("drawn", [None, (2, 4)])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(folder, tmp_path, monkeypatch, drawn):
    """Also one that draws the sizes of anchored memories."""
    config = CONFIG if drawn is None else dataclasses.replace(CONFIG, **ANCHORED)
    settings = dataclasses.replace(SETTINGS, drawn_memory_tokens=drawn)
    expected, tokenizer = fresh(folder, config)
    whole = train(expected, rows(tokenizer), settings, folder=tmp_path / "whole", progress=False)
    model, _ = fresh(folder, config)
    before = weights(model)

    def interrupted(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(module._CheckIntegrity, "on_pre_optimizer_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, rows(tokenizer), settings, folder=tmp_path, progress=False)
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())
    monkeypatch.undo()
    half = tmp_path / TRAIN_CHECKPOINTS / "checkpoint-4"  # as a process that was killed while it wrote leaves one
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_step": 4, "log_hi')
    report = train(model, rows(tokenizer), settings, folder=tmp_path, progress=False)
    assert (report.steps, report.tokens) == (whole.steps, whole.tokens)
    assert all(torch.equal(p, weights(expected)[name]) for name, p in weights(model).items())
    # Killed on the way to saving, it has nothing left to do.
    again, _ = fresh(folder, config)
    assert train(again, rows(tokenizer), settings, folder=tmp_path, progress=False).steps == whole.steps
    assert all(torch.equal(p, weights(expected)[name]) for name, p in weights(again).items())
    # Another run's checkpoints are refused, and left alone.
    for other in (dataclasses.replace(settings, seed=1), dataclasses.replace(settings, steps=9)):
        with pytest.raises(ValueError, match="belongs to an unfinished run with other texts"):
            train(fresh(folder, config)[0], rows(tokenizer), other, folder=tmp_path, progress=False)


def test_a_run_that_failed_at_once_is_in_nobodys_way(folder, tmp_path):
    """Without a checkpoint there is nothing to go on from, and other settings may take the folder."""
    model, _ = fresh(folder, dataclasses.replace(CONFIG, distillation_weight=0.5))
    long = [[5] * 400]
    with pytest.raises(ValueError, match="the teacher reads all"):
        train(model, long, dataclasses.replace(SETTINGS, segments=40), folder=tmp_path, progress=False)
    assert train(model, long, dataclasses.replace(SETTINGS, steps=1), folder=tmp_path, progress=False).steps == 1


def test_bfloat16_leaves_the_model_as_it_was(folder, tmp_path):
    """Trained under autocast, it computes as any model of its weights: nothing stays around its forward pass."""
    base, tokenizer = load_model(str(folder), dtype=torch.bfloat16)
    model = R3MemModel(base, CONFIG)
    train(model, rows(tokenizer), dataclasses.replace(SETTINGS, steps=1), folder=tmp_path, progress=False)
    assert not {"forward", "_original_forward"} & vars(model).keys()
    ids = torch.tensor([rows(tokenizer)[0][:8]])
    assert model(ids).logits.dtype == torch.bfloat16


def test_without_memory_tokens_it_is_an_ordinary_fine_tune(folder, tmp_path):
    """Of the same windows, in one pass: the loss of the first step is that of the model's logits."""
    model, tokenizer = fresh(folder, R3MemConfig(core=(1, 3), segment_length=8))
    row = rows(tokenizer)[0][:24]
    ids = torch.tensor([row])
    expected = model.eval()(ids, labels=ids).loss.item()
    report = train(model, [row], dataclasses.replace(SETTINGS, steps=1), folder=tmp_path, progress=False)
    assert report.losses[0][1] == pytest.approx(expected, abs=1e-4)


def test_settings_and_models_that_are_refused(folder, tmp_path):
    for settings, message in (
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"segments": 1}, "segments must be an integer of at least 2"),
        ({"learning_rate": 0.0}, "learning_rate must be a number above 0"),
        ({"held_out": 1.0}, "held_out must be a number of at least 0 and below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainSettings(**settings)
    base, tokenizer = load_model(str(folder), dtype=torch.float16)
    with pytest.raises(ValueError, match="training in float16 overflows"):
        train(R3MemModel(base, CONFIG), rows(tokenizer), SETTINGS, folder=tmp_path, progress=False)


def test_foreign_memories_need_adapters_that_read(folder, tmp_path):
    model, tokenizer = fresh(folder)
    settings = dataclasses.replace(SETTINGS, foreign_memories=0.5, batch_size=2)
    with pytest.raises(ValueError, match="teaches adapters that read memories, by the base model"):
        train(model, rows(tokenizer), settings, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="it needs a batch_size of at least 2"):
        dataclasses.replace(settings, batch_size=1)
    taught, _ = fresh(folder, dataclasses.replace(CONFIG, distillation_weight=1.0))
    report = train(taught, rows(tokenizer), settings, folder=tmp_path, progress=False)
    assert report.steps == settings.steps and taught.foreign_share == 0.0


def test_texts_of_all_kinds(tmp_path):
    (tmp_path / "a.txt").write_text("One text.\n\nOf two paragraphs.")
    assert read_texts(tmp_path / "a.txt") == ["One text.\n\nOf two paragraphs."]
    lines = [{"text": "first"}, {"text": " "}, {"text": "second", "n": 1}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert read_texts(tmp_path / "b.jsonl") == ["first", "second"]
    for content, message in (
        ('{"text": "x"}\n{"text"', "line 2: not JSON"),
        ('{"body": "x"}', r"line 1: there is no text in 'text' \(it has \['body'\]\); name the column"),
        ("[1]", "line 1: there is no text in 'text' .it is no object"),
        ("\n", "holds no text"),
        (b'{"text": "x"}\n\xff\xfe', "line 2: not UTF-8 text"),
    ):
        (tmp_path / "c.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=message):
            read_texts(tmp_path / "c.jsonl")
    for name in ("a.txt", "b.jsonl"):  # a byte order mark is no part of a text
        (tmp_path / f"marked {name}").write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
        assert read_texts(tmp_path / f"marked {name}") == read_texts(tmp_path / name)
    (tmp_path / "c.jsonl").write_text('{"body": "x"}')
    assert read_texts(tmp_path / "c.jsonl", column="body") == ["x"]
    with pytest.raises(FileNotFoundError):
        read_texts(tmp_path / "missing.txt")


def test_folders_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["first", "second"]})
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "both")
    assert read_texts(tmp_path / "one") == ["first", "second"]
    assert read_texts(tmp_path / "both") == ["first", "second"] * 2
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="is no folder that `datasets` wrote"):
        read_texts(tmp_path / "none")


def test_the_pipeline_saves_what_it_trained(folder, tmp_path):
    pipeline = R3MemPipeline(str(folder), config=CONFIG)
    report = pipeline.train({"ship": TEXT}, folder=tmp_path, settings=SETTINGS, progress=False)
    assert report.steps == 6 and not (tmp_path / TRAIN_CHECKPOINTS).exists()
    again = R3MemPipeline(tmp_path)
    memory = pipeline.compress(TEXT, progress=False)
    assert torch.equal(again.compress(TEXT, progress=False).states, memory.states)
    memory.save(tmp_path / "memory.safetensors")  # Trainer's optimizer is a fused one, which bumps no versions
    assert again.generate("a", memory=tmp_path / "memory.safetensors", max_new_tokens=1) is not None
    with pytest.raises(ValueError, match="holds an adapter already"):
        R3MemPipeline(str(folder), config=CONFIG).train(TEXT, folder=tmp_path, progress=False)


_COMMAND = [sys.executable, "-m", "r3mem_fast.cli", "train", "--steps", "30", "--checkpoint-steps", "2"]


def test_a_killed_process_resumes_to_the_same_result(folder, tmp_path):
    """kill -9 in the middle, then the same command again: the same adapter as without, byte for byte."""
    text = tmp_path / "book.txt"
    text.write_text(TEXT)

    def command(name):
        options = ["--memory-tokens", "2", "--segment-length", "8", "--distillation", "0.5", "--device", "cpu"]
        return [*_COMMAND, str(text), "-o", str(tmp_path / name), "--model", str(folder), *options, "--json"]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command("killed"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "killed" / TRAIN_CHECKPOINTS
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*")) and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert list(checkpoints.glob("checkpoint-*")) and not (tmp_path / "killed" / "r3mem.json").exists()
    with pytest.raises(ValueError, match="call train with the same texts, model and folder"):
        R3MemPipeline(tmp_path / "killed")
    for name in ("killed", "whole"):
        done = subprocess.run(command(name), env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["steps"] == 30
    for file in ("adapter_model.safetensors", "memory_tokens.safetensors"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_the_command_says_what_is_wrong(folder, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("short")
    for arguments, message in (
        (["short.txt"], "no text has more than 64 tokens"),
        (["missing.txt"], "No such file"),
        (["short.txt", "--segments", "1"], "segments must be an integer of at least 2"),
        (["short.txt", "--bptt-segments", "1"], "bptt_segments must be an integer of at least 2"),
        (["short.txt", "--distillation", "2"], "distillation_weight must be a number from 0 to 1"),
    ):
        path, *options = arguments
        command = ["train", str(tmp_path / path), "-o", str(tmp_path / "out"), "--model", str(folder)]
        config = ["--segment-length", "64", "--device", "cpu"]
        assert main([*command, *config, *options]) == 2
        assert message in capsys.readouterr().err, arguments


def test_the_command_adapts_the_layers_that_it_is_told(folder, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT * 5)
    command = ["train", str(tmp_path / "book.txt"), "-o", str(tmp_path / "out"), "--model", str(folder)]
    options = ["--memory-tokens", "0", "--first-adapted-layer", "1", "--steps", "1", "--device", "cpu", "--json"]
    assert main([*command, *options]) == 0
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in names}
    assert layers == set(range(1, AutoConfig.from_pretrained(folder).num_hidden_layers))
