"""`MemoryStore`: answers behind what was said, in one process and in several, and errors that say what to do."""

import dataclasses
import gc
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor

from r3mem_fast import MemoryStore, R3MemConfig, R3MemPipeline
from r3mem_fast.memory.reader import MemoryReader
from r3mem_fast.store import DocumentStore, answering, conversations
from tests.store.conftest import CONFIG, RAW_TOKENS, bits_of
from tests.store.test_turns import TURNS

LONG = "something that is long enough to be compressed"
GREEDY = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture
def chats(pipeline):
    """The tokenizer has a chat template."""
    pipeline.tokenizer.chat_template = TURNS
    yield pipeline
    pipeline.tokenizer.chat_template = None


def test_uncompressed_it_is_the_model(chats, opened):
    """Control: where nothing is compressed, an answer is that of the base model to the rendered conversation."""
    store = opened(raw_tokens=1000)
    talk = [
        {"role": "user", "content": "Ida may not eat nuts."}, {"role": "assistant", "content": "Noted."},
    ]  # fmt: skip
    store.add(talk, user_id="anna")
    assert store.memory("anna") is None
    rendered = [
        chats.tokenizer.apply_chat_template(
            [*talk, {"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in ("What?", "Who is it?")
    ]
    expected = [chats.generate(text, **GREEDY).strip() for text in rendered]
    assert store.ask("What?", user_id="anna", **GREEDY) == expected[0]
    assert store.ask(["What?", "Who is it?"], user_id="anna", **GREEDY) == expected  # padded
    question = [{"role": "user", "content": "What?"}]
    assert store.reply(question, user_id="anna", **GREEDY) == expected[0]
    assert len(store.get_all()) == 2  # nothing was added
    alone = chats.tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert store.ask("What?", user_id="nobody", **GREEDY) == chats.generate(alone, **GREEDY).strip()


def test_behind_a_memory_with_room_for_all_it_is_the_model(chats, opened):
    """Control: slots for every token, of which none had to be matched."""
    config = R3MemConfig(
        memory_writer="matched", adapter_rows="memory", num_memory_tokens=16, memory_budget=48, segment_length=16,
        cycle_weight=0.0, core=(1, 3),
    )  # fmt: skip
    pipeline = R3MemPipeline(chats.model.peft_model.get_base_model().name_or_path, config=config)
    pipeline.tokenizer.chat_template = TURNS
    store = opened(model=pipeline)
    store.add("Ida may not eat any nuts.", user_id="anna")
    assert store.memory("anna").tokens_seen.tolist() == [16]
    rendered = pipeline.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Ida may not eat any nuts.\n\nWhat?"}], add_generation_prompt=True, tokenize=False
    )
    assert store.ask("What?", user_id="anna", **GREEDY) == pipeline.generate(rendered, **GREEDY).strip()


def test_passages_stand_before_the_question(chats, opened, monkeypatch):
    """What the memory holds, or has forgotten; what is read as it is anyway does not stand there twice."""
    store, settings, rows = opened(raw_tokens=0), {"do_sample": False, "max_new_tokens": 2}, []
    store.add("Nuts: not any.", user_id="anna")
    store.add({"role": "assistant", "content": "Nut."}, user_id="anna")
    reading, first = store.answering(), store.get_all(user_id="anna")[0]
    history = reading.histories.history("anna")
    assert history.compressed == first.id
    written = reading.written
    monkeypatch.setattr(reading, "written", lambda some, *others: rows.extend(some) or written(some, *others))
    store.ask(["Nuts?", "Zebra?"], user_id="anna", **settings)
    store.ask("Nuts?", user_id="anna", passages=0, **settings)
    said = answering.with_passages("Nuts?", [first]), "Zebra?", "Nuts?"
    assert said[0] == "- I said: Nuts: not any.\n\nNuts?" and "Nut." not in said[0]
    expected = [history.tail + reading.turns.reply([("user", text)], history.last_role) for text in said]
    assert rows == expected
    with pytest.raises(ValueError, match="passages must be 0 or more, got -1"):
        store.ask("Nuts?", user_id="anna", passages=-1)
    with pytest.raises(ValueError, match="by must be one of"):
        opened("empty").ask("Nuts?", user_id="anna", by="luck")


def test_as_many_passages_as_fit(chats, opened):
    """The best first, in the order in which they were said; an item that is too long is left out, not the question."""
    store = opened(raw_tokens=0)
    for text in ("n1", "nuts " * 30, "n2", LONG):
        store.add(text, user_id="anna")
    reading, (first, long, second, _) = store.answering(), store.get_all(user_id="anna")
    history, said = reading.histories.history("anna"), [("user", "Nuts?")]
    both = [("user", answering.with_passages("Nuts?", [first, second]))]
    expected = history.tail + reading.turns.reply(both, "user")
    assert reading.row(history, said, [second, long, first], {"max_new_tokens": 1}) == expected
    assert reading.row(history, said, [], {"max_new_tokens": 1}) == history.tail + reading.turns.reply(said, "user")
    for settings, fits in (
        ({"max_length": len(expected)}, False),
        ({"max_length": len(expected) + 1}, True),
        ({"generation_config": GenerationConfig(max_new_tokens=9)}, True),
        ({"generation_config": GenerationConfig(max_new_tokens=45)}, False),
    ):
        row = reading.row(history, said, [second, first], settings)
        assert (row == expected) == fits and (fits or len(row) < len(expected))
    with pytest.raises(ValueError, match=r"the messages, with \d+ tokens .* take \d+ tokens, and .* for \d+ beside"):
        store.ask("Nuts? " * 20, user_id="anna", **GREEDY)


def test_a_stream_is_the_answer(store):
    store.add(LONG, user_id="anna")
    for question in ("What?", "Who is it?", "Tell me"):
        settings = GREEDY | {"max_new_tokens": 15}
        pieces = list(store.ask(question, user_id="anna", stream=True, **settings))
        assert all(pieces) and "".join(pieces) == store.ask(question, user_id="anna", **settings)
        assert "".join(store.reply(question, user_id="anna", stream=True, **settings)) == "".join(pieces)


def test_white_space_around_a_stream():
    for pieces in ([" ", "\n a", " ", "b  ", " ", ""], ["", "  a  b"], ["a", "\n", "\n"], [" "], []):
        found = list(answering._stripped(iter(pieces)))
        assert "".join(found) == "".join(pieces).strip() and all(found)


class Alternating(LogitsProcessor):
    """Has a letter and a space written in turn, so that each word is a piece; may wait in between."""

    def __init__(self, waits_after=None):
        self.count, self.goes_on, self._waits_after = 0, threading.Event(), waits_after

    def __call__(self, input_ids, scores):
        self.count += 1
        if self.count == self._waits_after:
            assert self.goes_on.wait(60)
        scores = torch.full_like(scores, -torch.inf)
        scores[:, (ord("a") if self.count % 2 else ord(" ")) - 32] = 0.0
        return scores


def test_pieces_come_while_it_is_written(store):
    writer = Alternating(waits_after=5)
    stream = store.ask("What?", user_id="anna", stream=True, logits_processor=[writer], **GREEDY)
    assert next(stream) == "a" and writer.count <= 5
    writer.goes_on.set()
    assert list(stream) == [" a", " a"] and writer.count == 6


@pytest.mark.parametrize("how", ["closed", "deleted"])
def test_a_stream_that_nobody_reads_to_its_end(store, how):
    """No more is written, and the lock is free."""
    writer, before = Alternating(waits_after=4), set(threading.enumerate())
    stream = store.ask("What?", user_id="anna", stream=True, logits_processor=[writer], max_new_tokens=40)
    assert next(stream) == "a"
    timer = threading.Timer(0.5, writer.goes_on.set)
    timer.start()
    if how == "closed":
        stream.close()
    else:
        del stream
        gc.collect()
    timer.join()
    assert set(threading.enumerate()) == before and writer.count < 10
    assert store.ask("What?", user_id="anna", **GREEDY) is not None


def test_errors_of_the_writer_of_a_stream(store, monkeypatch):
    store.add(LONG, user_id="anna")
    stream = store.ask("What?", user_id="anna", stream=True, num_beams=2, **GREEDY)
    with pytest.raises(ValueError, match="streamer"):
        list(stream)
    pieces = []
    written = answering.written

    def fails(pipeline, rows, memory, settings):
        written(pipeline, rows, memory, settings)
        raise RuntimeError("of the device")

    monkeypatch.setattr(answering, "written", fails)
    with pytest.raises(RuntimeError, match="of the device"):
        for piece in store.ask("What?", user_id="anna", stream=True, **GREEDY):
            pieces.append(piece)
    monkeypatch.undo()
    assert "".join(pieces).strip() == store.ask("What?", user_id="anna", **GREEDY)


def test_threads(store):
    """Some add and ask while others stream: each has its answer, and nothing waits for ever."""
    store.add(LONG, user_id="anna")
    expected = store.ask("What?", user_id="anna", **GREEDY)
    failed = []

    def work(index):
        try:
            for turn in range(2):
                pieces = store.ask("What?", user_id="anna", stream=True, **GREEDY)
                text = next(pieces, "")
                store.add(f"turn {turn} of number {index}", user_id=f"user {index}")
                assert store.search("turn", user_id=f"user {index}")
                assert text + "".join(pieces) == expected
                assert store.ask("What?", user_id="anna", **GREEDY) == expected
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failed and not any(thread.is_alive() for thread in threads)
    assert len(store.get_all()) == 1 + 3 * 2 and store.users() == ["anna", "user 0", "user 1", "user 2"]


WRITER = """
import sys
from r3mem_fast import MemoryStore, R3MemPipeline
from r3mem_fast.memory.writers import allocation
from tests.store.conftest import CONFIG
allocation._LEAST_SLOTS = 1
folder, model = sys.argv[1:]
store = MemoryStore(folder, R3MemPipeline(model, config=CONFIG), raw_tokens=8)
for index in range(8):
    store.add(f"the other's number {index}", user_id="anna")
    assert store.memory("anna") is not None
"""


@pytest.mark.slow
def test_two_processes_that_add_at_once(opened, folder):
    """Nothing is lost, no reader is refused, and the memory is that of the texts in the database's order."""
    store = opened()
    store.add(LONG, user_id="anna")
    command = [sys.executable, "-c", WRITER, str(store.folder), str(folder)]
    other = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    while other.poll() is None and len(store.get_all()) == 1:
        time.sleep(0.01)
    for index in range(8):
        store.add(f"my number {index}", user_id="anna")
        assert store.memory("anna") is not None
    assert other.wait(120) == 0
    items = store.get_all()
    for name in ("my", "the other's"):
        own = [item.text for item in items if item.text.startswith(name)]
        assert own == [f"{name} number {index}" for index in range(8)]
    alone = opened("alone")
    alone.add([{"role": "user", "content": item.text} for item in items], user_id="anna")
    assert bits_of(store.memory("anna")) == bits_of(alone.memory("anna"))
    held = store.database.held("anna")
    assert {path.name for path in (store.folder / "memories").glob("*.safetensors")} == {held.file}


def test_another_model_or_other_settings(opened, folder, pipeline):
    store = opened()
    store.add(LONG, user_id="anna")
    own = bits_of(store.memory("anna"))
    other = opened(model=R3MemPipeline(str(folder), config=R3MemConfig(**vars(CONFIG) | {"num_memory_tokens": 3})))
    for work in (lambda one: one.add("x", user_id="anna"), lambda one: one.ask("x", user_id="anna"),
                 lambda one: one.memory("anna"), lambda one: one.rebuild("anna")):  # fmt: skip
        with pytest.raises(ValueError, match=r"other settings.*differ in: layout\).*rebuild\(\)"):
            work(other)
    with pytest.raises(ValueError, match="differ in: raw_tokens"):
        opened(raw_tokens=9).memory("anna")
    pipeline.tokenizer.chat_template = TURNS
    try:
        with pytest.raises(ValueError, match=r"differ in: (tokenizer, )?turns"):
            opened().memory("anna")
    finally:
        pipeline.tokenizer.chat_template = None
    assert len(store.get_all()) == 1 and other.search("something", user_id="anna") and other.users() == ["anna"]
    other.rebuild()
    assert bits_of(other.memory("anna")) not in (own, None)
    with pytest.raises(ValueError, match="differ in: layout"):  # the one that was open notices, too
        store.add("more", user_id="boris")
    assert store.users() == ["anna"]
    store.rebuild()
    assert bits_of(store.memory("anna")) == own


def test_a_store_in_which_nothing_was_said_is_of_no_model(opened, folder):
    """Asking it, or deleting all, does not bind it to a model."""
    store = opened()
    store.ask("What?", user_id="anna", **GREEDY)
    config = R3MemConfig(**vars(CONFIG) | {"num_memory_tokens": 3})
    other = opened(model=R3MemPipeline(str(folder), config=config), raw_tokens=9)
    other.add(LONG, user_id="anna")
    with pytest.raises(ValueError, match="differ in: layout, raw_tokens"):
        store.ask("What?", user_id="anna", **GREEDY)
    other.delete(user_id="anna")
    store.add(LONG, user_id="anna")
    assert store.memory("anna") is not None


def test_settings_of_an_empty_store_stay_for_their_model_alone(opened, folder, tmp_path, monkeypatch):
    """Whoever made a folder chose them for its model; another one, while nothing is said, begins with the defaults."""
    monkeypatch.setattr(conversations, "DEFAULT_CONFIG", CONFIG)
    opened("new", str(folder), config={"num_memory_tokens": 3}).ask("What?", user_id="anna", **GREEDY)
    other = shutil.copytree(folder, tmp_path / "other")
    for model, tokens in ((folder, 3), (None, 3), (other, CONFIG.num_memory_tokens)):
        store = opened("new", None if model is None else str(model))
        store.ask("What?", user_id="anna", **GREEDY)
        assert store.memory("anna") is None and store._model.layout.num_memory_tokens == tokens
    store.add(LONG, user_id="anna")
    assert store.memory("anna").layout.num_memory_tokens == CONFIG.num_memory_tokens


def test_an_empty_store_may_be_opened_in_a_way_that_reads_fewer_memories(opened, folder, monkeypatch):
    monkeypatch.setattr(conversations, "DEFAULT_CONFIG", CONFIG)
    opened("new", str(folder)).ask("What?", user_id="anna", **GREEDY)
    store = opened("new", str(folder), attn_implementation="r3mem")
    store.add(LONG, user_id="anna")
    assert store.memory("anna").layout.allocation == "uniform"


def test_an_empty_store_is_told_of_what_was_asked_for_and_cannot_be(opened, folder, monkeypatch):
    """What is asked for by name is not replaced in silence, in an old folder as in a new one."""
    monkeypatch.setattr(conversations, "DEFAULT_CONFIG", CONFIG)
    opened("old", str(folder)).ask("What?", user_id="anna", **GREEDY)
    for name in ("old", "new"):
        store = opened(name, str(folder), attn_implementation="r3mem", config={"memory_allocation": "adaptive"})
        with pytest.raises(ValueError, match=r"cannot read a matched memory.*adaptive"):
            store.add(LONG, user_id="anna")


def test_rebuilding_keeps_memories_of_what_a_model_has_become(opened):
    """A model may change while a store is open, as when its adapter is trained; here the system prompt changes."""
    store = opened()
    store.add(LONG, user_id="anna")
    store._system = "You are another."
    with pytest.raises(ValueError, match="differ in: system"):
        store.memory("anna")
    store.rebuild()
    assert store.database.held("anna").file is not None


def test_no_memory_of_settings_that_are_changed_meanwhile_comes_in(opened, folder, monkeypatch):
    """Another process makes all memories anew while something is added."""
    store = opened()
    store.add(LONG, user_id="anna")
    config = R3MemConfig(**vars(CONFIG) | {"num_memory_tokens": 3})
    other = opened(model=R3MemPipeline(str(folder), config=config))
    identity, add, memories = other._identity(), store.database.add, store.folder / "memories"
    before = set(memories.iterdir())

    def meanwhile(*said, **names):
        other.database.forget_memories(identity)
        return add(*said, **names)

    monkeypatch.setattr(store.database, "add", meanwhile)
    store.add("more of it", user_id="anna")  # which was asked for before
    assert store.database.held("anna").file is None
    assert set(memories.iterdir()) == before
    assert other.memory("anna").layout.num_memory_tokens == 3


def test_stores_of_one_pipeline_take_turns(opened, pipeline, tmp_path):
    """Reading changes the model while it lasts: a stream of one store, and an answer of another."""
    store, documents = opened(), DocumentStore(tmp_path / "library", pipeline, ratio=2, part_tokens=16, slots=16)
    store.add(LONG, user_id="anna")
    settings = GREEDY | {"max_new_tokens": 20}
    whole = store.ask("What?", user_id="anna", **settings)
    expected = documents.answer("A mill?", "A mill.", **GREEDY).text
    pieces = []
    for piece in store.ask("What?", user_id="anna", stream=True, **settings):
        pieces.append(piece)
        assert documents.answer("A mill?", "A mill.", **GREEDY).text == expected
    assert "".join(pieces) == whole
    assert store._lock is documents._lock is pipeline.lock


def test_a_name_that_is_none_stands_for_nobody(store):
    store.add("a", user_id="anna", run_id="monday")
    for work in (store.get_all, store.delete):
        for names in ({"user_id": None}, {"user_id": "anna", "run_id": None}, {"user_id": "", "run_id": "monday"}):
            with pytest.raises(ValueError, match=r"(user_id|run_id) is (None; leave it out to mean any|empty)"):
                work(**names)
        with pytest.raises(TypeError, match="agent_id must be a text, got int"):
            work(agent_id=3)
    with pytest.raises(ValueError, match="item_id is None"):
        store.delete(None)
    assert len(store.get_all()) == 1


def test_the_model_that_a_folder_was_made_with(opened, folder, tmp_path):
    import shutil

    store = opened()
    store.add(LONG, user_id="anna")
    expected = bits_of(store.memory("anna"))
    assert bits_of(opened(model=None, config=CONFIG).memory("anna")) == expected
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    other = opened(model=R3MemPipeline(str(again), config=CONFIG))
    other.rebuild()
    assert other.database.setting("model") == str(again)  # as it is now
    shutil.rmtree(again)
    with pytest.raises(OSError, match="again"):
        opened(model=None, config=CONFIG).memory("anna")


@pytest.mark.parametrize("reads", [True, False])
def test_heads_of_a_new_store_share_slots_where_the_model_can_read_such_memories(opened, folder, monkeypatch, reads):
    """What a store was made with stays."""
    monkeypatch.setattr(conversations, "DEFAULT_CONFIG", CONFIG)
    monkeypatch.setattr(MemoryReader, "keeps_latents", lambda reader: not reads)
    store = opened("new", str(folder))
    store.add(LONG, user_id="anna")
    assert store.memory("anna").layout.is_adaptive == reads and bool((store.memory("anna").ages == 0).any()) == reads
    store.close()
    other = dataclasses.replace(CONFIG, memory_allocation="uniform" if reads else "adaptive")
    monkeypatch.setattr(conversations, "DEFAULT_CONFIG", other)
    assert opened("new", None).memory("anna").layout.is_adaptive == reads


def test_settings_that_do_not_go_together(opened, folder, pipeline, tmp_path):
    with pytest.raises(TypeError, match="has its config"):
        opened("never", config=CONFIG)
    with pytest.raises(TypeError, match="R3MemConfig has not: budget"):
        opened("never", str(folder), config={"budget": 9})
    assert not (tmp_path / "never").exists()
    with pytest.raises(ValueError, match="raw_tokens must be 0 or more"):
        opened(raw_tokens=-1)
    tokens = R3MemConfig(num_memory_tokens=2, segment_length=8, core=(1, 3))
    with pytest.raises(ValueError, match=r'R3MemConfig\(memory_writer="matched"'):
        opened("tokens", model=R3MemPipeline(str(folder), config=tokens)).add("x", user_id="anna")
    assert isinstance(opened().answering().pipeline, R3MemPipeline)


@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (lambda s: s.add("", user_id="a"), ValueError, "a message is empty"),
        (lambda s: s.add([], user_id="a"), ValueError, "there is no message"),
        (lambda s: s.add({"role": "system", "content": "x"}, user_id="a"), ValueError, "system=..."),
        (lambda s: s.add({"role": "tool", "content": "x"}, user_id="a"), ValueError, "user or assistant"),
        (lambda s: s.add(5, user_id="a"), TypeError, "got int"),
        (lambda s: s.add("x", user_id=""), ValueError, "user_id is empty"),
        (lambda s: s.add("x", user_id=None), ValueError, "user_id is empty"),
        (lambda s: s.add("x", user_id="a", run_id=7), TypeError, "run_id must be a text"),
        (lambda s: s.add("x", user_id="a", metadata={"a": {1}}), TypeError, "values for JSON"),
        (lambda s: s.add("x", user_id="a", metadata="ab"), TypeError, "metadata must be values by name"),
        (lambda s: s.ask("", user_id="a"), ValueError, "a question is empty"),
        (lambda s: s.ask([], user_id="a"), ValueError, "a question is empty"),
        (lambda s: s.ask(["x", None], user_id="a"), ValueError, "a question is empty"),
        (lambda s: s.ask(["x"], user_id="a", stream=True), ValueError, "one question at a time"),
        (lambda s: s.ask("x", user_id=""), ValueError, "user_id is empty"),
        (lambda s: s.ask("x" * 200, user_id="a"), ValueError, "positions"),
        (lambda s: s.reply({"role": "assistant", "content": "x"}, user_id="a"), ValueError, "must be the user's"),
        (lambda s: s.memory(""), ValueError, "user_id is empty"),
        (lambda s: s.ask("half \ud83d", user_id="a"), ValueError, "a question holds half a character"),
        (lambda s: s.search("half \ud83d", user_id="a"), ValueError, "the query holds half a character"),
        (lambda s: s.add("x", user_id="half \ud83d"), ValueError, "user_id holds half a character"),
        (lambda s: s.rebuild(""), ValueError, "user_id is empty"),
        (lambda s: s.rebuild("nobody"), ValueError, "nothing was said by 'nobody'"),
        (lambda s: s.get(77), KeyError, "there is no item 77"),
        (lambda s: s.delete(77), KeyError, "there is no item 77"),
        (lambda s: s.delete(), ValueError, "say what is to be deleted"),
        (lambda s: s.consolidate(user_id="a"), ValueError, "nothing new to learn"),
    ],
)
def test_what_is_refused(store, work, error, message):
    with pytest.raises(error, match=message):
        work(store)
    assert store.get_all() == [] and store.users() == []


