"""A memory network of several segments a row, ragged rows of real English, and transformers' Trainer on both."""

import pydoc_data.topics

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from r3mem_fast.training.history import collate_windows
from tests.test_model_memory import made

# Segments are of 8 tokens. One row has a single one.
LENGTHS = (37, 20, 8, 30, 33, 12)


class Rows(Dataset):
    """Real English, a letter a token, in rows of these lengths, over and over."""

    def __init__(self, count=24, lengths=LENGTHS, start=0):
        text = "".join(pydoc_data.topics.topics.values())[start:]
        codes = torch.tensor([3 + (ord(letter) - 32) % 93 for letter in text[: count * max(lengths)]])
        sizes = [lengths[i % len(lengths)] for i in range(count)]
        self.rows = [{"input_ids": row} for row in codes[: sum(sizes)].split(sizes)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def memory_network(**settings):
    return made(**settings).train()


def trainer_of(folder, model, data=None, trainer=Trainer, arguments=TrainingArguments, **settings):
    """A Trainer that logs every step; of its settings those that are given here."""
    evaluated = settings.pop("eval_dataset", None)
    defaults = {
        "max_steps": 4,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 3,
        "save_strategy": "no",
        "use_cpu": True,
    }
    configured = arguments(str(folder), logging_steps=1, report_to=[], disable_tqdm=True, **{**defaults, **settings})
    return trainer(
        model, configured, collate_windows, train_dataset=Rows() if data is None else data, eval_dataset=evaluated
    )


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def learned(model):
    return {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
