"""transformers' Trainer, unchanged, trains a memory network through the segments of its rows."""

import copy
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from r3mem_fast.training.history import collate_windows
from tests.reversible.tiny import build, stored_activations
from tests.test_model_memory import made
from tests.training.integration.training import LENGTHS, Rows, learned, losses_of, memory_network, trainer_of
from tests.training.integration.two_processes import SETTINGS

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 3, "max_steps": 2}, {"bf16": True}],
    ids=["fp32", "accumulation", "bf16"],
)
def test_losses_are_those_of_stored_activations(tmp_path, settings):
    """Replayed or stored, every logged loss is the same, up to rounding, and the last is the lowest."""
    replayed = losses_of(trainer_of(tmp_path, memory_network(), **settings))
    model = memory_network(kept_segments="device")
    with stored_activations(model):
        stored = losses_of(trainer_of(tmp_path, model, **settings))
    assert len(replayed) == settings.get("max_steps", 4)
    assert replayed == pytest.approx(stored, abs=3e-2 if "bf16" in settings else 1e-4)
    assert replayed[-1] < replayed[0]


def test_accumulated_batches_are_one_batch(tmp_path):
    """Three batches of two rows, of other numbers of labels each, make the step that one of six rows makes: the first
    logged loss is the mean over all tokens, and each weight moves by the same."""
    before = learned(memory_network())
    found, losses = [], []
    for rows, batches in ((6, 1), (2, 3)):
        model = memory_network()
        trainer = trainer_of(
            tmp_path, model, Rows(6), optim="sgd", learning_rate=0.1, max_steps=1, lr_scheduler_type="constant",
            per_device_train_batch_size=rows, gradient_accumulation_steps=batches,
        )  # fmt: skip
        losses += losses_of(trainer)
        found.append(learned(model))
    batch = collate_windows(Rows(6).rows)
    assert losses == pytest.approx([memory_network()(**batch).loss.item()] * 2, rel=1e-5)
    for name, start in before.items():
        step = found[0][name] - start
        assert step.norm() > 0
        assert (found[1][name] - found[0][name]).norm() <= 1e-4 * step.norm(), name


def test_accumulated_pairs_are_one_batch(tmp_path):
    """The objective of pairs: the parts' losses, each weighted by its share of the labels, add up."""

    def collate(rows):
        contexts, queries = (
            collate_windows(rows),
            collate_windows([{"input_ids": row["input_ids"][:4]} for row in rows]),
        )
        return {**contexts, "query_input_ids": queries["input_ids"]}

    rows = Rows(6, lengths=(20,))
    losses = [memory_network()(**collate(rows.rows)).loss.item()]
    for size, batches in ((6, 1), (2, 3)):
        # Rows of one length, so that the mean over parts is the mean over tokens.
        trainer = trainer_of(
            tmp_path, memory_network(), rows, max_steps=1, per_device_train_batch_size=size,
            gradient_accumulation_steps=batches,
        )  # fmt: skip
        trainer.data_collator = collate
        losses += losses_of(trainer)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, caplog, monkeypatch):
    """From the checkpoint in the middle, on a new model, with dropout: the same weights, bit for bit. The checkpoint
    holds what learns and nothing of the base model, and Trainer has nothing to warn of when it loads it."""
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    whole, resumed = memory_network(lora_dropout=0.3), memory_network(lora_dropout=0.3)
    trainer_of(tmp_path / "whole", whole, **settings).train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert load_file(checkpoint / "model.safetensors").keys() == learned(whole).keys()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="transformers.trainer"):
        trainer_of(tmp_path / "resumed", resumed, **settings).train(resume_from_checkpoint=str(checkpoint))
    assert not [record for record in caplog.records if "keys" in record.message]
    for name, weight in learned(whole).items():
        assert torch.equal(learned(resumed)[name], weight), name


def test_evaluation_and_the_best_model(tmp_path):
    """Evaluated every two steps by the mean over all tokens, and at the end the best checkpoint's weights are back.
    Best is here the highest loss, so that it is not the last one."""
    model, held_out = memory_network(), Rows(6, start=5000)
    trainer = trainer_of(
        tmp_path, model, eval_dataset=held_out, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, max_steps=6, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        greater_is_better=True, per_device_eval_batch_size=6,
    )  # fmt: skip
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 3 and evaluated[0] == max(evaluated) > min(evaluated)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    with torch.no_grad():
        assert model.eval()(**collate_windows(held_out.rows)).loss.item() == pytest.approx(evaluated[0], rel=1e-5)
    best = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(best[name], weight) for name, weight in learned(model).items())


