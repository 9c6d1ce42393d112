"""TRL's SFTTrainer with its defaults, which ask for checkpointing and apply the head without the model."""

import contextlib

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from r3mem_fast import make_reversible, reading
from r3mem_fast.integrations.packing import PackedTexts
from tests.reversible.tiny import build, stored_activations
from tests.test_model_memory import made
from tests.training.integration.training import learned, losses_of, memory_network

TEXTS = [
    "It is a truth universally acknowledged, that",
    "a single man in possession",
    "of a good fortune,",
    "must be in want of a wife.",
    "However little known",
    "the feelings or views of such",
]


def sft(folder, tokenizer_folder, model, peft_config=None, **settings):
    """An SFTTrainer with its defaults, but for the length of training, and logging every step."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, eos_token="~", pad_token="~")
    defaults = {"max_steps": 4, "learning_rate": 3e-3, "per_device_train_batch_size": len(TEXTS)}
    arguments = SFTConfig(
        str(folder), use_cpu=True, logging_steps=1, report_to=[], disable_tqdm=True, **{**defaults, **settings}
    )
    data = Dataset.from_dict({"text": TEXTS})
    return SFTTrainer(
        model, arguments, train_dataset=data, processing_class=tokenizer, peft_config=peft_config, eval_dataset=data
    )


def batch_of(trainer):
    batch = next(iter(trainer.get_train_dataloader()))
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def test_memory_network_with_the_defaults(tmp_path, folder, monkeypatch):
    """Rows of up to six segments are replayed; the first loss is the model's own, under the autocast to bfloat16 that
    is SFTTrainer's default, and the loss falls; the checkpoint holds what learns. One warning that nothing is
    checkpointed."""
    calls, replay = [], reading.replay
    monkeypatch.setattr(reading, "replay", lambda *args, **kwargs: calls.append(1) or replay(*args, **kwargs))
    model = memory_network()
    trainer = sft(tmp_path, folder, model)
    assert trainer.args.gradient_checkpointing and trainer.args.bf16
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch_of(trainer)).loss.item()
    calls.clear()
    with pytest.warns(UserWarning, match="gradient checkpointing is turned off") as warned:
        losses = losses_of(trainer)
    assert len([w for w in warned if "turned off" in str(w.message)]) == 1
    assert len(calls) == len(losses) == 4
    assert losses[0] == pytest.approx(expected, rel=2e-3)
    assert losses[-1] < losses[0]
    assert load_file(tmp_path / "checkpoint-4" / "model.safetensors").keys() == learned(model).keys()


@pytest.mark.parametrize("placement", ["every_layer", "input"])
def test_losses_are_those_of_trainer(tmp_path, folder, placement):
    """In float32: each loss of four steps, and the loss of evaluation, are those that transformers' Trainer has on the
    same batches, where the model applies its own head."""
    model = memory_network(memory_placement=placement)
    trainer = sft(tmp_path, folder, model, bf16=False)
    found = losses_of(trainer)
    found.append(trainer.evaluate()["eval_loss"])
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, logging_steps=1, report_to=[], disable_tqdm=True, max_steps=4, learning_rate=3e-3,
        per_device_train_batch_size=len(TEXTS), save_strategy="no",
    )  # fmt: skip
    data = trainer.train_dataset
    plain = Trainer(
        memory_network(memory_placement=placement), arguments, trainer.data_collator, train_dataset=data,
        eval_dataset=data,
    )  # fmt: skip
    expected = losses_of(plain)
    expected.append(plain.evaluate()["eval_loss"])
    assert found == pytest.approx(expected, rel=1e-4)


def test_hidden_states_are_those_of_the_loss():
    """Of rows of several segments and of one, padded on either side: the head on them gives the logits, and padding
    has zeros."""
    model = made()
    for lengths in ((30, 9), (8, 5)):
        ids = torch.randint(3, 96, (2, max(lengths)), generator=torch.Generator().manual_seed(0))
        mask = torch.zeros_like(ids)
        mask[0], mask[1, -lengths[1] :] = 1, 1
        with torch.no_grad():
            hidden = model.base_model(ids, mask).last_hidden_state
            logits = model(ids, mask, labels=ids.masked_fill(mask == 0, -100)).logits
        assert hidden.shape == (2, max(lengths), 32)
        assert not hidden[mask == 0].any()
        assert torch.allclose(model.get_output_embeddings()(hidden)[mask == 1], logits[mask == 1], atol=1e-5)


def test_what_cannot_be_trained_so_is_refused(tmp_path, folder):
    with pytest.raises(TypeError, match="an R3MemModel has its adapters already"):
        sft(tmp_path, folder, memory_network(), peft_config=LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ValueError, match="distillation_weight: this trainer applies the head itself"):
        sft(tmp_path, folder, memory_network(distillation_weight=0.5)).train()


PACKED = [
    {"packing": True, "max_length": 48},
    {"packing": True, "max_length": 16},
    {"padding_free": True, "max_length": None},
]


@pytest.mark.parametrize("settings", PACKED, ids=["packing", "split", "padding_free"])
@pytest.mark.parametrize("kind", ["reversible", "memory network"])
def test_packed_texts(tmp_path, folder, settings, kind):
    """Each loss is that of stored activations, and the first one is that of the texts as rows of their own."""

    def train(stored):
        model = (
            make_reversible(build(scale=2.0)) if kind == "reversible" else memory_network(kept_segments=kept(stored))
        )
        trainer = sft(tmp_path, folder, model, bf16=False, per_device_train_batch_size=2, **settings)
        batch = batch_of(trainer)
        texts = PackedTexts(batch["input_ids"], batch["position_ids"])
        labels = texts.unpacked(batch["labels"], -100)
        assert len(texts.ids) > 1
        expected = trainer.model(texts.ids, attention_mask=texts.mask, labels=labels).loss.item()
        with stored_activations(model) if stored else contextlib.nullcontext():
            losses = losses_of(trainer)
        assert losses[0] == pytest.approx(expected, rel=1e-4)
        return losses

    def kept(stored):
        return "device" if stored else "none"

    losses = train(stored=False)
    assert losses == pytest.approx(train(stored=True), rel=5e-3)
    assert losses[-1] < losses[0]


def test_adapters_of_ones_own(tmp_path, folder):
    """In place of `peft_config`: a PeftModel under the memory network. Its adapters and the memory tokens learn."""
    base = get_peft_model(build(scale=2.0), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model = memory_network(base=base)
    before = learned(model)
    losses = losses_of(sft(tmp_path, folder, model))
    assert losses[-1] < losses[0]
    assert all(not torch.equal(weight, before[name]) for name, weight in learned(model).items())
    assert {name.split(".")[-4] for name in before if "lora" in name} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "peft_config"])
def test_reversible_model_with_the_defaults(tmp_path, folder, lora):
    """`make_reversible` on a plain model: every loss is that of stored activations, and of the model's own forward."""
    config = LoraConfig(r=4, target_modules="all-linear") if lora else None

    def train(stored):
        model = make_reversible(build(scale=2.0))
        trainer = sft(tmp_path, folder, model, config, bf16=False)
        expected = trainer.model(**batch_of(trainer)).loss.item()
        if stored:
            with stored_activations(model):
                return losses_of(trainer)
        losses = losses_of(trainer)
        assert losses[0] == pytest.approx(expected, rel=1e-5)
        return losses

    with pytest.warns(UserWarning, match="gradient checkpointing is turned off"):
        losses = train(stored=False)
    assert losses == pytest.approx(train(stored=True), abs=1e-4)
    assert losses[-1] < losses[0]
