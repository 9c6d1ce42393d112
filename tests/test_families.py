"""Families of models, each by a tiny random one."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AttentionInterface

from r3mem_fast import MomentumCoupling, R3MemModel, check_inverse, make_reversible
from r3mem_fast.cli.main import main
from r3mem_fast.families import CHECKS, _enlarge, _Trial, families, try_family
from r3mem_fast.tiny_models import tiny_config, tiny_model
from tests.reversible.tiny import token_ids

RESULTS = Path(__file__).parents[1] / "bench" / "results" / "families.jsonl"
ENVIRONMENT, *RECORDS = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
MEASURED = ENVIRONMENT["environment"]["transformers"]


@pytest.mark.slow
@pytest.mark.skipif(transformers.__version__ != MEASURED, reason=f"the table is of transformers {MEASURED}")
@pytest.mark.parametrize(
    "record", [record for record in RECORDS if record["refused"] is None], ids=lambda record: record["family"]
)
def test_the_table_is_true(record):
    """Each family can do what the table says, and no more."""
    found = try_family(record["family"])
    assert found.refused is None, found
    assert [result == "yes" for result in found.results.values()] == [r == "yes" for r in record["results"].values()]


def test_a_family_that_can_do_all(capsys):
    report = try_family("llama")
    assert report.does_all and tuple(report.results) == CHECKS
    assert str(report) == "llama: " + "; ".join(f"{check}: yes" for check in CHECKS)
    assert main(["families", "llama", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"family": "llama", "results": report.results, "refused": None}


def test_what_cannot_be_is_said(capsys):
    """A model without positions has no memories, a drafter is no model; what hangs on a check is not tried."""
    assert main(["families", "bloom", "rwkv", "gemma4_assistant"]) == 1
    bloom, rwkv, drafter = capsys.readouterr().out.splitlines()
    assert "reversible: yes; large: yes; base: yes; matched: ValueError" in bloom
    assert "generate: see matched; padded: see matched; attention: transformers lets a Bloom" in bloom
    assert "reversible: yes" in rwkv and "learned: ValueError: RwkvModel.forward takes no key-value cache" in rwkv
    assert drafter.startswith("gemma4_assistant: not tried: ValueError: it drafts for a Gemma 4")
    assert main(["families", "nothing"]) == 2
    assert "registers no causal language model 'nothing'" in capsys.readouterr().err
    assert {"llama", "gpt2", "qwen3_moe"} <= set(families())


def found(check, change=None):
    """What one check finds, of a tiny model that was changed."""
    base = tiny_model("llama")
    if change is not None:
        change(base)
    trial = _Trial(base)
    trial._found = {"matched": "yes"}
    return getattr(trial, check)()


def noisy(model):
    """A branch that is another one each time."""
    generator = torch.Generator().manual_seed(0)
    model.model.layers[2].mlp.register_forward_hook(
        lambda module, inputs, output: output + torch.randn(output.shape, generator=generator)
    )


@pytest.mark.parametrize("check", ["reversible", "large"])
def test_checks_of_the_inverse_can_fail(check):
    assert found(check) == "yes"
    assert found(check, change=noisy) == "the inverse of layer 2 is not exact"


@pytest.mark.parametrize(
    ("check", "what"),
    [
        ("matched", "logits behind a memory of all tokens differ"),
        ("padded", "logits of padded rows differ"),
        ("generate", "logits of the tokens that it writes differ"),
    ],
)
def test_checks_of_memories_can_fail(check, what, monkeypatch):
    """Every pass behind a memory gives other logits than the one before."""
    forward, passes = R3MemModel.forward, itertools.count(1)

    def drifting(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits.roll(next(passes), -1)
        return output

    assert found(check) == "yes"
    monkeypatch.setattr(R3MemModel, "forward", drifting)
    assert found(check).startswith(what)


def test_an_attention_that_reads_nothing_is_found(monkeypatch):
    def nothing(module, query, *tensors, **settings):
        return torch.zeros_like(query).transpose(1, 2), None

    assert found("attention") == "yes"
    monkeypatch.setitem(AttentionInterface._global_mapping, "r3mem", nothing)
    assert found("attention").startswith("logits differ")


def test_large_models_are_large():
    """Hidden states pass what 16 fraction bits hold, whether norms stand before or behind the branches."""
    for family in ("llama", "bert", "gemma2"):
        model = tiny_model(family)
        assert _enlarge(model)
        make_reversible(model, MomentumCoupling(fraction_bits="auto"))
        assert check_inverse(model, token_ids()).max_abs_position > 5e5


@pytest.mark.slow
def test_nearly_every_family_has_a_tiny_model():
    """General rules make those that a new version of transformers brings, too."""
    failed = {}
    for family in families():
        try:
            tiny_model(family)
        except Exception as error:
            failed[family] = error
    assert len(failed) <= len(families()) // 20, failed


def test_tiny_models_are_tiny():
    """Four layers of 32, whatever the settings are called; parts that a family does without stay off."""
    for family, layers in (("gpt_neo", "num_layers"), ("marian", "decoder_layers"), ("jamba", "num_hidden_layers")):
        config = tiny_config(family)
        assert getattr(config, layers) == 4 and config.hidden_size == 32 and config.vocab_size == 96
    assert len(set(tiny_config("jamba").layers_block_type)) == 2
    assert tiny_config("llama").num_key_value_heads == 2
    gemma = tiny_config("gemma3")
    assert gemma.text_config.num_hidden_layers == 4 and gemma.vision_config.num_hidden_layers == 3