def test_predictions_are_those_of_evaluation(tmp_path):
    """Trainer.predict gets the logits of every token, of all segments."""
    model, rows = memory_network(), Rows(6, lengths=(30,))
    logits = trainer_of(tmp_path, model, per_device_eval_batch_size=2).predict(rows).predictions
    with torch.no_grad():
        batch = collate_windows(rows.rows)
        expected = model.eval()(batch["input_ids"], labels=batch["labels"]).logits
    assert torch.allclose(torch.tensor(logits), expected, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_state_dict_is_what_learns(tied):
    """It loads strictly, also where the model is wrapped in another; what learns and is missing is missed."""
    base = build(scale=2.0, tie_word_embeddings=tied)
    model = made(base=base)
    state = model.state_dict()
    assert state.keys() == learned(model).keys()
    other = made(base=build(scale=2.0, tie_word_embeddings=tied, seed=5))
    kept = other.peft_model.get_input_embeddings().weight.clone()
    assert not any(other.load_state_dict(state))
    assert torch.equal(other.memory_embeddings, model.memory_embeddings)
    assert torch.equal(other.peft_model.get_input_embeddings().weight, kept)
    wrapped = torch.nn.Sequential(model)
    assert not any(wrapped.load_state_dict(copy.deepcopy(wrapped.state_dict())))
    first = next(iter(state))
    del state[first]
    assert other.load_state_dict(state, strict=False).missing_keys == [first]
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state)


def test_state_dict_has_trained_base_weights_once():
    """Where the tied embeddings learn too, they are saved under one name, as safetensors wants it, and load."""
    models = [made(base=build(scale=2.0, tie_word_embeddings=True)) for _ in range(2)]
    for model in models:
        model.peft_model.get_input_embeddings().weight.requires_grad_()
    with torch.no_grad():
        models[0].peft_model.get_input_embeddings().weight.mul_(2.0)
    state = models[0].state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state) == len(learned(models[0]))
    assert not any(models[1].load_state_dict(state))
    assert torch.equal(
        models[1].peft_model.get_output_embeddings().weight, models[0].peft_model.get_input_embeddings().weight
    )


def test_gradient_checkpointing_asked_for(tmp_path):
    """One warning that names the reason, and the losses are the same."""
    expected = losses_of(trainer_of(tmp_path, memory_network()))
    with pytest.warns(UserWarning, match="gradient checkpointing is turned off"):
        found = losses_of(trainer_of(tmp_path, memory_network(), gradient_checkpointing=True))
    assert found == expected


def test_rows_are_of_several_segments():
    assert max(LENGTHS) > 4 * memory_network().layout.segment_length > min(LENGTHS)


def test_torch_compile(tmp_path):
    """A memory network is left as it is by torch.compile: training gives the same losses, bit for bit."""
    expected = losses_of(trainer_of(tmp_path, memory_network()))
    assert losses_of(trainer_of(tmp_path, memory_network(), torch_compile=True)) == expected


def test_meta_device_is_refused():
    """accelerate moves a model there before FSDP2 shards it, and would bring back what its state_dict has."""
    model = memory_network()
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading: false"):
        model.to(torch.device("meta"))
    assert model.to("cpu").device.type == "cpu"


def test_trainer_of_two_processes(tmp_path):
    """DDP, as torchrun starts it: every loss is that of one process with twice the batch, up to rounding, and the
    weights in the checkpoint are its weights."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        # Without it gloo looks the host's name up, which a container may not know.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "tests.training.integration.two_processes", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    model = memory_network()
    trainer = trainer_of(tmp_path / "one", model, **SETTINGS, per_device_train_batch_size=4)
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(losses_of(trainer), rel=1e-4)
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    start = learned(memory_network())
    for name, weight in learned(model).items():
        assert (saved[name] - weight).norm() <= 1e-2 * (weight - start[name]).norm(), name
