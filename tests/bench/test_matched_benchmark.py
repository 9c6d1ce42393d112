"""`bench.matched`: its arms and shares, on a tiny model."""

import dataclasses
import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from bench import adapted, anchored, compress_speed, matched, mixed_texts, perplexity, texts
from bench.matched_arms import Arms
from r3mem_fast import R3MemConfig, R3MemPipeline
from r3mem_fast.adapter_folder import weights_of
from r3mem_fast.data.corpus import read_texts
from tests.test_codec import begins_texts


@pytest.mark.parametrize("begins", [False, True])
def test_arms_and_shares(folder, tmp_path, monkeypatch, begins):
    """What nothing is left out of is the whole segment: 12 slots for the 12 tokens before a tail of 4. A token that
    begins a text, if the tokenizer has one, is the first of them for all arms, and has a slot beside."""
    most = 11 if begins else 12
    if begins:
        folder = shutil.copytree(folder, tmp_path / "model")
        begins_texts(AutoTokenizer.from_pretrained(folder)).save_pretrained(folder)
    texts = []
    for index in range(2):
        texts.append(tmp_path / f"{index}.txt")
        texts[-1].write_text("".join(chr(40 + (index * 7 + i * i) % 50) for i in range(600)))
    output = tmp_path / "out.jsonl"
    settings = {"segments": 6, "chains": 2, "batch": 4, "budget": 16, "length": 16, "tail": 4}
    settings |= {"dtype": "float32"}
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    arguments += [
        "--slots",
        "3",
        str(most),
        "--text",
        *map(str, texts),
        "--model",
        str(folder),
        "--output",
        str(output),
    ]
    arguments += ["--presses", "--queries", "reread", "own+pairs", "--long", "2"]
    monkeypatch.setattr(matched, "LONG", 9)
    assert matched.main(arguments) == 0
    head, *found = [json.loads(line) for line in output.read_text().splitlines()][1:]
    assert (head["segments"], head["chains"], head["texts"]) == (6, 2, 2)
    arms = {r["arm"]: r["nats_per_token"] for r in found if "arm" in r and "places" not in r}
    kinds = {f"{kind}_{slots}" for kind in ("raw", "even", "attended", "matched", "foreign") for slots in (3, most)}
    kinds |= {f"matched_{slots} by {queries}" for queries in ("reread", "own+pairs") for slots in (3, most)}
    assert set(arms) == {"tail", "full", "foreign", *kinds}
    for kind in ("raw_{}", "even_{}", "attended_{}", "matched_{}", "matched_{} by reread"):
        arm = kind.format(most)
        assert abs(arms[arm] - arms["full"]) < 2e-3, arm
    closed = {(r["closed_by"], r["of"]): r for r in found if "closed_by" in r}
    assert all(r["low"] <= r["mean"] <= r["high"] for r in closed.values())
    assert ("matched_16_of_7", "full_of_7") in closed and ("raw_16_of_7", "full_of_7") in closed
    better = {(r["nats_better_than"], r["slots"]) for r in found if "nats_better_than" in r}
    rivals = ("raw", "even", "attended", "matched by reread", "matched by own+pairs")
    singles = {(rival, slots) for rival in rivals for slots in (3, most)}
    assert better == {*singles, ("raw", 16), ("matched, of 7 segments", 16)}
    assert head["long_chains"] == 2 and "matched_16_of_9" in {r.get("arm") for r in found}


