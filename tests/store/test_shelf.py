"""`AdapterShelf`: each document has an adapter of its own, which no other changes, and its queries find it."""

import dataclasses
import hashlib
import json
import shutil
import threading

import pytest
import torch

from r3mem_fast import AdapterShelf, R3MemConfig, R3MemPipeline, RememberSettings
from r3mem_fast.adapter_folder import weights_of
from r3mem_fast.cli import main
from r3mem_fast.manifest import OF_A_DOCUMENT, adapters_in, is_adapter, is_shelf
from r3mem_fast.remembered import sha256
from r3mem_fast.store import shelf as module
from r3mem_fast.training.remember import run
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


@pytest.mark.slow
def test_a_name_of_another_document_is_not_answered_with_this_one(learned, monkeypatch):
    """Whatever its adapter says. A word that is no entity changes nothing, nor an entity of the document itself."""
    shelf, _, reports = learned
    pair = reports["ship"].pairs[0]
    assert pair.level == "document" and "Ahab" in pair.context
    monkeypatch.setattr(R3MemPipeline, "recall", lambda pipeline, queries, **settings: [pair.context] * len(queries))
    monkeypatch.setattr(module, "asked_of", lambda queries, entries: [[next(iter(entries))]] * len(queries))
    theirs = {name for other in reports["house"].pairs for name in other.entities}
    own = {name for other in reports["ship"].pairs for name in other.entities}
    name = sorted(theirs - own)[0]
    asked = {
        pair.query: True,
        f"Tell me of {pair.query}": True,
        f"{name} and Ahab": False,
        f"Ahab and {name.lower()}": True,
        "Zebra of Ahab": True,
        " and ".join(sorted(own)): True,
    }
    assert [bool(text) for text in shelf.recall(list(asked))] == list(asked.values())
    shouted = pair.context + name.upper()
    monkeypatch.setattr(R3MemPipeline, "recall", lambda pipeline, queries, **settings: [shouted] * len(queries))
    monkeypatch.setattr(module, "sha256", lambda text: sha256(text.removesuffix(name.upper())))
    assert shelf.recall(f"{name} and Ahab") == shouted


def bits_of_adapter(shelf, document):
    """What the adapter of a document has learned."""
    with shelf.adapter(document) as pipeline:
        return weights_of(pipeline.model)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_document_starts_as_the_first_did(few, folder, tmp_path):
    """Whatever was learned before it: the same text becomes the same adapter."""
    shelf, remember = few
    remember(TEXTS)
    alone = AdapterShelf(tmp_path / "alone", str(folder), config=CONFIG)
    alone.remember({"mill": TEXTS["mill"]}, settings=FEW, progress=False)
    assert same(bits_of_adapter(shelf, "mill"), bits_of_adapter(alone, "mill"))


def test_no_query_asks_for_two_documents(few):
    shelf, remember = few
    remember({"ship": TEXTS["ship"]})
    remember({"boat": TEXTS["ship"].replace("left", "saw")})
    queries = [entry["query"] for entry in shelf.entries()]
    assert len(set(queries)) == len(queries)


def test_a_question_finds_the_query_that_is_most_like_it(few):
    shelf, remember = few
    with pytest.raises(ValueError, match="nothing is remembered"):
        shelf.find("Who?")
    reports = remember(TEXTS)
    pairs = {(pair.document, pair.level): pair.query for report in reports.values() for pair in report.pairs}
    for name, report in reports.items():
        for pair in report.pairs:
            asked = f"What of {pair.query}?"
            assert shelf.find(asked, whole=False) == [pair.query]
            assert shelf.find(asked) == [pairs[name, "document"]]
    assert shelf.find("?", limit=9) == [query for (_, level), query in pairs.items() if level == "document"]
    with pytest.raises(ValueError, match="the query is empty"):
        shelf.find(" ")


def test_a_text_without_a_name_keeps_its_own(few):
    shelf, remember = few
    names = [*remember([TEXTS["ship"], TEXTS["house"]]), *remember(TEXTS["mill"])]
    assert shelf.documents == tuple(names) and len(set(names)) == 3
    assert tuple(remember(TEXTS["ship"])) == (names[0],)  # learned further


