"""Texts of kinds that memories are trained and measured on. All but code and help lie in a folder of data sets.

novels     English novels of Project Gutenberg, `gutenberg/NUMBER.txt`, without its header and footer
wikipedia  `wikitext2/valid.txt`, the validation part of WikiText-2
dialogue   chats of 15 users with an assistant, `memorybank/memory_bank_en.json` (MemoryBank), a text each
meetings   transcripts of 35 meetings, `qmsum/val.jsonl` (QMSum), a text each
code       modules of Python's standard library
library    the larger ones of its other modules
help       the topics of Python's own help
"""

import importlib.machinery
import json
import re
from pathlib import Path

from r3mem_fast.data.text import read_text

KINDS = ("novels", "wikipedia", "dialogue", "meetings", "code", "library", "help")
_NOVELS = ("11-0", "1342-0", "1661", "2701-0", "98-0", "74-0", "174", "35-0")
_MODULES = (
    "argparse", "ast", "collections", "csv", "dataclasses", "difflib", "doctest", "enum", "functools", "heapq",
    "inspect", "logging", "os", "pathlib", "pickle", "random", "statistics", "subprocess", "tarfile", "textwrap",
    "threading", "typing", "zipfile",
)  # fmt: skip
_LIBRARY = (
    "_pydecimal", "_pyio", "configparser", "datetime", "imaplib", "ipaddress", "locale", "mailbox", "optparse", "pdb",
    "pickletools", "platform", "pydoc", "shutil", "smtplib", "ssl", "traceback", "turtle",
)  # fmt: skip


def texts_of(kind: str, data: Path | None = None) -> list[str]:
    """Read the texts of a kind.

    Args:
        kind: One of `KINDS`.
        data: Folder of the data sets.

    Raises:
        OSError: A file is not there.
        ValueError: The kind is none, or needs a folder.
    """
    if kind == "help":
        return [read_text()]
    if kind in ("code", "library"):
        names = _MODULES if kind == "code" else _LIBRARY
        return [Path(origin).read_text(encoding="utf-8") for origin in map(_origin, names)]
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if data is None:
        raise ValueError(f"texts of the kind {kind!r} lie in a folder of data sets: give it (--data)")
    if kind == "novels":
        return [book(data / "gutenberg" / f"{name}.txt") for name in _NOVELS]
    if kind == "wikipedia":
        return [read_text(data / "wikitext2" / "valid.txt")]
    if kind == "meetings":
        lines = read_text(data / "qmsum" / "val.jsonl").splitlines()
        return ["\n".join(map(_turn, json.loads(line)["meeting_transcripts"])) for line in lines]
    chats = json.loads(read_text(data / "memorybank" / "memory_bank_en.json"))
    return ["\n\n".join(_day(user, *day) for day in chat["history"].items()) for user, chat in chats.items()]


def _origin(name: str) -> str:
    spec = importlib.machinery.PathFinder.find_spec(name)
    assert spec is not None and spec.origin is not None
    return spec.origin


def book(path: Path) -> str:
    """Read a book, without what Project Gutenberg writes before and after it."""
    text = read_text(path)
    start = re.search(r"\*\*\* ?START OF.*?\*\*\*", text, re.S)
    end = re.search(r"\*\*\* ?END OF", text)
    return text[start.end() if start else 0 : end.start() if end else len(text)].strip()


def first_part(ids: list[int], held_out: float) -> list[int]:
    """Return the token ids of a text that may be learned: all but this share of them, at its end."""
    return ids[: len(ids) - int(len(ids) * held_out)]


def _turn(turn: dict[str, str]) -> str:
    return f"{turn['speaker']}: {turn['content']}"


def _day(user: str, date: str, turns: list[dict[str, str]]) -> str:
    lines = [f"{user}: {turn['query']}\nAI: {turn['response']}" for turn in turns]
    return "\n".join([date, *lines])
