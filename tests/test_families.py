"""Families of models, each by a tiny random one."""

import json
from pathlib import Path

import pytest
import transformers

from r3mem_fast.cli.main import main
from r3mem_fast.families import CHECKS, families, try_family

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
    assert str(report) == "llama: reversible: yes; base: yes; matched: yes; learned: yes"
    assert main(["families", "llama", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"family": "llama", "results": report.results, "refused": None}


def test_what_cannot_be_is_said(capsys):
    """A model without positions has no memories; one that is made of several is not tried."""
    assert main(["families", "bloom", "bart"]) == 1
    bloom, bart = capsys.readouterr().out.splitlines()
    assert "reversible: yes" in bloom and "matched: ValueError" in bloom
    assert bart.startswith("bart: not tried: ")
    assert "ValueError: a lfm2 model has recurrent layers" in try_family("lfm2").results["learned"]
    assert main(["families", "nothing"]) == 2
    assert "registers no causal language model 'nothing'" in capsys.readouterr().err
    assert {"llama", "gpt2", "qwen3_moe"} <= set(families())
