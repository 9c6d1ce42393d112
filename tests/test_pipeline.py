"""`R3MemPipeline` and the commands on it: text in, text out, on a tiny model."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from r3mem_fast import Memory, R3MemConfig, R3MemModel, R3MemPipeline, RememberSettings, load_model, manifest
from r3mem_fast.cli import main
from r3mem_fast.data.models import EMBEDDED_ADAPTER, EMBEDDED_MODEL
from r3mem_fast.data.text import read_text, token_windows
from r3mem_fast.manifest import REMEMBER_CHECKPOINT

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
        ".r3mem.lock",
        "adapter_config.json",
        "adapter_model.safetensors",
        "r3mem.json",
    ]
    written = json.loads((target / "r3mem.json").read_text())
    assert [entry["query"] for entry in written["remembered"]] == [pair.query for pair in report.pairs]
    assert TEXT[:20] not in json.dumps(written)  # the adapter remembers, not the file


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


MEMORY_CONFIG = R3MemConfig(
    core=(1, 3), num_memory_tokens=4, segment_length=16, max_memory_segments=3, adapter_rows="memory"
)
NOTE = "The ship left Nantucket at dawn. Ahab was mad about one whale."


@pytest.fixture(scope="module")
def memorised(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("memory") / "adapter"
    pipeline = R3MemPipeline(str(folder), config=MEMORY_CONFIG)
    report = pipeline.remember({"ship": NOTE}, folder=target, settings=SETTINGS, progress=False)
    return pipeline, report, target


def test_remembered_contexts_come_back_from_their_memories(memorised, folder):
    """From the memory alone, at every level; from another's, or one of zeros, they do not."""
    pipeline, report, target = memorised
    assert report.exact_match == 1.0 and all(report.expanded) and report.cycle_loss > 0
    assert f"{len(report.pairs)} from their memory alone" in str(report)
    memory = pipeline.compress({"ship": NOTE}, levels=["document", "entity"], progress=False)
    assert memory.labels == (("document", "ship"), ("entity", "ship, passage 1"), ("entity", "ship, passage 2"))
    expected = [NOTE, *(pair.context for pair in report.pairs if pair.level == "entity")]
    assert pipeline.expand(memory) == expected
    assert pipeline.expand(memory["document", "ship"]) == NOTE
    finished = pipeline.compress({"ship": NOTE}, levels=["document", "entity"], finish=True, progress=False)
    assert pipeline.expand(finished) == expected
    zeroed = dataclasses.replace(finished, states=torch.zeros_like(finished.states))
    for given in (zeroed, finished.rows([1, 2, 0])):
        assert not any(a == b for a, b in zip(pipeline.expand(given), expected, strict=True))
    written = json.loads((target / "r3mem.json").read_text())
    assert all(entry["expanded"] for entry in written["remembered"])
    again = R3MemPipeline(target)
    assert again.expand(memory) == expected
    # Adapters on memory tokens alone: the forward direction is the base model's.
    base, _ = load_model(str(folder), dtype=again.model.peft_model.dtype)
    ids = torch.tensor([again.tokenizer(NOTE).input_ids])
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, base(ids).logits)


def test_histories(memorised, tmp_path):
    """Compressed piece by piece, saved and gone on from: the same as at one time; and what is read behind it."""
    pipeline, _, _ = memorised
    texts = {"log": "The wind rose. " * 9, "note": "A whale. " * 3}
    whole = pipeline.compress(texts, progress=False)
    assert whole.labels == (("document", "log"), ("document", "note"))
    assert whole.tokens_seen.tolist() == [len(text) for text in texts.values()]
    file = tmp_path / "memory.safetensors"
    pipeline.compress({name: text[:10] for name, text in texts.items()}, progress=False).save(file)
    rest = {name: texts[name][10:] for name in ("note", "log")}  # by name, in whatever order
    memory = pipeline.compress(rest, memory=file, progress=False)
    for name, tensor in whole.tensors().items():
        assert torch.equal(memory.tensors()[name], tensor), name
    assert memory.labels == whole.labels and memory.origin == whole.origin
    ended = pipeline.compress(None, memory=memory, finish=True, progress=False)  # nothing new: the texts have ended
    assert ended.labels == whole.labels and ended.origin == whole.origin
    at_once = pipeline.compress(texts, finish=True, progress=False)
    assert ended.num_segments.tolist() == at_once.num_segments.tolist() == [9, 2]
    # The last segments were read together, and at one time not: a bfloat16 has 8 bits, and some CPUs round otherwise.
    assert (ended.states - at_once.states).abs().max() <= 2**-6 * at_once.states.abs().max()
    assert (ended.states - ended.rows([1, 0]).states).abs().max() > 0.1  # the control
    for name, text in texts.items():  # a row alone: the same to the bit
        alone = pipeline.compress({name: text}, progress=False)
        alone = pipeline.compress(None, memory=alone, finish=True, progress=False)
        at_once = pipeline.compress({name: text}, finish=True, progress=False)
        assert torch.equal(alone.states, at_once.states)
    for settings, error in (
        ({"memory_budget": 9}, "leave them out where a memory goes on"),
        ({"chat": True}, "leave them out where there are none"),
        ({"levels": ["paragraph"]}, "leave them out where there are none"),
    ):
        with pytest.raises(ValueError, match=error):
            pipeline.compress(None, memory=memory, **settings)
    memory.save(file)
    prompts = ["The ", "He said"]
    both = pipeline.generate(prompts, memory=file, max_new_tokens=5)
    assert [pipeline.generate(p, memory=memory[i], max_new_tokens=5) for i, p in enumerate(prompts)] == both
    # One memory serves several prompts.
    shared = pipeline.generate(prompts, memory=memory["document", "log"], max_new_tokens=5)
    assert shared[0] == both[0] and len(shared) == 2
    assert pipeline.generate("The ", max_new_tokens=3) == pipeline.generate(["The "], max_new_tokens=3)[0]
    sampled = pipeline.generate("The ", memory=memory[0], max_new_tokens=3, do_sample=True, num_return_sequences=2)
    assert len(sampled) == 2
    asked = pipeline.expand(memory, ["wind", "whale"], max_new_tokens=4)
    assert pipeline.expand(memory[1], "whale", max_new_tokens=4) == asked[1]


