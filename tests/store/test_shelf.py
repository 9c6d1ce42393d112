"""`AdapterShelf`: each document has an adapter of its own, which no other changes, and its queries find it."""

import hashlib
import json
import shutil

import pytest
import torch

from r3mem_fast import AdapterShelf, R3MemPipeline, RememberSettings
from r3mem_fast import pipeline as pipeline_module
from r3mem_fast.adapter_folder import weights_of
from r3mem_fast.cli import main
from r3mem_fast.manifest import adapters_in
from r3mem_fast.store import shelf as module
from tests.test_pipeline import CONFIG, SETTINGS

TEXTS = {
    "ship": "The ship left Nantucket. Ahab of the Pequod was mad, said Starbuck.",
    "house": "Darcy met Elizabeth at dawn. The ball at Netherfield was over.",
    "mill": "Ida hid the key in the mill. Olaf of Bergen never found it.",
}
FEW = RememberSettings(max_steps=1, anchor_windows=2, anchor_tokens=8, decoys=1)


@pytest.fixture(scope="module")
def learned(folder, tmp_path_factory):
    """A shelf on which two documents are exact, its folder, and their reports."""
    path = tmp_path_factory.mktemp("shelves") / "shelf"
    shelf = AdapterShelf(path, str(folder), config=CONFIG)
    documents = {name: TEXTS[name] for name in ("ship", "house")}
    return shelf, path, shelf.remember(documents, settings=SETTINGS, progress=False)


@pytest.fixture
def copied(learned, tmp_path):
    """A copy of that folder, which a test may change."""
    return shutil.copytree(learned[1], tmp_path / "copy")


@pytest.fixture
def few(folder, tmp_path):
    """A new shelf that learns nothing to the end, in no time."""
    shelf = AdapterShelf(tmp_path / "few", str(folder), config=CONFIG)
    return shelf, lambda texts: shelf.remember(texts, settings=FEW, progress=False)


def bits_of(path):
    """Digests of all files below a folder."""
    files = sorted(one for one in path.rglob("*") if one.is_file() and not one.name.startswith(".r3mem"))
    return {str(one.relative_to(path)): hashlib.sha256(one.read_bytes()).hexdigest() for one in files}


@pytest.mark.slow
def test_each_query_finds_its_adapter(learned):
    shelf, path, reports = learned
    assert [report.exact_match for report in reports.values()] == [1.0, 1.0]
    pairs = [pair for report in reports.values() for pair in report.pairs]
    pairs = pairs[::2] + pairs[1::2]  # of both, in turns
    for one in (shelf, AdapterShelf(path)):
        assert one.documents == ("ship", "house")
        assert one.recall([pair.query for pair in pairs]) == [pair.context for pair in pairs]
        assert one.recall(pairs[-1].query) == pairs[-1].context
        assert one.recall("xylophone quartz") == ""
        assert [entry["query"] for entry in one.entries()] == [p.query for r in reports.values() for p in r.pairs]
    assert json.dumps(shelf.entries()).count(TEXTS["ship"][:20]) == 0


@pytest.mark.slow
def test_no_document_changes_another(learned, copied):
    shelf, folders = AdapterShelf(copied), adapters_in(copied)
    before = {path.name: bits_of(path) for path in folders}
    shelf.remember({"mill": TEXTS["mill"]}, settings=FEW, progress=False)
    assert shelf.documents == ("ship", "house", "mill")
    assert {path.name: bits_of(path) for path in folders} == before
    shelf.forget("ship")
    assert shelf.documents == ("house", "mill") and bits_of(folders[1]) == before[folders[1].name]
    pairs = learned[2]["house"].pairs
    assert [shelf.recall(pair.query) for pair in pairs] == [pair.context for pair in pairs]
    assert all(shelf.recall(pair.query) == "" for pair in learned[2]["ship"].pairs)


@pytest.mark.slow
def test_what_is_exact_is_not_learned_again(learned, copied):
    shelf, before = AdapterShelf(copied), bits_of(copied)
    assert shelf.remember({"ship": TEXTS["ship"]}, settings=FEW, progress=False) == {}
    assert bits_of(copied) == before
    assert shelf.remember({"ship": TEXTS["mill"]}, settings=FEW, progress=False).keys() == {"ship"}
    assert shelf.documents == ("house", "ship") and len(adapters_in(copied)) == 2


@pytest.mark.slow
def test_what_comes_back_is_the_text_or_nothing(learned, monkeypatch):
    shelf, _, reports = learned
    recall = R3MemPipeline.recall
    monkeypatch.setattr(
        R3MemPipeline, "recall", lambda *asked, **settings: [f"{text}!" for text in recall(*asked, **settings)]
    )
    assert shelf.recall(reports["ship"].pairs[0].query) == ""


def test_every_document_starts_as_the_first_did(few, folder, tmp_path):
    """Whatever was learned before it: the same text becomes the same adapter."""
    shelf, remember = few
    remember(TEXTS)
    alone = AdapterShelf(tmp_path / "alone", str(folder), config=CONFIG)
    alone.remember({"mill": TEXTS["mill"]}, settings=FEW, progress=False)
    one, other = (weights_of(found.pipeline("mill").model) for found in (shelf, alone))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_no_query_asks_for_two_documents(few):
    shelf, remember = few
    remember({"ship": TEXTS["ship"]})
    remember({"boat": TEXTS["ship"].replace("left", "saw")})
    queries = [entry["query"] for entry in shelf.entries()]
    assert len(set(queries)) == len(queries)


