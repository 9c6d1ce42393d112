"""Remembering: until greedy recall gives everything back; interrupted and resumed; refusals."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open

from r3mem_fast import R3MemConfig, R3MemModel, RememberSettings, load_model
from r3mem_fast.hierarchy import Pair
from r3mem_fast.hierarchy.decoys import decoys
from r3mem_fast.manifest import REMEMBER_CHECKPOINT
from r3mem_fast.training.remember import remember
from r3mem_fast.training.remember import run as module

PAIRS = [
    Pair("document", "a", "What fox?", "The quick brown fox jumps over the lazy dog.", ("Fox",), "test"),
    Pair("entity", "a", "Fox", "The quick brown fox", ("Fox",), "test"),
    Pair("entity", "a", "dog", "The lazy dog of Anne", ("Anne",), "test"),
]
SETTINGS = RememberSettings(
    learning_rate=1e-2, anchor_windows=4, anchor_tokens=12, anchor_weight=1.0, divergence=0.5, decoys=2, decoys_every=2
)


def fresh(folder, seed=0):
    base, tokenizer = load_model(str(folder))
    torch.manual_seed(seed)
    return R3MemModel(base, R3MemConfig(core=(1, 3), first_adapted_layer=0)), tokenizer


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def learned(folder):
    model, tokenizer = fresh(folder)
    report = remember(model, tokenizer, PAIRS, SETTINGS, progress=False)
    return model, tokenizer, report


def test_every_context_comes_back(learned):
    model, tokenizer, report = learned
    assert report.exact == [True] * 3 and report.exact_match == 1.0 and report.pairs == PAIRS
    assert report.by_level() == {"document": (1, 1), "entity": (2, 2)}
    assert "3 of 3 contexts exact (document 1/1, entity 2/2)" in str(report)
    assert report.expand_loss > 0 and report.compress_loss > 0 and not model.training
    for pair in PAIRS:
        query = tokenizer(pair.query, return_tensors="pt").input_ids
        assert tokenizer.decode(model.recall(query)[0]) == pair.context
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_it_ends_when_new_decoys_are_refused(learned):
    """Those that were drawn last, to see; and one that is answered keeps a run from ending."""
    model, tokenizer, report = learned
    new = decoys(PAIRS, len(PAIRS), random.Random(f"{SETTINGS.seed}/verify {report.steps}"))
    for decoy in new:
        assert len(model.recall(tokenizer(decoy.query, return_tensors="pt").input_ids)[0]) == 0

    run = module.Run(model, tokenizer, PAIRS, SETTINGS, None)
    assert run._verified() and run.answered == []
    predicted = run._predicted
    run._predicted = lambda term, rows: [False] * len(rows) if not rows[0][0] else predicted(term, rows)
    assert not run._verified() and len(run.answered) == len(PAIRS)
    # Asked again, few at a time, and none forgotten that was not.
    asked = set(run.answered)
    run._refuse(new[:1])
    assert set(run.answered) <= asked | {new[0].query}
    model.zero_grad(set_to_none=True)
    model.eval()


def test_the_forward_direction_stays_near_the_base_model(folder):
    """Nearer than without the divergence in the objective, on text that was not in it."""

    def divergence(**settings):
        model, tokenizer = fresh(folder)
        remember(model, tokenizer, PAIRS, dataclasses.replace(SETTINGS, max_steps=40, **settings), progress=False)
        ids = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            found = model(ids).logits.log_softmax(-1)
            with model.disable_adapters():
                wanted = model(ids).logits.log_softmax(-1)
        return (wanted.exp() * (wanted - found)).sum(-1).mean()

    assert divergence(anchor_weight=30.0, learning_rate=3e-3) < 0.7 * divergence(divergence=None, learning_rate=3e-3)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(learned, folder, tmp_path, monkeypatch):
    expected, _, report = learned
    train_on = module.Run._train_on

    def interrupted(self, batch):
        train_on(self, batch)
        if self.step in (5, 11):
            raise KeyboardInterrupt

    monkeypatch.setattr(module.Run, "_train_on", interrupted)
    often = dataclasses.replace(SETTINGS, checkpoint_seconds=0)
    for seed in (0, 3):
        model, tokenizer = fresh(folder, seed)  # other adapters at the start: the checkpoint has them all
        with pytest.raises(KeyboardInterrupt):
            remember(model, tokenizer, PAIRS, often, folder=tmp_path, progress=False)
        assert [path.name for path in tmp_path.iterdir()] == [REMEMBER_CHECKPOINT]
    monkeypatch.undo()
    model, tokenizer = fresh(folder)
    resumed = remember(model, tokenizer, PAIRS, SETTINGS, folder=tmp_path, progress=False)
    assert resumed.steps == report.steps and resumed.exact == report.exact
    after = weights(model)
    assert all(torch.equal(after[name], value) for name, value in weights(expected).items())


@pytest.mark.parametrize("weights_of", [{}, {"cycle_weight": 0.0}, {"expand_weight": 0.0, "cycle_weight": 0.0}])
def test_memory_tokens_that_few_steps_reach(folder, tmp_path, monkeypatch, weights_of):
    """Resumed, they have made as many optimizer steps as before, not as many as the run."""

    def made():
        base, tokenizer = load_model(str(folder))
        torch.manual_seed(0)
        config = R3MemConfig(core=(1, 3), num_memory_tokens=2, segment_length=16, max_memory_segments=3, **weights_of)
        return R3MemModel(base, config), tokenizer

    often = dataclasses.replace(SETTINGS, checkpoint_seconds=0, compress_every=3, max_steps=8, divergence=None)
    expected, tokenizer = made()
    remember(expected, tokenizer, PAIRS, often, progress=False)
    train_on = module.Run._train_on

    def interrupted(self, batch):
        train_on(self, batch)
        if self.step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.Run, "_train_on", interrupted)
    model, _ = made()
    with pytest.raises(KeyboardInterrupt):
        remember(model, tokenizer, PAIRS, often, folder=tmp_path, progress=False)
    monkeypatch.undo()
    model, _ = made()
    remember(model, tokenizer, PAIRS, often, folder=tmp_path, progress=False)
    after = weights(model)
    assert "memory_embeddings" in after
    assert all(torch.equal(after[name], value) for name, value in weights(expected).items())


def test_checkpoints_that_are_refused(folder, tmp_path):
    few = dataclasses.replace(SETTINGS, max_steps=3, divergence=None, checkpoint_seconds=0)
    model, tokenizer = fresh(folder)
    report = remember(model, tokenizer, PAIRS, few, folder=tmp_path, progress=False)
    assert report.steps == 3 and not all(report.exact)  # and no error
    with safe_open(tmp_path / REMEMBER_CHECKPOINT, "pt") as file:
        assert json.loads(file.metadata()["r3mem"])["step"] == 3
    before = weights(model)
    for pairs, settings in ((PAIRS[:2], few), (PAIRS, dataclasses.replace(few, seed=1))):
        with pytest.raises(ValueError, match="belongs to an unfinished run with other documents"):
            remember(model, tokenizer, pairs, settings, folder=tmp_path, progress=False)
    data = (tmp_path / REMEMBER_CHECKPOINT).read_bytes()
    for broken in (data[: len(data) // 2], b"", b"nonsense" * 10):
        (tmp_path / REMEMBER_CHECKPOINT).write_bytes(broken)
        with pytest.raises(ValueError, match="is damaged; delete it"):
            remember(model, tokenizer, PAIRS, few, folder=tmp_path, progress=False)
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())


def test_an_interruption_leaves_the_adapter_as_it_was(folder, monkeypatch):
    model, tokenizer = fresh(folder)
    before = weights(model)
    train_on = module.Run._train_on

    def interrupted(self, batch):
        train_on(self, batch)
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Run, "_train_on", interrupted)
    with pytest.raises(KeyboardInterrupt):
        remember(model, tokenizer, PAIRS, SETTINGS, progress=False)
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())


def test_bad_input(folder):
    model, tokenizer = fresh(folder)
    with pytest.raises(ValueError, match="no pairs"):
        remember(model, tokenizer, [], progress=False)
    long = Pair("document", "book", "q", "word " * 60, (), "test")
    with pytest.raises(ValueError, match=r"document 'book': a context of 300 tokens \(document\).*128 positions"):
        remember(model, tokenizer, [long], progress=False)
    model.end_token_id = tokenizer("!").input_ids[0]
    with pytest.raises(ValueError, match="has the model's end token in it"):
        remember(model, tokenizer, [Pair("document", "a", "q", "Stop! And go", (), "test")], progress=False)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        remember(model, tokenizer, PAIRS, progress=False)
    for settings in (
        {"max_steps": 0},
        {"tokens_per_step": 0},
        {"decoys": -1},
        {"divergence": -0.1},
        {"learning_rate": float("inf")},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be an? "):
            RememberSettings(**settings)


_COMMAND = [sys.executable, "-m", "r3mem_fast.cli", "remember", "--max-steps", "40", "--checkpoint-seconds", "0"]


def test_a_killed_process_resumes_to_the_same_result(folder, tmp_path):
    """kill -9 in the middle, then the same command again: the same adapter as without."""
    text = tmp_path / "page.txt"
    text.write_text("The ship left Nantucket. Ahab of the Pequod was mad about the whale, said Starbuck.")

    def command(name):
        return [*_COMMAND, str(tmp_path / name), str(text), "--model", str(folder), "--device", "cpu", "--json"]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command("killed"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed" / REMEMBER_CHECKPOINT
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert checkpoint.exists() and not (tmp_path / "killed" / "r3mem.json").exists()
    for name in ("killed", "whole"):
        done = subprocess.run(command(name), env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode in (0, 1), done.stderr
        assert json.loads(done.stdout)["steps"] <= 40
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("killed", "whole"))
    assert first == second