def test_items(store):
    one = store.add("I like tea.", user_id="anna", agent_id="helper", run_id="monday", metadata={"mood": "good"})[0]
    two = store.add("I like coffee.", user_id="boris", agent_id="helper")[0]
    assert store.get(one.id) == one and one.metadata == {"mood": "good"} and one.role == "user"
    assert store.get_all() == [one, two] == store.get_all(agent_id="helper")
    assert store.get_all(user_id="anna") == store.get_all(run_id="monday") == [one]
    assert repr(store).endswith("2 items of 2 users)")
    assert store.delete(one.id, user_id="boris") == 0 and store.delete(agent_id="helper", user_id="boris") == 1
    assert store.delete(user_id="nobody") == 0
    assert store.users() == ["anna"]
    with MemoryStore(store.folder) as other:  # to look things up, no model is loaded
        assert other.get_all() == [one] and other.search("tea", user_id="anna") and other.delete(one.id) == 1
        assert other._answering is None


def test_raw_tokens_alone_change_no_answer_of_a_short_history(opened):
    """A memory appears once a segment is complete behind the raw tokens."""
    store = opened()
    store.add("abc", user_id="anna")
    assert store.memory("anna") is None
    store.add("a" * (16 + RAW_TOKENS), user_id="anna")
    memory = store.memory("anna")
    assert memory is not None and int(memory.tokens_seen) % 16 == 0 and torch.isfinite(memory.states).all()