def test_a_text_without_a_name_keeps_its_own(few):
    shelf, remember = few
    names = [*remember([TEXTS["ship"], TEXTS["house"]]), *remember(TEXTS["mill"])]
    assert shelf.documents == tuple(names) and len(set(names)) == 3
    assert tuple(remember(TEXTS["ship"])) == (names[0],)  # learned further


@pytest.mark.parametrize("saved", [False, True])
def test_an_interrupted_call_goes_on(few, folder, tmp_path, monkeypatch, saved):
    """After the documents that it has learned, and within one, whether or not its adapter was saved already."""
    _, remember = few
    name = "discard_checkpoint" if saved else "remember_documents"
    original, calls = getattr(pipeline_module, name), []

    def interrupted(*arguments, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **settings)

    monkeypatch.setattr(pipeline_module, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        remember(TEXTS)
    again = AdapterShelf(tmp_path / "few")
    again.remember(TEXTS, settings=FEW, progress=False)
    assert sorted(again.documents) == sorted(TEXTS)
    if saved:
        return  # and not exact, so that it was learned further
    whole = AdapterShelf(tmp_path / "whole", str(folder), config=CONFIG)
    whole.remember({"house": TEXTS["house"]}, settings=FEW, progress=False)
    one, other = (weights_of(found.pipeline("house").model) for found in (again, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_removal_that_was_killed_is_finished(few, monkeypatch):
    shelf, remember = few
    remember(TEXTS)
    monkeypatch.setattr(module.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        shelf.forget("ship")
    assert shelf.documents == ("house", "mill")
    monkeypatch.undo()
    shelf.forget("house")
    assert [path.name for path in shelf._folder.iterdir() if path.is_dir()] == [adapters_in(shelf._folder)[0].name]


def test_other_adapters_beside_a_shelfs_are_none_of_it(few, folder, tmp_path):
    shelf, remember = few
    remember({"ship": TEXTS["ship"]})
    R3MemPipeline(str(folder), config=CONFIG).save(tmp_path / "few" / "other")
    assert shelf.documents == ("ship",) and len(adapters_in(tmp_path / "few")) == 1
    assert AdapterShelf(tmp_path / "few").recall("Ahab") == ""


def test_it_takes_a_pipeline(folder, tmp_path):
    """A new document starts with the adapters that the pipeline had."""
    pipeline = R3MemPipeline(str(folder), config=CONFIG)
    alone = AdapterShelf(tmp_path / "alone", str(folder), config=CONFIG)
    shelf = AdapterShelf(tmp_path / "shelf", pipeline)
    for one in (shelf, alone):
        one.remember(TEXTS, settings=FEW, progress=False)
    mine, other = (weights_of(one.pipeline("house").model) for one in (shelf, alone))
    assert shelf.pipeline("house").model is pipeline.model
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    with pytest.raises(TypeError, match="a pipeline has its settings already"):
        AdapterShelf(tmp_path / "shelf", pipeline, device="cpu")


def test_wrong_use(few, folder, tmp_path):
    shelf, remember = few
    with pytest.raises(ValueError, match=r"nothing is remembered in .*: remember documents there first"):
        shelf.recall("Ahab")
    remember({"ship": TEXTS["ship"]})
    with pytest.raises(ValueError, match=r"no document 'boat' is remembered here; those that are: \['ship'\]"):
        shelf.forget("boat")
    with pytest.raises(ValueError, match="holds one adapter for all that it remembers"):
        AdapterShelf(adapters_in(tmp_path / "few")[0])
    (adapters_in(tmp_path / "few")[0] / "r3mem.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        AdapterShelf(tmp_path / "few")


def test_the_commands(folder, tmp_path, capsys):
    path, paths = tmp_path / "shelf", [tmp_path / f"{name}.txt" for name in TEXTS]
    for one, text in zip(paths, TEXTS.values(), strict=True):
        one.write_text(text)
    more = ["--max-steps", "2", "--device", "cpu", "--json"]
    remember = ["remember", str(path), "--apart", *map(str, paths[:2]), *more]
    assert main([*remember, "--model", str(folder), "--core", "1,3"]) == 1  # two steps are too few
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["document"] for line in printed] == [str(one) for one in paths[:2]]
    assert main(["remember", str(path), str(paths[2]), *more]) == 2
    assert "holds an adapter for each document: add to it with --apart" in capsys.readouterr().err
    assert main(["remember", str(path), "--apart", str(paths[2]), "--lora-r", "4", *more]) == 2
    assert "--lora-r is for a new adapter" in capsys.readouterr().err
    assert main(["remember", str(path), "--apart", str(paths[2]), *more]) == 1
    capsys.readouterr()
    assert main(["inspect", str(path)]) == 0
    assert capsys.readouterr().out.count("adapter for ") == 3
    assert main(["recall", str(path), "Ahab", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert "nothing is remembered for 'Ahab'" in captured.out and "not learned" not in captured.err
