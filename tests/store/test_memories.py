"""`Histories`: a memory that was streamed is, bit for bit, the one that is made of the same texts at one time."""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r3mem_fast.store import memories
from r3mem_fast.store.database import Database
from r3mem_fast.store.memories import Histories
from r3mem_fast.store.turns import TurnCodec
from tests.store.conftest import bits_of

TEXTS = st.text("abcd efgh", min_size=1, max_size=40).filter(str.strip)
SAID = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), TEXTS), max_size=8)
FIXED = [
    ("user", "abc"), ("assistant", "defgh abc"), ("assistant", "a" * 19), ("user", "bcd"), ("assistant", "efgh" * 4),
]  # fmt: skip


def add_all(store, said, **names):
    return [store.add({"role": role, "content": text}, user_id="anna", **names)[0] for role, text in said]


def files(store):
    return sorted(path.name for path in (store.folder / "memories").glob("*") if path.name != ".r3mem.lock")


class Tokens:
    """Stands for a memory, and holds the tokens that were compressed."""

    def __init__(self, ids, pinned):
        self.ids, self.pinned = ids, pinned

    def save(self, path):
        path.write_text(json.dumps([self.ids, self.pinned]))

    @staticmethod
    def load(path, model, device):
        return Tokens(*json.loads(path.read_text()))


class Compressor:
    """Stands for a model with segments of some length; takes whole segments alone."""

    device = "cpu"

    def __init__(self, segment_length):
        self.layout = SimpleNamespace(segment_length=segment_length, most_pinned=99, waits=False)

    def empty_memory(self, *, pinned):
        return Tokens([], pinned)

    def compress(self, ids, *, memory):
        (row,) = ids.tolist()
        assert row and len(row) % self.layout.segment_length == 0
        return Tokens(memory.ids + row, memory.pinned)


