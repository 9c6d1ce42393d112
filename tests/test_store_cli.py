"""`r3mem store`, as a user meets it, on a tiny model in a folder."""

import io
import json
import shutil
import subprocess
import sys

import pytest

from r3mem_fast import MemoryStore, R3MemPipeline
from r3mem_fast.cli import main
from r3mem_fast.cli import store as cli_store
from r3mem_fast.store.texts import store_folder

# Sizes that the 128 positions of the tiny model have room for.
SIZES = ["--memory-tokens", "2", "--memory-budget", "8", "--segment-length", "16", "--segment-overlap", "2"]
SIZES += ["--raw-tokens", "16"]
DEVICE = ["--device", "cpu"]


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """A store with two users, made by the command."""
    place = tmp_path_factory.mktemp("store")
    of = ["--store", str(place), *DEVICE]
    new = ["--model", str(folder), *SIZES]
    assert main(["store", "add", "--user", "anna", "Ida is allergic to peanuts.", "We live in Graz.", *new, *of]) == 0
    assert main(["store", "add", "I live in Oslo.", "--user", "bob", "--run", "trip", "--agent", "guide", *of]) == 0
    return place


@pytest.fixture
def store(made, tmp_path, monkeypatch):
    """A copy of it, in a folder that the environment names."""
    shutil.copytree(made, tmp_path / "store")
    monkeypatch.setenv("R3MEM_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_messages_come_from_files_and_from_standard_input(store, tmp_path, capsys, monkeypatch):
    """Behind texts that are given, with what is kept beside them; a folder is opened with the sizes that it has."""
    said = [{"role": "user", "content": "Who is ill?"}, {"role": "assistant", "content": "Ida."}]
    (tmp_path / "said.json").write_text(json.dumps(said))
    more = ["--user", "anna", "--metadata", '{"from": "test"}', "--json", *DEVICE]
    assert main(["store", "add", "Hello.", "--messages", str(tmp_path / "said.json"), "--run", "r", *more]) == 0
    added = lines(capsys)
    assert [(item["role"], item["text"]) for item in added] == [
        ("user", "Hello."), ("user", "Who is ill?"), ("assistant", "Ida."),
    ]  # fmt: skip
    assert {(item["run_id"], item["metadata"]["from"]) for item in added} == {("r", "test")}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(said[0])))
    assert main(["store", "add", "--messages", "-", *more]) == 0
    assert [item["text"] for item in lines(capsys)] == ["Who is ill?"]
    assert main(["store", "add", "Hm.", "--user", "anna", *DEVICE]) == 0
    assert capsys.readouterr().out == "added 1 item to the conversation of anna\n"
    with MemoryStore(store) as opened:
        memory = opened.memory("anna")
        assert memory.layout.segment_length == 16 and int(memory.tokens_seen[0]) >= 32


def test_questions_are_answered_and_nothing_is_added(store, capsys, monkeypatch):
    ask = ["store", "ask", "--user", "anna", "--max-new-tokens", "4", *DEVICE]
    assert main([*ask, "Who?", "What?", "--json"]) == 0
    answers = lines(capsys)
    assert [answer["question"] for answer in answers] == ["Who?", "What?"]
    with MemoryStore(store) as opened:
        expected = opened.ask(["Who?", "What?"], user_id="anna", max_new_tokens=4, do_sample=False)
        assert [answer["answer"] for answer in answers] == expected
        assert len(opened.get_all(user_id="anna")) == 2
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)  # streamed, the same
    assert main([*ask, "Who?"]) == 0
    assert capsys.readouterr().out.strip() == expected[0]


