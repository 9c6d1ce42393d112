"""What a store of conversations costs: seconds and bytes of a turn that is added, and the time to a first token.

    python -m bench.store_times --data FOLDER --output bench/results/store_times_smollm2.jsonl

MemoryBank's users, each with a conversation of ten days. Every turn of a conversation (what the user says, and the
answer) is

    add         added to a `MemoryStore` with the settings of a new one: on the disk, and in the memory
    read        read by the model alone, behind the keys and values of all turns before it

one after the other, the first one by turns. Then each question is asked, for one token, in four ways:

    memory      `MemoryStore.ask(passages=0)`: behind the memory and the newest turns
    passages    the same, with four turns that are looked up by words before it
    opened      the same as memory, by a store that has just been opened, so that the memory's file is read
    prefill     by the model alone, behind the whole conversation, which it reads (`cut_tokens`: its beginning is left
                out where positions do not suffice)

A record of ratios has the sum over a conversation over the sum of the other way, with an interval over users.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.cache_utils import DynamicCache

from r3mem_fast import MemoryStore, R3MemPipeline, load_model
from r3mem_fast.integrations.compat import cache_argument
from r3mem_fast.store.conversations import DEFAULT_CONFIG
from r3mem_fast.store.defaults import RAW_TOKENS

from .places import interval
from .presses import add_allocation_option
from .records import add_output_option, add_records
from .talks import Talk, read_memorybank

_PASSAGES, _RAW_TOKENS = 4, RAW_TOKENS
_WAYS = ("memory", "passages", "opened", "prefill")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.store_times", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="(%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="(%(default)s)")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets, see bench/answers_data.py")
    parser.add_argument("--users", type=int, default=8, help="whose conversations are added (%(default)s)")
    parser.add_argument("--questions", type=int, default=3, help="of each, at most (%(default)s)")
    add_allocation_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    if options.users < 2:
        parser.error("--users must be at least 2: the intervals are over users")
    add_records(_records(options), options)
    return 0


def _records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    talks = read_memorybank(options.data)[: options.users]
    timer = Timer(options.model, options.dtype, options.questions, options.allocation)
    yield {
        "model": options.model, "dtype": options.dtype, "users": len(talks),
        "turns": sum(1 for talk in talks for _ in talk.turns()),
        "config": {name: getattr(DEFAULT_CONFIG, name) for name in ("num_memory_tokens", "segment_length")},
        "allocation": options.allocation,
    }  # fmt: skip
    timer.of(talks[0])  # what is run for the first time is slower
    found = [timer.of(talk) for talk in tqdm(talks, disable=options.json, desc="Users")]
    added, read = (torch.tensor([sum(one[way]) for one in found]) for way in ("add", "read"))
    yield {
        "turn": "add",
        "milliseconds": _median(found, "add"),
        "most_milliseconds": round(1e3 * max(max(one["add"]) for one in found), 1),
        "read_milliseconds": _median(found, "read"),
        "over_read": interval(added, read),
    }
    for way in _WAYS:
        record = {"first_token": way, "milliseconds": _median(found, way)}
        if way != "prefill":
            sums, whole = (torch.tensor([sum(one[name]) for one in found]) for name in (way, "prefill"))
            record["over_prefill"] = interval(sums, whole)
        yield record
    for name in ("words", "memory_bytes", "text_bytes", "database_bytes", "cache_bytes", "tokens", "cut_tokens"):
        values = [number for one in found for number in one[name]]
        yield {"of": name, "mean": round(statistics.mean(values), 6)}


def _median(found: Sequence[dict[str, list[float]]], name: str) -> float:
    return round(1e3 * statistics.median(value for one in found for value in one[name]), 2)


class Timer:
    """Times what is done with conversations.

    Args:
        model: Name of the model.
        dtype: Of its weights.
        questions: Asked of each conversation, at most.
        allocation: See `R3MemConfig.memory_allocation`.
    """

    def __init__(self, model: str, dtype: str, questions: int, allocation: str):
        config = dataclasses.replace(DEFAULT_CONFIG, memory_allocation=allocation)
        self._pipeline = R3MemPipeline(model, dtype=dtype, config=config)
        self._plain, _ = load_model(model, dtype=dtype)  # without the pipeline's adapters, which cost time
        self._questions = questions

    @torch.no_grad()
    def of(self, talk: Talk) -> dict[str, list[float]]:
        """Seconds of each turn by way, of each first token by way, and sizes in bytes and tokens."""
        found: dict[str, list[float]] = {name: [] for name in ("add", "read", "words", *_WAYS)}
        with tempfile.TemporaryDirectory() as folder:
            with MemoryStore(folder, self._pipeline, raw_tokens=_RAW_TOKENS) as store:
                ids = self._add(store, talk, found)
                self._ask(store, talk, ids, found)
                memory = store.memory(talk.user)
                assert memory is not None and memory.slots is not None
                heads, size = memory.states.shape[3], memory.states.shape[-1]
            files = {path: path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()}
        texts = [message["content"] for _, messages in talk.turns() for message in messages]
        layers, width = memory.states.shape[0], memory.states.element_size()
        return found | {
            "memory_bytes": [sum(count for path, count in files.items() if path.suffix == ".safetensors")],
            "text_bytes": [sum(len(text.encode()) for text in texts)],
            "database_bytes": [sum(count for path, count in files.items() if path.suffix != ".safetensors")],
            "cache_bytes": [2 * layers * heads * size * width * len(ids)],
            "tokens": [len(ids)],
            "cut_tokens": [len(ids) - len(self._cut(ids))],
        }

    def _add(self, store: MemoryStore, talk: Talk, found: dict[str, list[float]]) -> list[int]:
        """Add a conversation's turns, and read them; returns the token ids of all."""
        turns, cache, last = store.answering().turns, DynamicCache(), None
        ids = list(turns.opening)
        for number, (day, messages) in enumerate(talk.turns()):
            new = turns.ids([(message["role"], message["content"]) for message in messages], last)
            ids, last = ids + new, messages[-1]["role"]
            row = torch.tensor([new if cache.get_seq_length() else ids])
            ways: list[tuple[str, Callable[[], Any]]] = [
                ("add", lambda messages=messages, day=day: store.add(messages, user_id=talk.user, run_id=day)),
                ("read", lambda row=row: self._plain(row, **self._behind(cache), logits_to_keep=1)),
            ]
            for way, action in ways[:: 1 if number % 2 else -1]:
                found[way].append(_seconds(action))
        return ids

    def _behind(self, cache: DynamicCache) -> dict[str, Any]:
        return {"use_cache": True, **cache_argument(self._plain, cache)}

    def _ask(self, store: MemoryStore, talk: Talk, ids: list[int], found: dict[str, list[float]]) -> None:
        """Ask the questions in all ways."""
        turns = store.answering().turns
        for question, _ in talk.questions[: self._questions]:
            row = torch.tensor([self._cut(ids) + turns.reply([("user", question)], "assistant")])
            ways = {
                "memory": lambda question=question: _ask(store, question, talk.user),
                "passages": lambda question=question: _ask(store, question, talk.user, passages=_PASSAGES),
                "opened": lambda question=question: self._opened(store, question, talk.user),
                "prefill": lambda row=row: self._plain.generate(
                    row, attention_mask=torch.ones_like(row), max_new_tokens=1, do_sample=False
                ),
            }
            for way in _WAYS:
                found[way].append(_seconds(ways[way]))
            found["words"].append(_seconds(lambda question=question: store.search(question, user_id=talk.user)))

    def _opened(self, store: MemoryStore, question: str, user: str) -> None:
        with MemoryStore(store.folder, self._pipeline) as opened:
            _ask(opened, question, user)

    def _cut(self, ids: list[int]) -> list[int]:
        return ids[-(self._pipeline.model.max_tokens - 256) :]


def _ask(store: MemoryStore, question: str, user: str, passages: int = 0) -> None:
    store.ask(question, user_id=user, passages=passages, max_new_tokens=1, do_sample=False)


def _seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(main())
