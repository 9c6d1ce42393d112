"""`r3mem chat` with lines from a pipe, on a tiny model in a folder; and on a terminal of its own."""

import io
import os
import pty
import re
import select
import signal
import sys
import time

import pytest

from r3mem_fast import MemoryStore
from r3mem_fast.cli import main
from tests.test_store_cli import DEVICE, SIZES


@pytest.fixture
def chat(folder, tmp_path, monkeypatch, capsys):
    """Type lines; returns what was printed, a line each."""

    def typed(*lines, more=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        new = ["--store", str(tmp_path / "store"), "--model", str(folder), *SIZES, *DEVICE]
        assert main(["chat", "anna", *new, "--max-new-tokens", "4", *more]) == 0
        return capsys.readouterr().out.splitlines()

    return typed


def items(tmp_path):
    with MemoryStore(tmp_path / "store") as store:
        return store.get_all(user_id="anna")


def test_each_exchange_is_answered_behind_those_before_it_and_added(chat, tmp_path):
    printed = chat("Ida is allergic to peanuts.", "Who is?", "/quit", "never read")
    said = items(tmp_path)
    assert [item.role for item in said] == ["user", "assistant"] * 2
    assert [item.text for item in said] == ["Ida is allergic to peanuts.", printed[0], "Who is?", printed[1]]
    assert len({item.run_id for item in said}) == 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", said[0].run_id)
    assert chat("", "  ") == []
    assert len(items(tmp_path)) == 4
    with MemoryStore(tmp_path / "store") as store:
        for item in said[2:]:
            store.delete(item.id)
        assert store.reply("Who is?", user_id="anna", max_new_tokens=4, do_sample=False) == printed[1]


def test_what_is_remembered_is_shown_and_found(chat):
    printed = chat(
        "/memories", "Ida is allergic to peanuts.", "Who is?", "/memories", "/search peanuts", "/search Oslo"
    )
    assert printed[0] == "nothing is remembered"
    count, compressed, raw, found, nothing = printed[-5:]
    assert count == "4 items" and found == "user: Ida is allergic to peanuts." and nothing == "nothing was found"
    tokens, slots, size = map(int, re.fullmatch(r"(\d+) \D+ (\d+) slots a head, (\d+) bytes", compressed).groups())
    assert tokens >= 32 and 8 <= slots < tokens and size > 0
    assert re.fullmatch(r"\d+ tokens, the newest, are read as they are", raw)


def test_what_is_forgotten_is_gone(chat, tmp_path):
    printed = chat("One.", "Two.", "Three.", "/forget", "/forget 1", "/forget all", "n")
    assert printed[3:] == [
        "2 items were forgotten; 4 are left",
        "2 items were forgotten; 2 are left",
        "Forget all 2 items of anna, for good? [y/N] nothing was forgotten",
    ]
    assert [item.text for item in items(tmp_path)] == ["One.", printed[0]]
    assert chat("/forget all", "y", "/forget", "/memories") == [
        "Forget all 2 items of anna, for good? [y/N] 2 items were forgotten; 0 are left",
        "nothing is remembered",
        "nothing is remembered",
    ]
    assert items(tmp_path) == []
    chat("One.", "Two.", "/forget 9")
    assert items(tmp_path) == []


def test_what_cannot_be_done_is_said_and_the_conversation_goes_on(chat, tmp_path):
    printed = chat("/nope", "/forget x", "/forget 0", "/search", "/help", "Hello.")
    assert printed[0] == "(there is no command /nope; /help shows those that there are)"
    assert "takes a number, or all; got 'x'" in printed[1] and "got '0'" in printed[2]
    assert printed[3] == "(the query is empty)"
    assert any(line.startswith("/memories ") for line in printed)
    assert items(tmp_path)[0].text == "Hello."


def test_a_reply_that_is_stopped_is_not_added(chat, tmp_path, monkeypatch):
    """What is being written ends, too, and the next reply is a whole one."""
    ended = []

    def stopped(self, message, **settings):
        try:
            yield "He"
            raise KeyboardInterrupt
        finally:
            ended.append(message)

    with monkeypatch.context() as patched:
        patched.setattr(MemoryStore, "reply", stopped)
        assert chat("Hello.") == ["He", "(stopped; nothing was added)"]
    assert ended == ["Hello."] and not items(tmp_path)
    monkeypatch.setattr(MemoryStore, "reply", lambda self, message, **settings: (piece for piece in (" ", "")))
    assert "the model wrote nothing, and nothing was added" in chat("Hello.")[1]
    assert not items(tmp_path)


def test_what_is_stopped_while_it_is_added_is_said_to_be_there(chat, tmp_path, monkeypatch):
    """It is on the disk before it is compressed."""
    real = MemoryStore.add

    def stopped(when):
        def add(self, *given, **named):
            if when == "after":
                real(self, *given, **named)
            raise KeyboardInterrupt

        return add

    for when, message, count in (("before", "nothing was added", 0), ("after", "both are remembered", 2)):
        with monkeypatch.context() as patched:
            patched.setattr(MemoryStore, "add", stopped(when))
            assert chat("Hello.")[1] == f"(stopped; {message})"
        assert len(items(tmp_path)) == count


def test_what_another_process_deletes_meanwhile_is_said(chat, tmp_path, monkeypatch):
    chat("One.", "Two.")
    real = MemoryStore.delete

    def delete(self, numbers):
        self.database.delete("id = ?", (numbers[-1],))
        return real(self, numbers)

    with monkeypatch.context() as patched:
        patched.setattr(MemoryStore, "delete", delete)
        assert chat("/forget")[0] == "(there is no item 4)"
    assert len(items(tmp_path)) == 3


def test_sampling_is_repeated_with_its_seed(chat, tmp_path):
    sampled = ["--temperature", "5", "--top-p", "0.99", "--passages", "2"]
    first = chat("Hello.", "/forget", more=[*sampled, "--seed", "1"])[0]
    assert chat("Hello.", "/forget", more=[*sampled, "--seed", "1"])[0] == first
    assert any(chat("Hello.", "/forget", more=[*sampled, "--seed", str(n)])[0] != first for n in (2, 3))


def test_on_a_terminal(folder, tmp_path):
    """There is a prompt; Ctrl-C clears a line, the arrow keys bring back what was said, and Ctrl-D ends."""
    pytest.importorskip("readline")
    new = ["--store", str(tmp_path / "store"), "--model", str(folder), *SIZES, *DEVICE, "--max-new-tokens", "4"]
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background job ignores
        os.execve(
            sys.executable, [sys.executable, "-m", "r3mem_fast", "chat", "anna", *new], {**os.environ, "TERM": "dumb"}
        )
    seen, end = "", time.monotonic() + 200

    def until(text, again=None):
        """Read up to a text; what is to be pressed again if nothing comes for a while."""
        nonlocal seen
        while text not in seen:
            left = max(end - time.monotonic(), 0)
            if select.select([terminal], [], [], min(left, 5) if again else left)[0]:
                seen += os.read(terminal, 4096).decode(errors="replace")
            else:
                assert again and left, f"no {text!r} in {seen!r}"
                os.write(terminal, again)
        seen = seen.partition(text)[2]

    try:
        until("0 items are remembered of anna.")
        until("anna> ")
        os.write(terminal, b"Hel")
        until("Hel")
        os.write(terminal, b"\x03")
        # Python reads a line in a loop around select(): a Ctrl-C just before it is heard with the next key or Ctrl-C.
        until("(Ctrl-D or /quit ends)", again=b"\x03")
        until("anna> ")
        os.write(terminal, b"Hello.\n")
        until("anna> ")
        os.write(terminal, b"/memories\n")
        until("2 items")
        until("anna> ")
        os.write(terminal, b"\x1b[A\x1b[A\n")  # twice up: the line before /memories
        os.write(terminal, b"/memories\n")
        until("4 items")
        until("anna> ")
        os.write(terminal, b"\x04")
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
            time.sleep(0.05)
        assert ended == (child, 0)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    finally:
        os.close(terminal)
    assert [item.text for item in items(tmp_path) if item.role == "user"] == ["Hello.", "Hello."]