def test_more_rows_than_go_together_at_one_time(memorised):
    pipeline, _, _ = memorised
    texts = {f"n{i}": f"Note {i} " * (i + 1) for i in range(19)}
    together = pipeline.compress(texts, progress=False)
    alone = pipeline.compress(texts["n17"], progress=False)
    assert len(together) == 19 and together["document", "n17"].tokens_seen == alone.tokens_seen
    assert len(pipeline.expand(together, max_new_tokens=1)) == 19


def test_bad_input_of_memories(memorised, remembered, folder, tmp_path):
    pipeline, _, _ = memorised
    memory = pipeline.compress({"a": "Some text.", "b": "Other text."}, progress=False)
    with pytest.raises(ValueError, match="other adapters or settings"):
        remembered[0].generate("text", memory=memory[0])
    with pytest.raises(ValueError, match="other adapters or settings"):
        pipeline.generate("text", memory=remembered[0].compress("text", progress=False))
    for arguments, settings, error, message in (
        (("",), {}, ValueError, "a text to compress is empty"),
        ((["a", 3],), {}, ValueError, "no text: int"),
        (([],), {}, ValueError, "no document"),
        (("one",), {"memory": memory}, ValueError, "1 documents and 2 rows of memory"),
        (({"a": "x", "c": "y"},), {"memory": memory}, ValueError, r"the documents are \['a', 'c'\]"),
        (("x",), {"memory": memory[0], "levels": ["entity"]}, ValueError, "only documents go on"),
        (("x",), {"levels": ["chapter"]}, ValueError, "levels must be some of"),
        (("x",), {"memory": tmp_path / "none"}, OSError, "No such file"),
    ):
        with pytest.raises(error, match=message):
            pipeline.compress(*arguments, **settings, progress=False)
    with pytest.raises(ValueError, match="the prompt is empty"):
        pipeline.generate("", memory=memory[0])
    with pytest.raises(ValueError, match="3 rows of tokens and 2 of memory"):
        pipeline.generate(["a", "b", "c"], memory=memory)
    with pytest.raises(ValueError, match="1 queries and 2 rows of memory"):
        pipeline.expand(memory, "query")
    foreign = dataclasses.replace(memory, origin=dataclasses.replace(memory.origin, tokenizer="0" * 32))
    with pytest.raises(ValueError, match="another tokenizer"):
        pipeline.expand(foreign)


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


def test_what_was_not_exact_is_asked_again(remembered):
    """Training may have left it known all the same. What never was is not lost."""
    _, report, target = remembered
    pipeline = R3MemPipeline(target)
    pipeline.remembered = [{**entry, "exact": False} for entry in pipeline.remembered]
    never = {**pipeline.remembered[0], "query": "Never?", "sha256": "0" * 64}
    pipeline.remembered.append(never)
    few = RememberSettings(max_steps=1, divergence=None)
    found = pipeline.remember("Something else.", settings=few, progress=False)
    assert {pair.query for pair in report.pairs} <= {pair.query for pair in found.pairs}
    assert found.lost == () and never in pipeline.remembered


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
    for given in (str(folder), remembered[2]):
        assert R3MemPipeline(given, attn_implementation="r3mem").model.config._attn_implementation == "r3mem"
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
        ([], ValueError, "there is no document"),
        ([TEXT, 3], TypeError, "document 'document 2' must be a string"),
        ({3: TEXT}, TypeError, "a document's name must be a string, got 3"),
        ("a lone \ud800 surrogate", ValueError, "is no Unicode text"),
        ("long " * 100, ValueError, "at most 95 fit the model's positions"),
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
    assert not (target / REMEMBER_CHECKPOINT).exists()
    status = main(["remember", str(target), str(text), *arguments])
    assert status == 2 and "--core is for a new adapter" in capsys.readouterr().err
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


