"""`Database`: what was said is there or it is not, for several processes, and what is wrong with a file is said."""

import contextlib
import json
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3mem_fast.store import database as module
from r3mem_fast.store.database import FORMAT, Database
from r3mem_fast.store.items import Held, check_names, condition

NAMED = {"user": "anna", "agent": None, "run": None, "metadata": None}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store" / "store.sqlite"


@pytest.fixture
def database(path):
    found = Database(path)
    yield found
    found.close()


def test_items_are_as_they_were_added(database, path):
    said = [("user", 'It\'s "quoted"; DROP TABLE items --'), ("assistant", "zwei\nZeilen\0 \u00e4\U0001f600")]
    added = database.add(said, user="anna", agent="a", run="r", metadata={"b": [1, None], "a": {"c": "\u00e4"}})
    assert [(item.role, item.text) for item in added] == said
    other = Database(path)
    assert other.items() == database.items() == added
    assert other.items("id > ?", (added[0].id,)) == added[1:]
    assert other.items(more="ORDER BY id DESC LIMIT 1") == added[1:]
    assert other.items(*condition(user_id="anna", agent_id="a", run_id="r")) == added
    assert other.items(*condition(agent_id="b")) == []
    other.close()


@settings(max_examples=30)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=4))
def test_any_text(tmp_path_factory, texts):
    database = Database(tmp_path_factory.mktemp("any") / "s")
    database.add([("user", text) for text in texts], **NAMED)
    assert [item.text for item in database.items()] == texts
    database.rows("INSERT INTO words (words, rank) VALUES ('integrity-check', 1)")
    database.delete("1", ())
    assert database.items() == [] and database.held("anna") == Held()
    database.close()


def test_numbers_are_never_given_twice(database):
    first = database.add([("user", "x")] * 3, **NAMED)
    database.delete("user = ?", ("anna",))
    assert database.add([("user", "x")], **NAMED)[0].id > first[-1].id


@pytest.mark.parametrize(
    ("metadata", "message"),
    [({"a": {1, 2}}, "values for JSON.*set"), ([1], "by name, got list"), ("ab", "by name, got str")],
)
def test_metadata_that_are_none(database, metadata, message):
    with pytest.raises(TypeError, match=message):
        database.add([("user", "x")], **(NAMED | {"metadata": metadata}))
    circular = {}
    circular["a"] = circular
    with pytest.raises(TypeError, match="values for JSON"):
        database.add([("user", "x")], **(NAMED | {"metadata": circular}))
    assert database.items() == []


def test_all_or_none(database):
    with pytest.raises(sqlite3.IntegrityError):
        database.add([("user", "x"), ("user", None)], **NAMED)
    assert database.items() == [] and database.held("anna") == Held()
    with pytest.raises(KeyError), database.changing() as connection:
        connection.execute("INSERT INTO settings VALUES ('a', 'b')")
        raise KeyError
    assert database.setting("a") is None


def test_what_is_held(database):
    items = database.add([("user", "x")] * 4, **NAMED)
    start = database.held("anna")
    assert start == Held(revision=start.revision) and start.revision
    one = replace(start, file="one", item=items[1].id, tokens=3, adapter="a", learned=items[2].id)
    assert database.advance("anna", start, one)
    assert database.held("anna") == replace(one, adapter=None, learned=0)
    # An adapter does not ask what became of the memory while it learned, nor the memory of the adapter.
    assert database.put_adapters("anna", start, "a", items[2].id) and database.held("anna") == one
    assert not database.put_adapters("anna", start, "b", items[2].id)  # another was faster
    assert not database.advance("anna", start, replace(one, file="two"))  # another was faster
    database.add([("user", "y")], **NAMED)
    assert database.held("anna") == one
    database.delete("id = ?", (items[3].id,))  # behind both
    kept = database.held("anna")
    assert kept == replace(one, revision=kept.revision) and kept.revision != one.revision
    assert not database.advance("anna", one, replace(one, file="two"))
    assert not database.put_adapters("anna", one, "b", items[1].id)  # something was deleted meanwhile
    database.delete("id = ?", (items[2].id,))  # that the adapter has learned
    kept = database.held("anna")
    assert kept == replace(one, revision=kept.revision, adapter=None, learned=0)
    database.delete("id = ?", (items[1].id,))  # that the memory ends in
    kept = database.held("anna")
    assert kept == Held(revision=kept.revision)
    database.delete("user = ?", ("anna",))
    assert database.held("anna") == Held()
    assert not database.advance("anna", kept, replace(kept, file="two"))
    database.add([("user", "again")], **NAMED)
    assert database.held("anna").revision not in (0, kept.revision)


def test_memories_are_forgotten(database):
    for user in "ab":
        database.add([("user", "x")], **(NAMED | {"user": user}))
        held = database.held(user)
        assert database.advance(user, held, replace(held, file=user, item=1))
        assert database.put_adapters(user, held, user, 1)
    before = [database.held(user) for user in "ab"]
    database.forget_memories({"made_with": "x"}, "a")
    held = database.held("a")
    assert held == Held(revision=held.revision) and held.revision != before[0].revision
    assert database.held("b") == before[1] and database.setting("made_with") == "x"
    database.forget_memories({"made_with": "y"})
    assert database.held("b").file is None and database.setting("made_with") == "y"


