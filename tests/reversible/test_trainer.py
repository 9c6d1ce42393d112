"""transformers' Trainer trains a reversible model as it trains any other, and as it trains stored activations."""

import pydoc_data.topics

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from r3mem_fast import MomentumCoupling, make_reversible
from tests.reversible.tiny import build, stored_activations


class Letters(Dataset):
    """Real English, a letter a token, in windows of `tokens`."""

    def __init__(self, tokens=33, count=64):
        text = "".join(pydoc_data.topics.topics.values())[: tokens * count]
        codes = [3 + (ord(letter) - 32) % 93 for letter in text]
        self.windows = torch.tensor(codes).view(count, tokens)

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, index):
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def losses_of_training(folder, model, **settings):
    settings = {"max_steps": 12, "learning_rate": 3e-3, "per_device_train_batch_size": 4, **settings}
    arguments = TrainingArguments(
        folder, use_cpu=True, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, seed=0, **settings
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Letters())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 3, "max_steps": 4}, {"bf16": True}],
    ids=["plain", "accumulation", "bf16"],
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_trainer(tmp_path, settings, lora):
    """Every logged loss is that of the same network with stored activations."""

    def train(stored):
        model = make_reversible(build(scale=2.0), MomentumCoupling(bits=2))
        torch.manual_seed(1)
        trained = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")) if lora else model
        if not stored:
            return losses_of_training(tmp_path, trained, **settings)
        with stored_activations(model):
            return losses_of_training(tmp_path, trained, **settings)

    reversible, expected = train(False), train(True)
    assert len(reversible) == settings.get("max_steps", 12)
    assert reversible == pytest.approx(expected, abs=2e-2 if "bf16" in settings else 1e-4)
    assert reversible[-1] < reversible[0]


def test_trainer_with_gradient_checkpointing_asked_for(tmp_path):
    """Many recipes ask for it by default: one warning, and the losses are the same."""
    model = make_reversible(build(scale=2.0))
    expected = losses_of_training(tmp_path, model, max_steps=3)
    model = make_reversible(build(scale=2.0))
    with pytest.warns(UserWarning, match="gradient checkpointing is turned off"):
        assert losses_of_training(tmp_path, model, max_steps=3, gradient_checkpointing=True) == expected


def test_trainer_saves_what_the_ordinary_model_loads(tmp_path):
    model = make_reversible(build(scale=2.0))
    losses_of_training(tmp_path, model, max_steps=2)
    model.save_pretrained(tmp_path / "saved")
    loaded = type(build()).from_pretrained(tmp_path / "saved")
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4])
def test_the_loss_curve_is_that_of_stored_activations(bits):
    """200 steps of AdamW, float32, one seed: every loss within 1e-4."""

    def curve(stored):
        model = make_reversible(build(scale=2.0), MomentumCoupling(bits=bits))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        windows, losses = Letters(count=256).windows, []
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            batch = windows[torch.randint(len(windows), (4,), generator=generator)]
            if stored:
                with stored_activations(model):
                    loss = model(input_ids=batch, labels=batch).loss
            else:
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    reversible, expected = curve(False), curve(True)
    assert max(abs(a - b) for a, b in zip(reversible, expected, strict=True)) <= 1e-4
    assert expected[-1] < expected[0] - 1.0
