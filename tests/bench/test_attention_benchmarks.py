"""Attention's benchmarks at small sizes: every arm computes the same, and the records say what ran."""

import json
import os

import pytest
import torch

from bench import attention, logits
from bench.attention import TimedCase


@pytest.mark.parametrize("passed", attention.PASSES)
def test_every_arm_computes_the_same(passed):
    case = TimedCase(passed, tokens=24, memory=5, head_dim=16, group=2, key_heads=2, rows=2)
    arms = case.arms(case.tensors("cpu"))
    assert list(arms) == ["r3mem", "reference", *(["vendor"] if passed != "decode" else []), "sdpa", "copy"]
    wanted = arms.pop("reference")[1]()
    assert arms.pop("copy")[1]().shape == (2, 2, 29, 16)
    for name, (_, arm) in arms.items():
        torch.testing.assert_close(arm(), wanted, atol=1e-5, rtol=1e-5, msg=name)


def test_without_a_memory_the_rival_is_plain_causal_attention():
    case = TimedCase("forward", tokens=24, memory=0, head_dim=16, group=2, key_heads=2)
    arms = case.arms(case.tensors("cpu"))
    torch.testing.assert_close(arms["sdpa"][1](), arms["reference"][1](), atol=1e-5, rtol=1e-5)


def test_records():
    case = TimedCase("both", tokens=16, memory=4, head_dim=16, group=1, key_heads=1)
    found = {record["arm"]: record for record in attention.records_of(case, "cpu", rounds=2)}
    assert set(found) == {"r3mem", "reference", "vendor", "sdpa"}
    assert found["r3mem"]["runs"] == "vendor" and found["r3mem"]["ratio"] == 1.0
    assert found["vendor"]["kernel"] == "cpu"
    assert all(record["milliseconds"] > 0 for record in found.values())


def test_our_two_forward_passes_are_forced_each(monkeypatch):
    monkeypatch.delenv(attention.dispatch.FORWARD_VARIABLE, raising=False)
    names = (attention.dispatch.VARIABLE, attention.dispatch.FORWARD_VARIABLE)
    for implementation, wanted in (("triton", ("triton", None)), ("specialised", ("triton", "specialised"))):
        with attention.forced(implementation):
            assert tuple(map(os.environ.get, names)) == wanted


def test_the_cases_of_a_gpu_are_those_that_are_asked_for():
    cases = attention.timed_cases("cuda")
    assert len(cases) == len({case.name for case in cases}) == 3 * 5 * 4 * 2 * 2
    assert {case.tokens for case in cases} == {512, 2048, 4096, 8192, 32768}


@pytest.mark.slow
def test_logits_of_a_real_model_behind_a_memory(capsys):
    """No implementation is further from float64 than twice eager, and without a memory they agree to 1e-4."""
    assert logits.main(["--json", "--settings", "base,bypassed", "--rounds", "1"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {(record["setting"], record["attention"]): record for record in records}
    assert len(found) == 6
    assert found["base", "r3mem"]["max_from_eager"] <= 1e-4
    for setting in ("base", "bypassed"):
        assert found[setting, "r3mem"]["max_from_float64"] <= 2 * found[setting, "eager"]["max_from_float64"]
    for setting in ("base", "bypassed"):
        assert found[setting, "r3mem"]["same_tokens"] >= 0.99
