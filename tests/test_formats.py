"""Files that earlier versions wrote load in this one, and mean the same: see `tests/formats/write.py`."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from r3mem_fast import Memory, R3MemPipeline
from r3mem_fast.hierarchy import Pair
from r3mem_fast.training import history, remember
from tests.formats.write import CONFIG, LONG_TEXT, REMEMBER, TEXT, TRAIN

VERSIONS = sorted(path for path in (Path(__file__).parent / "formats").glob("v*") if path.is_dir())
of_each_version = pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)


def expected(version):
    return json.loads((version / "expected.json").read_text())


def test_there_are_some():
    assert VERSIONS


@of_each_version
def test_an_adapter_and_a_memory_file(version):
    wanted = expected(version)
    pipeline = R3MemPipeline(version / "adapter", base=version / "base")
    assert pipeline.recall(wanted["query"]) == wanted["context"] == TEXT
    memory = Memory.load(version / "memory.safetensors", pipeline.model)
    assert pipeline.generate("The ", memory=memory[0], max_new_tokens=8) == wanted["generated"]
    assert pipeline.expand(pipeline.compress(TEXT, progress=False), max_new_tokens=80) == wanted["expanded"]
    again = pipeline.compress({"ship": TEXT, "log": LONG_TEXT}, progress=False)
    assert again.origin == memory.origin and again.labels == memory.labels
    assert (again.states - memory.states).abs().max() < 1e-3  # of another machine, perhaps


@of_each_version
def test_a_run_of_remember_goes_on(version, tmp_path):
    wanted = expected(version)
    folder = shutil.copytree(version / "remembering", tmp_path / "run")
    pipeline = R3MemPipeline(version / "base", config=CONFIG, dtype="float32")
    pairs = [Pair(level, "ship", query, context, (), "extractive") for level, query, context in wanted["pairs"]]
    settings = dataclasses.replace(REMEMBER, max_steps=wanted["remember_steps"] + 2)
    report = remember.remember(pipeline.model, pipeline.tokenizer, pairs, settings, folder=folder, progress=False)
    assert report.steps == wanted["remember_steps"] + 2


@of_each_version
def test_a_run_of_train_goes_on_to_the_same_end(version, tmp_path):
    folder = shutil.copytree(version / "training", tmp_path / "run")
    pipeline = R3MemPipeline(version / "base", config=CONFIG, dtype="float32")
    rows = [pipeline.tokenizer(LONG_TEXT, add_special_tokens=False).input_ids]
    report = history.train(pipeline.model, rows, TRAIN, folder=folder, progress=False)
    wanted = expected(version)["train_losses"]
    assert report.steps == TRAIN.steps
    assert report.losses[0] == tuple(wanted[0])  # of the steps that this process did not make