def test_looking_up_and_listing_load_neither_torch_nor_a_model(store):
    code = (
        "import sys\nfrom r3mem_fast.cli import main\n"
        "assert main(['store', 'search', 'peanut', '--user', 'anna', '--json']) == 0\n"
        "assert main(['store', 'list', '--user', 'bob']) == 0\n"
        "assert main(['store', 'search', 'peanut', '--user', 'bob']) == 1\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'slow'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, listed = done.stdout.splitlines()
    found = json.loads(found)
    assert (found["text"], found["by"], found["id"]) == ("Ida is allergic to peanuts.", "bm25", 1)
    assert listed.endswith("bob run=trip agent=guide  user: I live in Oslo.")
    assert "nothing that bob has said was found for 'peanut'" in done.stderr


def test_what_is_deleted_is_asked_for_on_a_terminal(store, capsys, monkeypatch):
    delete = ["store", "delete", "--user", "anna"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\nyes\n"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert main(delete) == 1
    said = capsys.readouterr().out
    assert "peanuts" in said and "Delete 2 items, for good? [y/N]" in said and "nothing was deleted" in said
    assert main(delete) == 0
    assert capsys.readouterr().out.endswith("deleted 2 items\n")
    assert main(["store", "delete", "--run", "trip", "--yes"]) == 0
    assert main(["store", "list"]) == 0
    assert capsys.readouterr().out == "deleted 1 item\n"
    assert main(delete) == 1
    assert "there is nothing of that kind" in capsys.readouterr().err


def test_one_item_is_deleted_without_a_question_in_a_script(store, capsys):
    assert main(["store", "delete", "--item", "2"]) == 0
    assert main(["store", "list", "--json"]) == 0
    deleted, *left = capsys.readouterr().out.splitlines()
    assert deleted == "deleted 1 item" and [json.loads(line)["id"] for line in left] == [1, 3]


def test_rebuilding_takes_other_sizes_and_keeps_them(store, capsys):
    other = ["--memory-tokens", "4", "--memory-budget", "8", "--segment-length", "16", "--segment-overlap", "2"]
    assert main(["store", "add", "Who?", "--user", "anna", *other, *DEVICE]) == 2
    assert "(they differ in: layout)" in capsys.readouterr().err
    assert main(["store", "rebuild", *other, *DEVICE]) == 0
    assert capsys.readouterr().out == "memories made anew: anna, bob\n"
    assert main(["store", "ask", "Who?", "--user", "anna", "--max-new-tokens", "4", *DEVICE]) == 0
    with MemoryStore(store) as opened:
        layout = opened.memory("anna").layout
        assert (layout.num_memory_tokens, layout.segment_length) == (4, 16)
    assert main(["store", "rebuild", "--memory-budget", "12", *DEVICE]) == 0  # in place of one, the others stay
    with MemoryStore(store) as opened:
        layout = opened.memory("anna").layout
        assert (layout.num_memory_tokens, layout.budget, layout.segment_length) == (4, 12, 16)
    with pytest.raises(TypeError, match="config has settings that R3MemConfig has not: budget"):
        MemoryStore(store, config={"budget": 3})


def test_consolidating_hands_the_settings_on(store, capsys, monkeypatch):
    """What is learned, tests of the store say; a tiny model learns nothing in a step."""
    seen = {}

    def remember(self, texts, *, settings, **others):
        seen.update(texts=texts, settings=settings)
        raise ValueError("that far")

    monkeypatch.setattr(R3MemPipeline, "remember", remember)
    assert main(["store", "consolidate", "--user", "anna", "--max-steps", "3", *DEVICE]) == 2
    assert "that far" in capsys.readouterr().err
    assert seen["settings"].max_steps == 3 and "peanuts" in "".join(seen["texts"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "--user", "anna"], "nothing to add: give texts, or --messages FILE"),
        (["add", "--user", "anna", "--messages", "no-such-file.json"], "No such file"),
        (["add", "--user", "anna", "--messages", "{torn}"], "is no JSON of messages"),
        (["add", "--user", "anna", "--messages", "{robot}"], "said by user or assistant, got role='robot'"),
        (["add", "--user", "anna", "x", "--memory-budget", "0"], "memory_budget must be"),
        (["search", " ", "--user", "anna"], "the query is empty"),
        (["search", "x", "--user", "anna", "--store", "no-such-store"], "there is no store in no-such-store"),
        (["ask", "x", "--user", "anna", "--store", "no-such-store"], "there is no store in no-such-store"),
        (["list", "--store", "no-such-store"], "there is no store in no-such-store"),
        (["delete"], "say what is to be deleted"),
        (["rebuild", "--store", "no-such-store"], "there is no store in no-such-store"),
        (["rebuild", "--user", "anan"], "nothing was said by 'anan'"),
        (["add", "--user", "anna", "--messages", "{latin}"], "is no JSON of messages in UTF-8"),
        (["delete", "--item", str(10**30), "--yes"], "there is nothing of that kind"),
    ],
)
def test_bad_input_is_one_clear_line(store, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torn").write_text('[{"role"')
    (tmp_path / "robot").write_text('{"role": "robot", "content": "beep"}')
    (tmp_path / "latin").write_bytes('{"content": "é"}'.encode("latin-1"))
    names = {name: tmp_path / name for name in ("torn", "robot", "latin")}
    status = main(["store", *(argument.format(**names) for argument in arguments)])
    assert status == (1 if "--item" in arguments else 2)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("r3mem ")]
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "no-such-store").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--temperature", "-1"], ["--temperature", "nan"], ["--top-p", "2"], ["--top-p", "0"], ["--passages", "-1"]],
)
def test_options_out_of_range_are_refused_before_anything_is_loaded(store, capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        main(["store", "ask", "Who?", "--user", "anna", *arguments])
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_a_temperature_of_0_is_greedy(store, capsys):
    ask = ["store", "ask", "Who?", "--user", "anna", "--max-new-tokens", "4", *DEVICE]
    assert main(ask) == 0
    greedy = capsys.readouterr().out
    assert main([*ask, "--temperature", "0", "--top-p", "0.5"]) == 0 and capsys.readouterr().out == greedy


def test_who_reads_the_output_may_stop(store):
    """As `head` does; also where a file begins as some editors on Windows begin it."""
    said = [{"role": "user", "content": "A long line. " * 50}] * 200
    (store / "said.json").write_text("\ufeff" + json.dumps(said), encoding="utf-8")
    run = [sys.executable, "-m", "r3mem_fast", "store"]
    with MemoryStore(store) as opened:
        opened.database.add([("user", one["content"]) for one in said], user="b", agent=None, run=None, metadata=None)
    process = subprocess.Popen([*run, "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
    assert len(cli_store._messages(str(store / "said.json"))) == 200


def test_where_a_store_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("R3MEM_STORE", raising=False)
    assert store_folder() == tmp_path / ".local/share/r3mem/store"
    monkeypatch.setenv("R3MEM_STORE", "~/mine")
    assert store_folder() == tmp_path / "mine" and store_folder("other").name == "other"
