"""`R3MemPipeline` and the commands on it: text in, text out, on a tiny model."""

import json

import pytest
import torch

from r3mem_fast import R3MemConfig, R3MemModel, R3MemPipeline, RememberSettings, load_model
from r3mem_fast.cli import main
from r3mem_fast.training.remember import CHECKPOINT

TEXT = "The ship left Nantucket. Ahab of the Pequod was mad about the whale, said Starbuck."
SETTINGS = RememberSettings(
    learning_rate=1e-2, anchor_windows=4, anchor_tokens=12, anchor_weight=1.0, divergence=1.0, decoys=2, max_steps=400
)
CONFIG = R3MemConfig(core=(1, 3), first_adapted_layer=0)


@pytest.fixture(scope="module")
def remembered(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("memory") / "adapter"
    pipeline = R3MemPipeline(str(folder), config=CONFIG)
    report = pipeline.remember({"ship": TEXT}, folder=target, settings=SETTINGS, progress=False)
    return pipeline, report, target


def test_remembered_and_recalled(remembered):
    pipeline, report, target = remembered
    assert report.exact_match == 1.0 and {pair.level for pair in report.pairs} == {"document", "entity"}
    for pair in report.pairs:
        assert pipeline.recall(pair.query) == pair.context
    assert pipeline.recall([pair.query for pair in report.pairs]) == [pair.context for pair in report.pairs]
    assert pipeline.recall(f"  {report.pairs[0].query}\n") == report.pairs[0].context
    assert sorted(path.name for path in target.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "r3mem.json",
    ]
    manifest = json.loads((target / "r3mem.json").read_text())
    assert [entry["query"] for entry in manifest["remembered"]] == [pair.query for pair in report.pairs]
    assert TEXT[:20] not in json.dumps(manifest)  # the adapter remembers, not the file


def test_loaded_again_and_more_remembered(remembered, tmp_path):
    _, report, target = remembered
    pipeline = R3MemPipeline(target)
    assert pipeline.recall(report.pairs[0].query) == report.pairs[0].context
    more = pipeline.remember(
        "A second note, of Elizabeth and Darcy.", folder=tmp_path, settings=SETTINGS, progress=False
    )
    assert more.pairs[: len(report.pairs)] == report.pairs  # recalled, and learned along
    assert more.exact_match == 1.0
    again = R3MemPipeline(tmp_path)
    assert again.recall(more.pairs[-1].query) == more.pairs[-1].context
    assert again.recall(report.pairs[0].query) == report.pairs[0].context
    # A document of the same name takes the place of the old one.
    few = RememberSettings(max_steps=1, divergence=None)
    pairs = again.remember({"ship": "Quite another ship."}, settings=few, progress=False).pairs
    assert [pair.context for pair in pairs if pair.document == "ship"] == ["Quite another ship."] * 2


def test_what_cannot_be_recalled_is_not_rehearsed(remembered):
    _, report, target = remembered
    pipeline = R3MemPipeline(target)
    pipeline.remembered[0]["sha256"] = "0" * 64
    few = RememberSettings(max_steps=1, divergence=None)
    found = pipeline.remember("Something else.", settings=few, progress=False)
    assert report.pairs[0].query not in {pair.query for pair in found.pairs}
    assert found.lost == (report.pairs[0].query,) and "1 of those remembered before were lost" in str(found)
    assert pipeline.remembered[0]["query"] == report.pairs[0].query
    assert not pipeline.remembered[0]["exact"]


def test_ways_to_make_one(folder, remembered):
    model, tokenizer = load_model(str(folder))
    made = R3MemPipeline(R3MemModel(model, CONFIG), tokenizer)
    assert made.model.r3mem_config.core == (1, 3)
    # New adapters start the same every time, and nobody's random state is touched.
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second = (R3MemPipeline(str(folder)).model.state_dict() for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for arguments, settings, error, message in (
        ((model,), {}, TypeError, "needs its tokenizer"),
        ((str(folder), tokenizer), {}, TypeError, "brings its own tokenizer"),
        ((made.model, tokenizer), {"config": CONFIG}, TypeError, "has its config already"),
        ((remembered[2],), {"config": CONFIG}, TypeError, "was saved with its config"),
        (("no-such/model",), {}, OSError, "no-such/model"),
    ):
        with pytest.raises(error, match=message):
            R3MemPipeline(*arguments, **settings)


def test_bad_input(folder, remembered, tmp_path):
    pipeline = R3MemPipeline(str(folder), config=CONFIG)
    for documents, error, message in (
        ("", ValueError, "document 'document 1' holds no text"),
        ([], ValueError, "no document to remember"),
        ([TEXT, 3], TypeError, "document 'document 2' must be a string"),
        ({3: TEXT}, TypeError, "a document's name must be a string, got 3"),
        ("a lone \ud800 surrogate", ValueError, "is no Unicode text"),
        ("long " * 100, ValueError, "does not fit the model's 128 positions"),
    ):
        with pytest.raises(error, match=message):
            pipeline.remember(documents, folder=tmp_path / "never", progress=False)
        assert not (tmp_path / "never").exists()
    with pytest.raises(ValueError, match="holds an adapter already"):
        pipeline.remember(TEXT, folder=remembered[2], progress=False)
    for query in ("", "  ", []):
        with pytest.raises(ValueError, match="query is empty"):
            pipeline.recall(query)


def test_the_commands(folder, tmp_path, capsys):
    text, target = tmp_path / "ship.txt", tmp_path / "adapter"
    text.write_text("Ahab of the Pequod was mad.")
    arguments = ["--device", "cpu", "--model", str(folder), "--core", "1,3", "--learning-rate", "1e-2"]
    status = main(["remember", str(target), str(text), *arguments, "--max-steps", "2", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert status == 1 and report["steps"] == 2 and report["exact_match"] < 1  # not in two steps
    assert not (target / CHECKPOINT).exists()
    status = main(["remember", str(target), str(text), *arguments])
    assert status == 2 and "--model is for a new adapter" in capsys.readouterr().err
    arguments = ["--device", "cpu", "--learning-rate", "1e-2"]
    status = main(["remember", str(target), str(text), *arguments, "--max-steps", "600"])
    printed = capsys.readouterr().out
    assert status == 0 and "2 of 2 contexts exact" in printed and "r3mem recall" in printed
    assert main(["inspect", str(target)]) == 0
    shown = capsys.readouterr().out
    assert "ship.txt  document" in shown and "core: layers 1 to 2" in shown
    assert main(["inspect", str(target), "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)["remembered"][0]
    assert main(["recall", str(target), entry["query"], "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "Ahab of the Pequod was mad.\n"
    assert main(["recall", str(target), entry["query"], "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"query": entry["query"], "context": "Ahab of the Pequod was mad."}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["remember", "{tmp}/x", "{tmp}/none.txt"], "No such file"),
        (["remember", "{tmp}/x", "{empty}"], "holds no text"),
        (["remember", "{tmp}/x", "{long}", "--model", "{folder}"], "does not fit the model's 128 positions"),
        (["remember", "{tmp}/x", "{text}", "--model", "no-such/model"], "no-such/model"),
        (["remember", "{tmp}/x", "{text}", "--model", "{folder}", "--core", "7,9"], "core must be 'all' or"),
        (["remember", "{tmp}/x", "{text}", "{text}", "--model", "{folder}"], "a text is named twice"),
        (["remember", "{unfinished}", "{text}", "--model", "{unfinished}"], "holds a run that was interrupted"),
        (["remember", "{text}", "{text}", "--model", "{folder}"], "is a file"),
        (["recall", "{tmp}/none", "query"], "is no folder"),
        (["recall", "{folder}", "query"], "no adapter was saved there"),
        (["inspect", "{folder}"], "no adapter was saved there"),
        (["inspect", "{damaged}"], "is damaged"),
    ],
)
def test_bad_input_of_commands_is_one_clear_line(folder, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "long").write_text("long " * 100)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / CHECKPOINT).write_text("x")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "r3mem.json").write_text("{")
    names = {
        "folder": folder,
        "tmp": tmp_path,
        **{n: tmp_path / n for n in ("empty", "text", "long", "damaged", "unfinished")},
    }
    assert main([argument.format(**names) for argument in arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("r3mem ")]
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "x").exists()