def test_an_interrupted_call_goes_on(folder, tmp_path, monkeypatch):
    """Behind the documents that it has learned, within the one that it was at, to the same bits."""
    settings = dataclasses.replace(FEW, max_steps=4, checkpoint_seconds=0)
    train_on, steps = run.Run._train_on, []

    def interrupted(self, batch):
        steps.append(batch)
        if len(steps) == 4 + 3:  # in the second document
            raise KeyboardInterrupt
        return train_on(self, batch)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run.Run, "_train_on", interrupted)
        AdapterShelf(tmp_path / "few", str(folder), config=CONFIG).remember(TEXTS, settings=settings, progress=False)
    assert is_shelf(tmp_path / "few") and len(adapters_in(tmp_path / "few")) == 1
    again, whole = (AdapterShelf(tmp_path / name, str(folder), config=CONFIG) for name in ("few", "whole"))
    monkeypatch.setattr(run.Run, "_train_on", lambda self, batch: steps.append(batch) or train_on(self, batch))
    steps.clear()
    again.remember({"house": TEXTS["house"]}, settings=settings, progress=False)
    assert len(steps) == 2
    whole.remember(TEXTS, settings=settings, progress=False)
    assert again.documents == ("ship", "house")
    assert same(bits_of_adapter(again, "house"), bits_of_adapter(whole, "house"))


@pytest.mark.parametrize("how", ["replaced", "forgotten"])
def test_what_was_begun_goes_with_its_document(few, monkeypatch, how):
    """A text that was learned in part leaves nothing behind when it is corrected, or forgotten."""
    shelf, remember = few
    remember({"ship": TEXTS["ship"]})

    def interrupted(self, batch):
        (shelf._folder / "interrupted").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run.Run, "_train_on", interrupted)
        remember({"house": TEXTS["house"]})
    begun = [path for path in shelf._folder.glob(OF_A_DOCUMENT) if not is_adapter(path)]
    assert not begun or begun[0].is_dir()  # nothing was to be kept before the first step
    (shelf._folder / f"{sha256('house')[:16]}{'0' * 16}").mkdir(exist_ok=True)
    if how == "replaced":
        remember({"house": TEXTS["mill"]})
    else:
        shelf.forget("house")
    assert len(list(shelf._folder.glob(OF_A_DOCUMENT))) == len(shelf.documents) == 1 + (how == "replaced")


def test_of_two_versions_the_newest_stays(few, monkeypatch):
    """A process was killed when the new text was learned, and the old one was not yet removed."""
    shelf, remember = few
    remember({"ship": TEXTS["ship"]})
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(AdapterShelf, "_remove", lambda self, paths: list(paths) and exit("killed"))
        remember({"ship": TEXTS["mill"]})
    assert len(adapters_in(shelf._folder)) == 2 and shelf.documents == ("ship",)
    newest = adapters_in(shelf._folder)[-1]
    remember({"house": TEXTS["house"]})
    assert newest in adapters_in(shelf._folder) and len(adapters_in(shelf._folder)) == 2