def test_the_commands_of_memories(folder, tmp_path, capsys):
    text, target, memory = tmp_path / "ship.txt", str(tmp_path / "adapter"), str(tmp_path / "m.safetensors")
    text.write_text("Ahab of the Pequod was mad.\n")
    arguments = ["--model", str(folder), "--core", "1,3", "--memory-tokens", "4", "--segment-length", "16"]
    arguments += ["--memory-segments", "2", "--adapter-rows", "memory", "--learning-rate", "1e-2", "--device", "cpu"]
    assert main(["remember", target, str(text), *arguments, "--max-steps", "600"]) == 0
    assert "2 from their memory alone" in capsys.readouterr().out
    run = ["--device", "cpu"]
    assert main(["compress", target, str(text), "-o", memory, "--json", *run]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tokens"] == [27] and report["segments"] == [1] and report["bytes"] > 0
    assert main(["expand", target, memory, *run]) == 0
    assert capsys.readouterr().out == "Ahab of the Pequod was mad.\n"
    assert main(["expand", target, memory, "--json", "--query", "Ahab", "--max-new-tokens", "3", *run]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == str(text)
    generate = ["generate", target, "He", "--max-new-tokens", "5", *run]
    assert main([*generate, "--memory", memory]) == 0
    behind = capsys.readouterr().out
    assert main([*generate, "--memory", memory, "--json", "--temperature", "0.7", "--top-p", "0.9"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"level", "name", "text"}
    assert main(generate) == 0 and behind
    capsys.readouterr()
    # Going on: the rest of the text in another file, into the same memory file.
    more = tmp_path / "more.txt"
    more.write_text("And so on, and on.\n")
    assert main(["compress", target, str(more), "--memory", memory, "-o", memory, *run]) == 0
    assert "46 tokens in 1 rows" in capsys.readouterr().out
    whole, at_once = tmp_path / "whole.txt", tmp_path / "whole.safetensors"
    whole.write_text(text.read_text() + more.read_text())
    assert main(["compress", target, str(whole), "-o", str(at_once), *run]) == 0
    expected, found = Memory.load(at_once), Memory.load(memory)
    assert all(torch.equal(tensor, found.tensors()[name]) for name, tensor in expected.tensors().items())
    capsys.readouterr()
    both = tmp_path / "levels.safetensors"
    levels = ["--levels", "document", "entity"]
    assert main(["compress", target, str(text), str(more), "-o", str(both), *levels, *run]) == 0
    capsys.readouterr()
    assert main(["inspect", str(both)]) == 0
    shown = capsys.readouterr().out
    assert "memory of 4 rows" in shown and f"entity     {text}, passage 1" in shown
    assert main(["inspect", memory, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["tokens"] == 46
    assert main(["expand", target, str(both), "--level", "document", "--max-new-tokens", "2", *run]) == 0
    assert f"[document: {text}]" in capsys.readouterr().out
    assert main(["inspect", target]) == 0
    assert "memories: 4 tokens a segment of 16, every_layer, adapters on memory rows" in capsys.readouterr().out
    damaged = tmp_path / "damaged"
    damaged.write_bytes(both.read_bytes()[:-3])
    for arguments, message in (
        (["expand", target, str(damaged)], "is damaged"),
        (["inspect", str(damaged)], "is damaged"),
        (["expand", target, str(tmp_path / "none")], "No such file"),
        (["expand", target, memory, "--name", "x"], "no memory with level=None, name='x'"),
        (["generate", target, "He", "--name", "x"], "pass --memory"),
        (["generate", target, ""], "the prompt is empty"),
        (["compress", target, str(text), "-o", str(tmp_path / "no" / "m")], "there is no folder"),
        (["compress", target, str(text), str(more), "--memory", memory, "-o", memory], "2 documents and 1 rows"),
        (["compress", str(folder), str(text), "-o", memory], "no adapter was saved there"),
        (["compress", target, str(text), "-o", memory, "--memory-tokens", "2"], "leave out --memory-tokens"),
        (["remember", str(tmp_path / "x"), str(text), "--segment-length", "8"], "for adapters with --memory-tokens"),
    ):
        assert main(arguments) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("r3mem ")]
        assert len(errors) == 1 and message in errors[0]


def test_memories_of_anchors_have_the_size_that_is_asked_for(folder, tmp_path, capsys):
    text, target, memory = tmp_path / "ship.txt", str(tmp_path / "adapter"), str(tmp_path / "m.safetensors")
    text.write_text("Ahab of the Pequod was mad. " * 4)
    config = R3MemConfig(memory_writer="anchored", adapter_rows="memory", num_memory_tokens=8, segment_length=16)
    config = dataclasses.replace(config, memory_budget=64)
    R3MemPipeline(folder, config=config, device="cpu").save(target)
    compress = ["compress", target, str(text), "-o", memory, "--device", "cpu"]
    for sizes, slots in (([], 7 * 8), (["--memory-tokens", "2"], 7 * 2), (["--memory-budget", "11"], 11)):
        assert main([*compress, *sizes, "--finish"]) == 0
        assert Memory.load(memory).slots.tolist() == [slots]
    assert main(["generate", target, "He", "--memory", memory, "--max-new-tokens", "2", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main([*compress, "--segment-length", "8"]) == 2
    assert "leave out --segment-length" in capsys.readouterr().err


TINY = ["--model", "{folder}", "--memory-tokens", "2", "--segment-length", "8"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["remember", "{tmp}/x", "{tmp}/none.txt"], "No such file"),
        (["remember", "{tmp}/x", "{empty}"], "holds no text"),
        (["remember", "{tmp}/x", "{long}", "--model", "{folder}"], "at most 95 fit the model's positions"),
        (["remember", "{tmp}/x", "{text}", "--model", "no-such/model"], "no-such/model"),
        (["remember", "{tmp}/x", "{text}", "--model", "{folder}", "--core", "7,9"], "core must be 'all' or"),
        (["remember", "{tmp}/x", "{text}", "{text}", "--model", "{folder}"], "a text is named twice"),
        (["remember", "{unfinished}", "{text}", "--model", "{unfinished}"], "was interrupted there"),
        (["remember", "{text}", "{text}", "--model", "{folder}"], "is a file"),
        (["remember", "{folder}", "{text}", "--model", "{folder}"], "is a model, and an adapter there would hide it"),
        (["train", "{text}", "-o", "{folder}", *TINY], "is a model, and an adapter there would hide"),
        (["train", "{text}", "-o", "{unfinished}", *TINY], "a run of another kind was interrupted"),
        (["compress", "-o", "{text}", "{long}", "--model", "{folder}"], "holds no memory that could be replaced"),
        (["refine", "{text}", "-o", "{text}", "--memory", "{long}"], "holds no memory that could be replaced"),
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
    (tmp_path / "unfinished" / REMEMBER_CHECKPOINT).write_text("x")
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
    assert not (tmp_path / "x").exists() and (tmp_path / "text").read_text() == TEXT


def test_no_adapter_takes_the_name_of_the_embedded_model(folder, tmp_path, monkeypatch):
    """Commands that name no model would find the adapter, and its base model under its own name."""
    monkeypatch.chdir(tmp_path)
    pipeline = R3MemPipeline(str(folder), config=CONFIG)
    with pytest.raises(ValueError, match="smollm2-135m is a model, and an adapter there would hide it"):
        pipeline.remember(TEXT, folder="smollm2-135m", progress=False)


def test_an_adapter_that_comes_with_the_package(tmp_path, monkeypatch):
    """It is found by its name, whole, unless a folder of that name lies here; and it is of the embedded model."""
    folder = manifest.folder_of_adapter(EMBEDDED_ADAPTER)
    assert manifest.is_adapter(EMBEDDED_ADAPTER) and folder.parent == manifest.EMBEDDED_ADAPTERS
    described = manifest.read_manifest(EMBEDDED_ADAPTER)
    assert described["base_model"] == EMBEDDED_MODEL and described["r3mem_config"]["num_memory_tokens"] == 64
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20e6
    monkeypatch.chdir(tmp_path)
    (tmp_path / EMBEDDED_ADAPTER).mkdir()
    assert manifest.folder_of_adapter(EMBEDDED_ADAPTER) == Path(EMBEDDED_ADAPTER)
    assert not manifest.is_adapter(EMBEDDED_ADAPTER) and not manifest.is_adapter("../adapters")


@pytest.mark.slow
def test_memories_of_the_embedded_model(tmp_path):
    """On real text: a memory of a page makes its continuation more likely than another page's does."""
    pipeline = R3MemPipeline(EMBEDDED_ADAPTER)
    windows = token_windows(pipeline.tokenizer, read_text(), tokens=512, count=8)
    before, after = windows.split(256, dim=1)
    memory = pipeline.model.compress(before)
    with torch.no_grad():
        own = pipeline.model(after, labels=after, memory=memory).loss
        foreign = dataclasses.replace(memory.rows([4, 5, 6, 7, 0, 1, 2, 3]), recent=memory.recent)
        assert own < pipeline.model(after, labels=after, memory=foreign).loss
