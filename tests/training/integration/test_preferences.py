"""TRL's DPO, KTO, GRPO and RLOO train reversible models and memory networks as they train stored activations."""

import contextlib
import pydoc_data.topics
import re
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from trl.trainer import utils

from r3mem_fast import MomentumCoupling, make_reversible, reference_model, sampling
from tests.reversible.tiny import build, stored_activations
from tests.training.integration.training import memory_network

# Real text: the topics of Python's help. Prompts and completions are of several segments of 8 letters together.
TEXT = re.sub(r"\s+", " ", "".join(pydoc_data.topics.topics.values()))
PROMPTS = [TEXT[start : start + length] for start, length in ((0, 11), (200, 19), (400, 5), (600, 14))]
CHOSEN = [TEXT[start : start + length] for start, length in ((11, 9), (219, 17), (405, 21), (614, 12))]
REJECTED = [TEXT[start : start + length] for start, length in ((5000, 12), (5200, 8), (5400, 15), (5600, 20))]
MEASURED = ("loss", "grad_norm", "rewards/margins", "reward", "kl", "entropy")
UNTRAINED = -torch.nn.functional.logsigmoid(torch.zeros(())).item()  # DPO's loss where policy and reference agree


@pytest.fixture
def settings(tmp_path):
    return {
        "output_dir": str(tmp_path), "use_cpu": True, "logging_steps": 1, "report_to": [], "disable_tqdm": True,
        "bf16": False, "learning_rate": 3e-3, "per_device_train_batch_size": 4, "save_strategy": "no",
    }  # fmt: skip


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, eos_token="~", pad_token="~")