def test_a_removal_that_was_killed_is_finished(few, monkeypatch):
    shelf, remember = few
    remember(TEXTS)
    monkeypatch.setattr(module.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        shelf.forget("ship")
    assert shelf.documents == ("house", "mill")
    monkeypatch.undo()
    shelf.forget("house")
    assert [path for path in shelf._folder.iterdir() if path.is_dir()] == adapters_in(shelf._folder)


def test_other_adapters_beside_a_shelfs_are_none_of_it(few, folder, tmp_path):
    shelf, remember = few
    remember({"ship": TEXTS["ship"]})
    R3MemPipeline(str(folder), config=CONFIG).save(tmp_path / "few" / "other")
    assert shelf.documents == ("ship",) and len(adapters_in(tmp_path / "few")) == 1
    assert AdapterShelf(tmp_path / "few").recall("Ahab") == ""


def test_it_takes_a_pipeline(folder, tmp_path):
    """A new document starts with the adapters that the pipeline has, and it has them whenever the shelf is idle."""
    pipeline = R3MemPipeline(str(folder), config=CONFIG)
    with torch.no_grad():
        for weight in pipeline.model.parameters():
            if weight.requires_grad:
                weight.add_(0.01)
    own = weights_of(pipeline.model)
    shelves = [AdapterShelf(tmp_path / name, pipeline) for name in ("one", "other")]
    for shelf in (*shelves, *reversed(shelves)):
        shelf.remember({"ship": TEXTS["ship"]} if shelf is shelves[0] else TEXTS, settings=FEW, progress=False)
        assert same(weights_of(pipeline.model), own)
    fresh = AdapterShelf(tmp_path / "fresh", str(folder), config=CONFIG)
    fresh.remember({"ship": TEXTS["ship"]}, settings=FEW, progress=False)
    first, fresh_one = bits_of_adapter(shelves[0], "ship"), bits_of_adapter(fresh, "ship")
    assert same(first, bits_of_adapter(shelves[1], "ship")) and not same(first, fresh_one)
    shelves[0].recall("Ahab")
    assert same(weights_of(pipeline.model), own)
    with pytest.raises(TypeError, match="a pipeline has its settings already"):
        AdapterShelf(tmp_path / "one", pipeline, device="cpu")


def test_threads_take_turns(folder, tmp_path):
    """The model has the adapter of one document at a time, and its own in the end."""
    pipeline = R3MemPipeline(str(folder), config=CONFIG)
    own = weights_of(pipeline.model)
    shelves = [AdapterShelf(tmp_path / "shelf", pipeline) for _ in range(2)]
    shelves[0].remember(TEXTS, settings=FEW, progress=False)
    inside, entered = [], threading.Event()

    def other():
        with shelves[1].adapter("house"):
            inside.append("house")
            entered.set()

    with shelves[0].adapter("ship"):
        ship = weights_of(pipeline.model)
        thread = threading.Thread(target=other)
        thread.start()
        assert not entered.wait(0.3)
        assert same(weights_of(pipeline.model), ship) and not same(ship, own)
        inside.append("ship")
    thread.join()
    assert inside == ["ship", "house"] and same(weights_of(pipeline.model), own)


def test_a_document_that_another_process_removes(few, monkeypatch):
    """The query is asked of those that are left."""
    shelf, remember = few
    remember({name: TEXTS[name] for name in ("ship", "house")})
    asked_of, other = module.asked_of, AdapterShelf(shelf._folder)

    def removed_meanwhile(queries, paths):
        found = asked_of(queries, paths)
        if "ship" in other.documents:
            other.forget("ship")
        return found

    monkeypatch.setattr(module, "asked_of", removed_meanwhile)
    (query,) = [entry["query"] for entry in shelf.entries()][:1]
    assert shelf.recall(query) == "" and shelf.documents == ("house",)
    (adapters_in(shelf._folder)[0] / "adapter_model.safetensors").unlink()
    with pytest.raises(OSError, match="is incomplete"):
        shelf.recall(query)


def test_wrong_use(few, folder, tmp_path):
    shelf, remember = few
    with pytest.raises(ValueError, match=r"nothing is remembered in .*: remember documents there first"):
        shelf.recall("Ahab")
    remember({"ship": TEXTS["ship"]})
    with pytest.raises(ValueError, match=r"no document 'boat' is remembered here; those that are: \['ship'\]"):
        shelf.forget("boat")
    for settings in ({"config": R3MemConfig(**vars(CONFIG) | {"lora_r": 4})}, {"config": R3MemConfig()}):
        with pytest.raises(ValueError, match="other settings than these, and they could not take turns"):
            AdapterShelf(tmp_path / "few", str(folder), **settings).remember(TEXTS, settings=FEW, progress=False)
    with pytest.raises(ValueError, match="is an adapter; those of a shelf are learned from a base model"):
        AdapterShelf(tmp_path / "other", adapters_in(tmp_path / "few")[0])
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
    assert "with other settings than these" in capsys.readouterr().err
    assert main([*remember, "--model", str(folder), "--core", "1,3"]) == 1  # the same again
    assert main(["remember", str(path), "--apart", str(paths[2]), *more]) == 1
    capsys.readouterr()
    assert main(["inspect", str(path)]) == 0
    assert capsys.readouterr().out.count("adapter for ") == 3
    assert main(["recall", str(path), "Ahab", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert "nothing is remembered for 'Ahab'" in captured.out and "not learned" not in captured.err