@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_anchors_that_have_learned_nothing_are_the_closed_form(folder, tmp_path, allocation):
    """Behind one segment and behind seven; a foreign one, too."""
    config = R3MemConfig(memory_writer="anchored", adapter_rows="memory", num_memory_tokens=4, segment_length=16)
    config = dataclasses.replace(config, segment_overlap=4, memory_budget=4, memory_allocation=allocation)
    R3MemPipeline(folder, config=config, dtype="float32").save(tmp_path / "anchors")
    text, output = tmp_path / "text.txt", tmp_path / "out.jsonl"
    text.write_text("".join(chr(40 + i * i % 50) for i in range(900)))
    numbers = {"segments": 6, "chains": 2, "batch": 4, "budget": 16, "length": 16, "tail": 4, "chain-slots": 2}
    arguments = [
        "--slots",
        "3",
        "8",
        *(part for name, number in numbers.items() for part in (f"--{name}", f"{number}")),
    ]
    arguments += ["--dtype", "float32", "--model", str(folder), "--adapter", str(tmp_path / "anchors"), "--presses"]
    arguments += ["--adaptive"] * (allocation == "adaptive")
    assert matched.main([*arguments, "--text", str(text), "--output", str(output)]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    arms = {record["arm"]: record["nats_per_token"] for record in found if "nats_per_token" in record}
    closed = "matched" if allocation == "uniform" else "adaptive"
    for arm in ("{}_3", "{}_8", "{}_16_of_7"):
        assert arms[arm.format("anchored")] == arms[arm.format(closed)]
    foreign = "foreign_3" if allocation == "uniform" else "foreign_adaptive_3"
    assert arms["foreign_anchored_3"] == arms[foreign] != arms["anchored_3"]
    of_seven = arms["foreign_anchored_16_of_7"]
    assert of_seven == arms[f"foreign_{closed}_16_of_7"] != arms["anchored_16_of_7"]
    better = {(r["arm"], r["nats_better_than"]): r["mean"] for r in found if "nats_better_than" in r and "arm" in r}
    places = {f"anchored_{arm}" for arm in ("3", "8", "16_of_7")}
    assert {arm: mean for (arm, rival), mean in better.items() if rival == closed and arm in places} == dict.fromkeys(
        places, 0
    )


def test_adapters_that_have_learned_nothing_read_as_the_base_model(folder, tmp_path):
    text, output = tmp_path / "text.txt", tmp_path / "out.jsonl"
    text.write_text("".join(chr(40 + i * i % 50) for i in range(900)))
    for rows in ("memory", "all"):
        config = R3MemConfig(memory_writer="anchored", adapter_rows=rows, num_memory_tokens=4, segment_length=16)
        config = dataclasses.replace(config, segment_overlap=4, memory_budget=4)
        R3MemPipeline(folder, config=config, dtype="float32").save(tmp_path / rows)
    arguments = [str(tmp_path / "memory"), str(tmp_path / "all"), "--text", str(text), "--slots", "3", "8"]
    arguments += ["--dtype", "float32", "--segments", "6", "--batch", "4", "--output", str(output)]
    assert adapted.main(arguments) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    arms = {record["arm"]: record["nats_per_token"] for record in found if "nats_per_token" in record}
    for mine, its in (("adapted_tail", "tail"), ("adapted_full", "full"), ("adapted_3", "anchored_3")):
        assert arms[mine] == arms[its]
    assert arms["foreign_adapted_8"] == arms["foreign_anchored_8"] != arms["anchored_8"]
    with pytest.raises(ValueError, match=r'the anchored adapter must be one of anchors .* with rows "memory"'):
        adapted.main([str(tmp_path / "all"), *arguments[1:]])


def test_an_adapter_of_anchors_goes_on_in_another_allocation(folder, tmp_path):
    """With the same weights, or rounded ones."""
    config = R3MemConfig(memory_writer="anchored", adapter_rows="memory", num_memory_tokens=4, segment_length=16)
    learned = R3MemPipeline(folder, config=config, dtype="float32")
    with torch.no_grad():
        for index, weight in enumerate(learned.model.parameters()):
            weight += 0.01 * index * weight.requires_grad
    learned.save(tmp_path / "uniform")
    adapter = str(tmp_path / "uniform")
    assert anchored.main([adapter, str(tmp_path / "shared"), "--memory-allocation", "adaptive"]) == 0
    found = R3MemPipeline(tmp_path / "shared", dtype="float32").model
    assert found.r3mem_config == dataclasses.replace(learned.model.r3mem_config, memory_allocation="adaptive")
    weights, others = weights_of(learned.model), weights_of(found)
    assert weights.keys() == others.keys() and all(torch.equal(others[name], weights[name]) for name in weights)
    changed = ["--memory-budget", "8", "--beyond-budget", "rematch", "--adapter-dtype", "bfloat16"]
    assert anchored.main([adapter, str(tmp_path / "rounded"), *changed]) == 0
    found = R3MemPipeline(tmp_path / "rounded", dtype="float32").model
    assert (found.r3mem_config.memory_budget, found.r3mem_config.beyond_budget) == (8, "rematch")
    rounded = {name: weight.to(torch.bfloat16).float() for name, weight in weights.items()}
    assert all(torch.equal(weight, rounded[name]) for name, weight in weights_of(found).items())
    R3MemPipeline(folder, config=R3MemConfig(num_memory_tokens=4, segment_length=16)).save(tmp_path / "tokens")
    with pytest.raises(ValueError, match="holds no adapter of anchors"):
        anchored.main([str(tmp_path / "tokens"), str(tmp_path / "x")])


def test_heads_that_share_slots_are_a_rival(folder, tmp_path):
    output = tmp_path / "out.jsonl"
    numbers = {"segments": 3, "chains": 0, "length": 16, "tail": 4, "batch": 2}
    arguments = [part for name, number in numbers.items() for part in (f"--{name}", f"{number}")]
    arguments += ["--slots", "3", "12", "--dtype", "float32", "--model", str(folder), "--presses", "--adaptive"]
    assert matched.main([*arguments, "--rivals", "--foreign", "--output", str(output)]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    arms = {record["arm"]: record["nats_per_token"] for record in found if "nats_per_token" in record}
    kinds = ("matched", "adaptive", "attended_adaptive")
    assert arms.keys() - {"foreign"} == {"tail", "full", *(f"{kind}_{slots}" for kind in kinds for slots in (3, 12))}
    for kind in kinds:  # a slot for each token that is not read again
        assert abs(arms[f"{kind}_12"] - arms["full"]) < 2e-3
    better = {(r["arm"], r["nats_better_than"]) for r in found if "nats_better_than" in r}
    assert better == {(f"adaptive_{slots}", rival) for slots in (3, 12) for rival in ("matched", "attended_adaptive")}


def test_an_interrupted_run_goes_on(folder, tmp_path, monkeypatch):
    """The same command measures what is missing, and writes what a run without an interruption does."""
    text, whole, output = (tmp_path / name for name in ("text", "whole.jsonl", "out.jsonl"))
    text.write_text("".join(chr(40 + i * i % 50) for i in range(600)))
    settings = {"segments": 5, "chains": 2, "batch": 2, "budget": 16, "length": 16, "tail": 4, "slots": 3}
    arguments = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    arguments += ["--model", str(folder), "--text", str(text), "--presses", "--rivals", "raw"]
    assert matched.main([*arguments, "--output", str(whole)]) == 0
    arguments += ["--output", str(output)]
    measure, starts = Arms.behind_one, []

    def interrupted(arms, places, foreign):
        if len(starts) == 2:
            raise KeyboardInterrupt
        starts.append(len(places))
        return measure(arms, places, foreign)

    monkeypatch.setattr(Arms, "behind_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        matched.main(arguments)
    with pytest.raises(
        ValueError, match=r"unfinished is of an interrupted run with another batch, tail: run the same"
    ):
        matched.main([*arguments, "--batch", "3", "--tail", "5"])
    starts.clear()
    assert matched.main(arguments) == 0
    assert starts == [1]  # of five places in batches of two
    assert output.read_text().splitlines()[1:] == whole.read_text().splitlines()[1:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "text", "whole.jsonl"]


def test_the_speed_of_compressing(folder, tmp_path):
    """Both arms run, in pairs, and the share of tokens that are read twice is the overlap's."""
    output = tmp_path / "out.jsonl"
    arguments = ["--model", str(folder), "--dtype", "float32", "--tokens", "50", "--length", "16", "--overlap", "4"]
    arguments += ["--slots", "4", "--budgets", "4", "--rows", "2", "--pairs", "2", "--whole", "--output", str(output)]
    assert compress_speed.main(arguments) == 0
    _, record = [json.loads(line) for line in output.read_text().splitlines()]
    assert record["tokens"] == 96 and record["again"] == round(8 / 48, 4)
    assert record["lowest"] <= record["of_prefill"] <= record["highest"]
    assert record["whole_tokens_per_second"] > 0 and record["compress_operations"] > record["prefill_operations"] > 0


@pytest.mark.parametrize("kind", ["code", "help"])
def test_texts_that_every_machine_has(kind):
    found = texts.texts_of(kind)
    assert all(text.strip() for text in found) and sum(map(len, found)) > 200_000


def test_texts_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="lie in a folder of data sets"):
        texts.texts_of("novels")
    with pytest.raises(ValueError, match="kind must be one of"):
        texts.texts_of("poems")
    with pytest.raises(FileNotFoundError):
        texts.texts_of("dialogue", tmp_path)


def test_texts_of_several_kinds_in_one_file(tmp_path):
    assert mixed_texts.main(["code", "help", "-o", str(tmp_path / "mixed.jsonl")]) == 0
    assert read_texts(tmp_path / "mixed.jsonl") == [*texts.texts_of("code"), *texts.texts_of("help")]


def test_perplexity_by_chosen_settings(folder, tmp_path):
    """One record of the ordinary network, and one of each setting asked for."""
    output = tmp_path / "out.jsonl"
    settings = ["--tokens", "16", "--windows", "2", "--settings", "4,14", "8,12", "--output", str(output)]
    perplexity.main(["--model", str(folder), *settings])
    found = [json.loads(line) for line in output.read_text().splitlines()][1:]
    assert [(r["bits"], r["fraction_bits"]) for r in found] == [(None, None), (4, 14), (8, 12)]
    assert all(0.5 < r["ratio"] < 2 for r in found)