def test_a_store_keeps_its_system_prompt_and_its_turns(pipeline, opened):
    store = opened(system="Hi.")
    store.add("I am Anna.", user_id="anna")
    opening = store.answering().turns.opening
    again = opened()
    assert again.answering().turns.opening == opening
    with pytest.raises(ValueError, match="differ in: system, turns"):
        opened(system="Ho.").add("x", user_id="anna")


def test_another_dtype_is_other_memories(pipeline, opened, folder):
    opened(model=str(folder), config=CONFIG, dtype="float32").add("I am Anna.", user_id="anna")
    with pytest.raises(ValueError, match=r"differ in: (base, )?dtype"):
        opened(model=str(folder), config=CONFIG, dtype="bfloat16").add("x", user_id="anna")


def test_a_folder_of_a_model_is_found_from_elsewhere(opened, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    opened(model=folder.name, config=CONFIG).add("I am Anna.", user_id="anna")
    monkeypatch.chdir(tmp_path)
    assert opened(model=None).ask("Who?", user_id="anna", **GREEDY) is not None


def test_an_adapter_is_no_model_of_a_store(opened, tmp_path, pipeline):
    pipeline.save(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is an adapter, and not one of anchors"):
        opened(model=tmp_path / "adapter").add("x", user_id="anna")


def test_what_a_reader_keeps_is_told_of(store, tmp_path):
    store.add("I am Anna.", user_id="anna")
    reader = sqlite3.connect(tmp_path / "store" / "store.sqlite", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM items").fetchone()
    store.database._connection.execute("PRAGMA busy_timeout = 100")
    with pytest.warns(UserWarning, match="what was deleted is still in SQLite's log"):
        store.delete(user_id="anna")
    reader.execute("COMMIT")
    reader.close()


def test_several_items_go_together_or_not_at_all(opened):
    store = opened()
    numbers = [store.add(text, user_id="anna")[0].id for text in ("One.", "Two.", "Three.")]
    with pytest.raises(KeyError, match="there is no item 77"):
        store.delete([numbers[0], 77])
    assert len(store.get_all()) == 3
    assert store.delete(numbers[1:]) == 2 and [item.text for item in store.get_all()] == ["One."]
    for number in (10**30, -1, 0, "1", b"\x01", 1.0, True, {1}, [[1]]):
        with pytest.raises(KeyError, match="there is no item"):
            store.delete(number)
    for number in (None, "1", [1]):
        with pytest.raises(KeyError, match="there is no item"):
            store.get(number)
    assert [item.text for item in store.get_all()] == ["One."]


def test_nothing_is_streamed_where_this_thread_holds_the_model(opened, pipeline):
    """The thread that writes would wait for ever."""
    store = opened()
    with pipeline.lock:
        with pytest.raises(RuntimeError, match="ask without stream"):
            list(store.ask("Who?", user_id="anna", stream=True, **GREEDY))
        store.ask("Who?", user_id="anna", **GREEDY)


def test_newest_tokens_that_leave_no_room_are_named(opened):
    """Nothing that is said or asked could be made short enough then."""
    store = opened("much", raw_tokens=64)
    for _ in range(12):
        store.add("A ship.", user_id="anna")
    assert store.memory("anna") is not None
    with pytest.raises(ValueError, match=r"newest, are read as they are, and .* 0 beside .* fewer raw_tokens"):
        store.ask("h", user_id="anna", passages=0, max_new_tokens=90)
    with pytest.raises(ValueError, match="rebuild the store with fewer raw_tokens"):
        store.ask("h", user_id="anna", passages=0, max_new_tokens=1)
    store.close()
    fewer = opened("much", raw_tokens=16)
    fewer.rebuild()
    fewer.ask("h", user_id="anna", passages=0, max_new_tokens=1)