@pytest.fixture
def dpo(settings, tokenizer):
    """Makes a DPOTrainer of three steps."""

    def make(model, ref_model=None, peft_config=None, **more):
        data = Dataset.from_dict({"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED})
        arguments = DPOConfig(**{**settings, "max_steps": 3, **more})
        return DPOTrainer(
            model, ref_model, arguments, train_dataset=data, processing_class=tokenizer, peft_config=peft_config
        )

    return make


def vowels(completions, **others):
    """A reward: the share of vowels."""
    return [sum(letter in "aeiou" for letter in completion) / max(1, len(completion)) for completion in completions]


@pytest.fixture
def sampled(settings, tokenizer):
    """Makes a trainer that learns from samples, of four steps, two on each sample."""

    def make(kind, model, peft_config=None, **more):
        more = {"max_steps": 4, "num_generations": 4, "max_completion_length": 12, "num_iterations": 2, **more}
        trainer, arguments = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[kind]
        return trainer(
            model, vowels, arguments(**settings, **more), train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tokenizer, peft_config=peft_config,
        )  # fmt: skip

    return make


def logged(trainer):
    """What a trainer logs of each step, after training."""
    trainer.train()
    return [
        [entry[name] for name in MEASURED if name in entry] for entry in trainer.state.log_history if "loss" in entry
    ]


def reversible(seed=0, **changes):
    return make_reversible(build(scale=2.0, seed=seed, **changes))


def assert_trained_alike(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=5e-3, abs=1e-5)
    assert found[0] != found[-1]


@pytest.mark.parametrize("kind", ["full", "peft_config"])
def test_dpo_of_a_reversible_model(dpo, kind):
    """Every loss, gradient norm and margin is that of stored activations; the first loss says that the reference is
    the same network, and nothing warns of it."""

    def train(stored):
        model = reversible()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="the reference of this")
            if kind == "full":
                trainer = dpo(model, reference_model(model))
            else:
                trainer = dpo(model, peft_config=LoraConfig(r=4, target_modules="all-linear"))
            with stored_activations(model) if stored else contextlib.nullcontext():
                return logged(trainer)

    found = train(stored=False)
    assert found[0][0] == pytest.approx(UNTRAINED, abs=1e-6)
    assert found[-1][0] < found[0][0]
    assert_trained_alike(found, train(stored=True))


def test_dpo_of_a_memory_network(dpo):
    """Rows of several segments, replayed: as stored segments; its reference is a copy that takes no memory of its own
    for the base model."""

    def train(kept):
        model = memory_network(kept_segments=kept)
        trainer = dpo(model, reference_model(model))
        with stored_activations(model) if kept == "device" else contextlib.nullcontext():
            return logged(trainer)

    found = train("none")
    assert found[0][0] == pytest.approx(UNTRAINED, abs=1e-6)
    assert found[-1][0] < found[0][0]
    assert_trained_alike(found, train("device"))


@pytest.mark.parametrize(
    ("policy", "reference", "reason"),
    [
        (reversible, lambda: build(scale=2.0), "is not reversible, and the model"),
        (reversible, lambda: make_reversible(build(scale=2.0), MomentumCoupling(bits=2)), "with another coupling"),
        (memory_network, reversible, "is no R3MemModel with the settings"),
        (memory_network, lambda: memory_network(segment_length=6), "is no R3MemModel with the settings"),
    ],
    ids=["plain", "coupling", "no memory network", "segments"],
)
def test_a_reference_of_another_network_is_told_of(dpo, policy, reference, reason):
    """Once, and before the first step is done. The loss starts elsewhere then."""
    trainer = dpo(policy(), reference())
    with pytest.warns(UserWarning, match="the reference of this DPOTrainer") as warned:
        losses = logged(trainer)
    told = [str(each.message) for each in warned if "the reference of this" in str(each.message)]
    assert len(told) == 1 and reason in told[0] and "ref_model=reference_model(model)" in told[0]
    assert abs(losses[0][0] - UNTRAINED) > 1e-5


def test_kto_of_a_memory_network(settings, tokenizer):
    """As with DPO."""

    def train(kept):
        model = memory_network(kept_segments=kept)
        data = {"prompt": PROMPTS, "completion": CHOSEN[:2] + REJECTED[2:], "label": [True, True, False, False]}
        trainer = KTOTrainer(
            model, reference_model(model), KTOConfig(**settings, max_steps=3),
            train_dataset=Dataset.from_dict(data), processing_class=tokenizer,
        )  # fmt: skip
        with stored_activations(model) if kept == "device" else contextlib.nullcontext():
            return logged(trainer)

    found = train("none")
    assert found[0][0] == pytest.approx(0.5, abs=1e-6)  # a sigmoid of nothing
    assert_trained_alike(found, train("device"))


@pytest.mark.parametrize(
    ("kind", "beta"), [("grpo", 0.0), ("grpo", 0.1), ("rloo", 0.1)], ids=["grpo", "grpo, adapters off", "rloo"]
)
def test_sampling_from_a_reversible_model(sampled, kind, beta):
    """Rewards, losses and the divergence from the reference are those of stored activations."""

    def train(stored):
        model = reversible()
        trainer = sampled(kind, model, LoraConfig(r=4, target_modules="all-linear"), beta=beta)
        with stored_activations(model) if stored else contextlib.nullcontext():
            return logged(trainer)

    assert_trained_alike(train(stored=False), train(stored=True))


def test_a_reference_that_grpo_makes_itself(sampled, folder):
    """GRPO takes no ref_model, and loads the plain model: one warning. Made reversible in place, it is the same
    network: no warning, and no divergence before the first step."""

    def train(made):
        model = make_reversible(AutoModelForCausalLM.from_pretrained(folder))
        trainer = sampled("grpo", model, beta=0.1, max_steps=1)
        if made:
            make_reversible(trainer.ref_model)
        trainer.train()
        return trainer.state.log_history[0]["kl"]

    with pytest.warns(UserWarning, match="the reference of this GRPOTrainer is not reversible"):
        assert train(made=False) > 1e-7
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the reference of this")
        assert train(made=True) == 0


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_memory_network_and_a_reference(sampled, folder, kind):
    """A trainer that takes no ref_model is given one afterwards, with the head that it has put on its own: no warning,
    no divergence before the first step, and rewards, losses and divergences are those of stored segments."""

    def train(kept):
        model = memory_network(kept_segments=kept)
        model.config._name_or_path = str(folder)  # from where the trainer loads its own reference
        reference = reference_model(model)
        trainer = sampled(kind, model, beta=0.1)
        trainer.ref_model = reference
        if hasattr(utils, "add_fused_lm_head"):  # older versions use the model's own
            utils.add_fused_lm_head(reference, temperature=trainer.temperature)
        with stored_activations(model) if kept == "device" else contextlib.nullcontext(), warnings.catch_warnings():
            warnings.filterwarnings("error", message="the reference of this")
            found = logged(trainer)
        return found, [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]

    found, divergences = train("none")
    assert abs(divergences[0]) < 1e-6 < divergences[-1]
    expected, others = train("device")
    assert_trained_alike(found, expected)
    assert divergences == pytest.approx(others, rel=5e-3, abs=1e-5)


def test_a_memory_network_and_the_reference_that_grpo_makes_itself(sampled, folder):
    """That is the plain model: told of, with what to do."""
    model = memory_network()
    model.config._name_or_path = str(folder)
    with pytest.warns(UserWarning, match="is no R3MemModel with the settings") as warned:
        sampled("grpo", model, beta=0.1, max_steps=1).train()
    told = [str(each.message) for each in warned if "the reference of this" in str(each.message)]
    assert len(told) == 1 and "trainer.ref_model = reference_model(model), and add_fused_lm_head" in told[0]


@pytest.mark.parametrize(("kind", "segment_length"), [("grpo", 8), ("grpo", 40), ("rloo", 8)])
def test_sampling_from_a_memory_network(sampled, monkeypatch, kind, segment_length):
    """Rows longer than a segment are sampled in segments, as they are scored; rewards and losses are those of stored
    segments."""
    calls, by_segments = [], sampling.generate_by_segments
    monkeypatch.setattr(sampling, "generate_by_segments", lambda *args: calls.append(1) or by_segments(*args))

    def train(kept):
        model = memory_network(segment_length=segment_length, kept_segments=kept)
        trainer = sampled(kind, model, beta=0.0)
        with stored_activations(model) if kept == "device" else contextlib.nullcontext():
            return logged(trainer)

    found = train("none")
    assert len(calls) == (2 if segment_length == 8 else 0)
    assert_trained_alike(found, train("device"))