@given(st.data(), st.integers(6, 20), st.integers(0, 20))
def test_a_history_is_that_of_somebody_who_said_nothing_else(pipeline, data, length, raw):
    """Whatever was added and deleted, and in whatever order: all tokens, and as many compressed as at one time."""
    turns, model = TurnCodec(pipeline.codec), Compressor(length)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(memories, "Memory", Tokens)
        patch.setattr(memories, "with_layout", lambda memory, layout: memory)
        database = Database(Path(folder) / "store.sqlite")
        database.rows("PRAGMA synchronous = OFF")
        histories = Histories(model, model.layout, turns, database, Path(folder) / "memories", raw)
        left = []
        for said in data.draw(st.lists(SAID, min_size=1, max_size=4)):
            for message in said:
                left += database.add([message], user="anna", agent=None, run=None, metadata=None)
                database.add([("user", "another's")], user="boris", agent=None, run=None, metadata=None)
                if data.draw(st.booleans()):
                    histories.history("anna")
            gone = data.draw(st.lists(st.sampled_from(left), unique_by=lambda item: item.id)) if left else []
            for item in gone:
                database.delete("id = ?", [item.id])
                left.remove(item)
            memory, tail, last_role, last = histories.history("anna")
            ids = turns.opening + turns.ids([(item.role, item.text) for item in left])
            segments = max(0, (len(ids) - raw) // length)
            compressed = [] if memory is None else memory.ids
            assert compressed + tail == ids and len(compressed) == segments * length
            assert memory is None or memory.pinned == len(turns.opening)
            said = [(item.role, item.text) for item in left]
            ends = [len(turns.opening + turns.ids(said[: place + 1])) for place in range(len(said))]
            begun = [item.id for item, end in zip(left, ends, strict=True) if end >= len(compressed)]
            assert last == (begun[0] if compressed else 0)
            assert last_role == (left[-1].role if left else None)
            histories.sweep()
            assert len(list((Path(folder) / "memories").glob("*.safetensors"))) == (segments > 0)
        database.close()


def test_streamed_is_rebuilt(opened):
    """Added one by one, all at once by another store, and made anew, with a model: the same bits."""
    store, other = opened("a"), opened("b")
    add_all(store, FIXED)
    other.add([{"role": role, "content": text} for role, text in FIXED], user_id="anna")
    streamed = bits_of(store.memory("anna"))
    assert streamed is not None and bits_of(other.memory("anna")) == streamed
    other.rebuild()
    assert bits_of(other.memory("anna")) == streamed
    assert bits_of(opened("b").memory("anna")) == streamed
    assert len(files(store)) == len(files(other)) == 1


@pytest.mark.parametrize("gone", [[0], [2], [4], [3, 4]])
def test_after_deletions_it_is_that_of_somebody_who_never_said_it(opened, gone):
    store, other = opened("a"), opened("b")
    items = add_all(store, FIXED)
    before = bits_of(store.memory("anna"))
    for index in gone:
        assert store.delete(items[index].id) == 1
    add_all(other, [said for index, said in enumerate(FIXED) if index not in gone])
    first, second = (one.answering().histories.history("anna") for one in (store, other))
    assert bits_of(first.memory) == bits_of(second.memory) != before and first[1:3] == second[1:3]


def test_runs_and_users(opened):
    store, other = opened("a"), opened("b")
    for index in range(4):
        text = f"number {index} of many"
        store.add(text, user_id="anna", run_id="odd" if index % 2 else "even")
        store.add(text, user_id="boris", run_id="odd")
        if index % 2 == 0:
            other.add(text, user_id="anna", run_id="even")
    assert store.delete(run_id="odd", user_id="anna") == 2
    assert bits_of(store.memory("anna")) == bits_of(other.memory("anna"))
    assert store.delete(user_id="boris") == 4
    assert store.users() == ["anna"] and store.memory("boris") is None
    assert len(files(store)) == 1  # boris' is gone, and anna's is made again


WORD = "Quzzyvex"


@pytest.mark.parametrize("what", ["item in the memory", "item in the tail", "run", "user"])
@pytest.mark.parametrize("is_open", [False, True])
def test_nothing_of_a_deleted_text_is_in_any_file(opened, what, is_open):
    """Neither in the database with its index and its log, nor in what was made of it, while another has it open."""
    embedder = lambda texts: torch.tensor([[float(len(text)), 1.0] for text in texts])  # noqa: E731
    store = opened(embedder=embedder)
    reader = Database(store.folder / "store.sqlite") if is_open else None
    secret = f"tell nobody of {WORD}"
    if what == "item in the tail":
        store.add("something said before it, long enough to be compressed", user_id="anna")
    item = store.add(secret, user_id="anna", run_id=f"{WORD}'s", metadata={"about": WORD})[0]
    if what == "item in the memory":
        store.add("something said afterwards, long enough to be compressed", user_id="anna")
    store.add("of another one, long enough to be compressed", user_id=WORD if what == "user" else "boris")
    store.add("and more of it", user_id=WORD if what == "user" else "boris")
    store.search("nobody", user_id="anna", by="embedding")
    before = files(store)
    assert any(WORD.lower().encode() in content.lower() for content in contents(store))
    assert reader is None or len(reader.items()) >= 3
    if what == "user":
        assert store.delete(user_id=WORD) == 2 and store.delete(user_id="anna") == 1
    elif what == "run":
        assert store.delete(run_id=f"{WORD}'s") == 1
    else:
        assert store.delete(item.id) == 1
    for content in contents(store):
        for piece in (WORD, WORD.lower(), WORD[1:], WORD[2:].lower()):
            assert piece.encode() not in content
    known = {name for (name,) in store.database.rows("SELECT file FROM users WHERE file IS NOT NULL")}
    assert set(files(store)) == known
    assert (set(before) - known) or what == "item in the tail"
    if reader is not None:
        reader.close()


def contents(store):
    return [path.read_bytes() for path in store.folder.rglob("*") if path.is_file()]


def test_files_are_replaced(store):
    seen = set()
    for index in range(12):
        store.add(f"sentence number {index}", user_id="anna")
        assert len(files(store)) <= 1
        seen |= set(files(store))
    assert len(seen) > 5


def test_what_was_deleted_while_it_was_compressed_is_not_kept(opened, monkeypatch):
    """In another process: the memory that is made of it is no longer wanted, and its file is gone."""
    store, other = opened(), opened()
    item = store.add("short", user_id="anna")[0]
    model = store.answering().pipeline.model
    compress = type(model).compress

    def delete_meanwhile(self, *arguments, **settings):
        monkeypatch.undo()
        other.delete(item.id)
        return compress(self, *arguments, **settings)

    monkeypatch.setattr(type(model), "compress", delete_meanwhile)
    store.add("and what is said afterwards fills segments", user_id="anna")
    assert files(store) == [] and store.database.held("anna").file is None
    alone = opened("alone")
    alone.add("and what is said afterwards fills segments", user_id="anna")
    assert bits_of(store.memory("anna")) == bits_of(alone.memory("anna"))


def test_what_was_deleted_while_a_history_was_read(opened, monkeypatch):
    """Between the memory and the items: they are of one moment."""
    store, other = opened(), opened()
    items = [store.add(f"sentence number {index}", user_id="anna")[0] for index in range(5)]
    histories = store.answering().histories
    role_before = histories._role_before

    def delete_meanwhile(user, item):
        monkeypatch.undo()
        other.delete(items[0].id)
        return role_before(user, item)

    monkeypatch.setattr(histories, "_role_before", delete_meanwhile)
    found = histories.history("anna")
    alone = opened("alone")
    for item in items[1:]:
        alone.add(item.text, user_id="anna")
    expected = alone.answering().histories.history("anna")
    assert bits_of(found.memory) == bits_of(expected.memory) and found.tail == expected.tail


def test_a_file_is_replaced_while_it_is_read(opened):
    store, other = opened(), opened()
    for index in range(8):
        writer, reader = (store, other) if index % 2 else (other, store)
        writer.add(f"sentence number {index}", user_id="anna")
        assert bits_of(reader.memory("anna")) == bits_of(writer.memory("anna"))
    alone = opened("alone")
    for item in store.get_all():
        alone.add(item.text, user_id="anna")
    assert bits_of(other.memory("anna")) == bits_of(alone.memory("anna"))


def test_lost_and_damaged_files(opened):
    store = opened()
    store.add("something that is long enough to be compressed", user_id="anna")
    expected, (name,) = bits_of(store.memory("anna")), files(store)
    path = store.folder / "memories" / name
    content = path.read_bytes()
    path.unlink()
    assert bits_of(opened().memory("anna")) == expected  # read again from the text
    (name,) = files(store)
    path = store.folder / "memories" / name
    for damaged in (b"", content[:-1], content[:-9] + b"x" + content[-8:]):
        path.write_bytes(damaged)
        fresh = opened()
        with pytest.raises(ValueError, match=r"damaged.*rebuild\(\)"):
            fresh.ask("What?", user_id="anna")
        assert fresh.search("something", user_id="anna")
    fresh.rebuild("anna")
    assert bits_of(opened().memory("anna")) == expected and len(files(store)) == 1


def test_what_killed_writers_leave_is_removed(opened):
    store = opened()
    store.add("something that is long enough to be compressed", user_id="anna")
    kept = files(store)
    for name in ("0-1.safetensors", ".0-2.safetensors.12-13.tmp"):
        (store.folder / "memories" / name).write_bytes(b"x")
    fresh = opened()
    assert fresh.memory("anna") is not None and files(store) == kept


def test_an_opening_must_fit_into_a_segment(opened, pipeline):
    tokenizer = pipeline.tokenizer
    try:
        tokenizer.chat_template = "a system prompt of many words {% for m in messages %}U{{ m.content }}{% endfor %}A"
        with pytest.raises(ValueError, match="use a longer segment_length"):
            opened().add("something", user_id="anna")
    finally:
        tokenizer.chat_template = None


def test_memories_stay_in_the_cache_that_were_used_last(opened, monkeypatch):
    monkeypatch.setattr(memories, "_CACHED", 2)
    store = opened()
    for user in "abc":
        store.add("something that is long enough to be compressed", user_id=user)
    for user in "abca":
        store.memory(user)
        assert len(store.answering().histories._cache) <= 2
    assert list(store.answering().histories._cache)[-1] == store.database.held("a").file
