"""A store's process is killed at any moment, again and again: all that was acknowledged is there, or gone.

    python -m bench.crash --kills 200 --output bench/results/crash_smollm2.jsonl

A child adds to a store and deletes from it, and says before and after each operation what it does, through a pipe. It
is killed by SIGKILL after a random time. Then the store is opened, and checked:

- its items are those of all operations that were acknowledged, in order; only the last one, which was not, may have
  been done or not, wholly;
- SQLite's integrity_check and that of the index find nothing;
- memories can be read, and their folder holds nothing else;
- no file holds a word that stands in deleted items alone;
- now and then: the memories are those of a new store with the same texts, bit for bit.

The child is a fork of a process that has loaded the model, so that it starts at once. The operating system survives,
with what it has not written to the disk yet: a loss of power is not tried.
"""

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from r3mem_fast import MemoryStore, R3MemConfig, R3MemPipeline

from .records import add_output_option, add_record

USERS = ("anna", "boris")
# Beyond so many items more are deleted than added.
_MANY = 40
_WORDS = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").split()


class Operation(NamedTuple):
    """What a child does.

    Attributes:
        kind: "add" or "delete".
        user: Whose item it is.
        text: Its text, which no other item has.
    """

    kind: str
    user: str
    text: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status: 1 if a check found something."""
    parser = argparse.ArgumentParser(prog="python -m bench.crash", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder or a hub id (%(default)s)")
    parser.add_argument("--kills", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="that a child lives at most (%(default)s)")
    parser.add_argument("--compare", type=int, default=10, help="memories after each so many kills (%(default)s)")
    parser.add_argument("--segment-length", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--memory-tokens", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--memory-budget", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--raw-tokens", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads would not survive a fork
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        record = _Bench(options, Path(folder)).run()
    add_record(record, [], options)
    return 1 if record["problems"] else 0


class _Bench:
    """Kills children, and checks what they leave."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.random = random.Random(options.seed)
        config = R3MemConfig(
            memory_writer="matched",
            adapter_rows="memory",
            num_memory_tokens=options.memory_tokens,
            memory_budget=options.memory_budget,
            segment_length=options.segment_length,
            segment_overlap=2,
            cycle_weight=0.0,
        )
        self.pipeline = R3MemPipeline(options.model, config=config)
        self.expected: list[tuple[str, str]] = []  # user and text of each item
        self.deleted: set[str] = set()
        self.problems: list[str] = []
        names = ("adds", "deletes", "unacknowledged_done", "unacknowledged_not_done", "leftover_files", "compared")
        self.counts = dict.fromkeys(names, 0)

    def run(self) -> dict[str, Any]:
        """Kill and check, and return the record."""
        options, started = self.options, time.perf_counter()
        for kill in range(1, options.kills + 1):
            pending = self._acknowledged(self._killed(kill))
            try:
                self._check(pending, compare=kill % options.compare == 0)
            except (AssertionError, OSError, ValueError) as error:
                self.problems.append(f"kill {kill}: {type(error).__name__}: {error}")
                break
            if not options.json and kill % 10 == 0:
                print(f"{kill} kills, {self.counts}", flush=True)
        sizes = ("segment_length", "memory_tokens", "memory_budget", "raw_tokens")
        return {
            "kills": kill,
            "model": Path(options.model).name,
            **{name: getattr(options, name) for name in sizes},
            "seconds_a_child": options.seconds,
            **self.counts,
            "items_at_the_end": len(self.expected),
            "problems": self.problems,
            "seconds": round(time.perf_counter() - started, 1),
        }

    def _store(self, folder: str = "store") -> MemoryStore:
        return MemoryStore(self.folder / folder, self.pipeline, raw_tokens=self.options.raw_tokens)

    def _killed(self, kill: int) -> list[tuple[str, Operation]]:
        """Have a child work and kill it; returns what it has said: "begin" or "end" of operations."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(reader)
                self._work(random.Random(f"{self.options.seed} {kill}"), writer)
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        time.sleep(self.random.uniform(0, self.options.seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as pipe:
            said = [json.loads(line) for line in pipe.read().splitlines()]
        if not os.WIFSIGNALED(status):
            self.problems.append(f"kill {kill}: the child ended by itself")
        return [(what, Operation(*operation)) for what, operation in said]

    def _work(self, numbers: random.Random, pipe: int) -> None:
        """Add and delete until killed."""
        store = self._store()
        for operation, item in self._operations(numbers, store):
            os.write(pipe, (json.dumps(["begin", operation]) + "\n").encode())
            if operation.kind == "add":
                store.add(operation.text, user_id=operation.user)
            else:
                store.delete(item)
            os.write(pipe, (json.dumps(["end", operation]) + "\n").encode())

    def _operations(self, numbers: random.Random, store: MemoryStore) -> Iterator[tuple[Operation, int | None]]:
        """Operations at random, with the number of the item that is deleted."""
        while True:
            items = store.get_all()
            if items and numbers.random() < (0.6 if len(items) > _MANY else 0.25):
                item = numbers.choice(items)
                yield Operation("delete", item.user_id, item.text), item.id
            else:
                start = numbers.randrange(len(_WORDS))
                words = _WORDS[start : start + numbers.randint(1, 20)]
                yield (
                    Operation("add", numbers.choice(USERS), " ".join([f"{numbers.getrandbits(64):016x}", *words])),
                    None,
                )

    def _acknowledged(self, said: list[tuple[str, Operation]]) -> Operation | None:
        """Take over all operations that were acknowledged; returns the one that was not."""
        pending = None
        for what, operation in said:
            pending = operation if what == "begin" else None
            if what == "end":
                self._take_over(operation)
        return pending

    def _take_over(self, operation: Operation) -> None:
        self.counts[f"{operation.kind}s"] += 1
        self.expected = _after(self.expected, operation)
        if operation.kind == "delete":
            self.deleted.add(operation.text[4:16])  # an index may keep the beginning with another word

    def _check(self, pending: Operation | None, *, compare: bool) -> None:
        """Check the store that a killed child has left."""
        memories = self.folder / "store" / "memories"
        before = _memory_files(memories)
        with self._store() as store:
            found = [(item.user_id, item.text) for item in store.get_all()]
            if pending is not None:
                is_done = found == _after(self.expected, pending)
                self.counts["unacknowledged_done" if is_done else "unacknowledged_not_done"] += 1
                if is_done:
                    self._take_over(pending)
                    self.counts[f"{pending.kind}s"] -= 1  # it was not acknowledged
            assert found == self.expected, f"{len(found)} items, {len(self.expected)} expected, or other ones"
            assert store.database.rows("PRAGMA integrity_check") == [("ok",)], "integrity_check"
            store.database.rows("INSERT INTO words (words, rank) VALUES ('integrity-check', 1)")
            known = {name for (name,) in store.database.rows("SELECT file FROM users WHERE file IS NOT NULL")}
            self.counts["leftover_files"] += len(before - known)
            histories = [store.answering().histories.history(user) for user in USERS]
            known = {name for (name,) in store.database.rows("SELECT file FROM users WHERE file IS NOT NULL")}
            assert _memory_files(memories) == known, (
                "files of memories that nobody knows of, or none where one should be"
            )
            self._check_deleted()
        if compare:
            self._compare(histories)

    def _check_deleted(self) -> None:
        """Check that no file holds the first word of a deleted item, which no other has."""
        for path in (self.folder / "store").rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                assert not [word for word in self.deleted if word.encode() in content], (
                    f"a deleted word in {path.name}"
                )

    def _compare(self, histories: Sequence[Any]) -> None:
        """Check that memories are those of a new store with the same texts."""
        self.counts["compared"] += 1
        with self._store(f"fresh{self.counts['compared']}") as fresh:
            for user, its in zip(USERS, histories, strict=True):
                if texts := [text for whose, text in self.expected if whose == user]:
                    fresh.add([{"role": "user", "content": text} for text in texts], user_id=user)
                own = fresh.answering().histories.history(user)
                assert (own.tail, own.last_role) == (its.tail, its.last_role), f"another tail of {user}'s memory"
                tensors, others = ({} if one.memory is None else one.memory.tensors() for one in (own, its))
                assert tensors.keys() == others.keys(), f"another memory of {user}"
                for name, tensor in tensors.items():
                    assert torch.equal(tensor, others[name]), f"other {name} of {user}'s memory"


def _after(items: Sequence[tuple[str, str]], operation: Operation) -> list[tuple[str, str]]:
    """Items after an operation."""
    item = (operation.user, operation.text)
    return [*items, item] if operation.kind == "add" else [one for one in items if one != item]


def _memory_files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*safetensors*")} if folder.is_dir() else set()


if __name__ == "__main__":
    raise SystemExit(main())