def test_the_settings_of_a_new_store_are_one_process_s(database, path):
    other = Database(path)
    database.put_settings({"made_with": "a", "model": "a"})
    other.put_settings({"made_with": "b", "model": "b"})
    assert other.setting("made_with") == database.setting("model") == "a"
    other.close()


WRITER = """
import sys
from pathlib import Path
from r3mem_fast.store.database import Database
name, path = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
for index in range(20):
    database = Database(Path(path) / str(index) / "store.sqlite")
    database.add([("user", name)], user="anna", agent=None, run=None, metadata=None)
    database.close()
database = Database(Path(path) / "store.sqlite")
for index in range(25):
    database.add([("user", f"{name} {index}"), ("assistant", f"{name} {index}")], user="anna", agent=name, run=None,
                 metadata=None)
    if index % 5 == 4:
        database.delete("text = ? AND role = ?", (f"{name} {index - 1}", "user"))
"""


def test_several_processes_at_once(path):
    """On new folders, which each of them may be the one to make: nothing is lost, and order is kept."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, name, str(path.parent)], **pipes) for name in "abc"
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=120)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    for index in range(20):
        database = Database(path.parent / str(index) / "store.sqlite")
        assert sorted(item.text for item in database.items()) == ["a", "b", "c"]
        database.close()
    database = Database(path)
    deleted = {index for index in range(25) if index % 5 == 3}
    for name in "abc":
        said = [(item.role, item.text) for item in database.items("agent = ?", (name,))]
        assert said == [
            (role, f"{name} {index}")
            for index in range(25)
            for role in (("assistant",) if index in deleted else ("user", "assistant"))
        ]
    assert database.rows("PRAGMA integrity_check") == [("ok",)]
    database.close()


def test_a_file_that_another_process_is_making(path):
    """It is waited for, also where SQLite itself does not wait."""
    path.parent.mkdir()
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.2, lambda: other.execute("ROLLBACK"))
    timer.start()
    Database(path).close()
    timer.join()
    other.close()


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"cannot make the folder .*choose another place"):
        Database(tmp_path / "file" / "store.sqlite")
    (tmp_path / "s.sqlite").mkdir()
    with pytest.raises(OSError, match=r"cannot open, read or write .*s\.sqlite"):
        Database(tmp_path / "s.sqlite")


def test_files_that_are_none_of_a_store(path):
    path.parent.mkdir()
    path.write_bytes(b"no database at all, but some text " * 40)
    with pytest.raises(ValueError, match="is no store of r3mem_fast, or is damaged: file is not a database"):
        Database(path)
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE others (x)")
    connection.close()
    with pytest.raises(ValueError, match=f"has format 0, and this version of r3mem_fast reads format {FORMAT}"):
        Database(path)
    path.unlink()
    database = Database(path)
    database.rows(f"PRAGMA user_version = {FORMAT + 1}")
    database.close()
    with pytest.raises(ValueError, match="install the version that wrote it"):
        Database(path)


def test_a_file_that_is_damaged_where_it_is_read_later(path):
    database = Database(path)
    database.add([("user", f"text {index} " * 50) for index in range(100)], **NAMED)
    database.close()
    content = bytearray(path.read_bytes())
    for place in range(8192, len(content)):
        content[place] = 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.*backup"):
        Database(path).items()


def test_names():
    check_names(user_id="a", agent_id=None, run_id="b")
    for names, error in (
        ({"user_id": ""}, ValueError), ({"user_id": None}, ValueError), ({"user_id": 5}, TypeError),
        ({"user_id": "a", "run_id": ""}, ValueError), ({"user_id": "a", "agent_id": b"x"}, TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match=r"_id (is empty|must be a text)"):
            check_names(**names)


def test_items_are_plain_values(database):
    item = database.add([("user", "x")], **(NAMED | {"metadata": {"a": 1}}))[0]
    assert json.loads(json.dumps(vars(item)))["metadata"] == {"a": 1}


def test_who_reads_is_not_waited_for(database, path, monkeypatch):
    """A backup, or a browser of databases, may read for hours: what was deleted is overwritten another time."""
    monkeypatch.setattr(module, "_SECONDS_TO_OVERWRITE", 0.01)
    monkeypatch.setattr(module, "_SECONDS_TO_WAIT", 1e6)
    database.add([("user", "a secret")], user="anna", agent=None, run=None, metadata=None)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM items").fetchall()
        with pytest.warns(UserWarning, match="somebody is reading"):
            database.delete("user = ?", ("anna",))
        module.Database(path).close()
        assert b"a secret" in path.read_bytes() + path.with_name(f"{path.name}-wal").read_bytes()
    module.Database(path).close()
    assert b"a secret" not in path.read_bytes()


def test_a_file_that_nothing_was_made_in_yet(path):
    path.parent.mkdir()
    path.touch()
    with pytest.raises(FileNotFoundError, match=r"there is no store in .* yet"):
        Database(path, read_only=True)
    Database(path).close()
    Database(path, read_only=True).close()
