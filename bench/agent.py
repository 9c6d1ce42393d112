"""Questions about conversations and meetings: what memories of them are worth, beside looking turns up.

    python -m bench.agent --data FOLDER --output bench/results/agent_smollm2.jsonl

MemoryBank's 15 users talk to an assistant, and ask about it later: 99 questions that have an answer, with references
of our own (`bench/data`); with --kind qmsum a user tells a meeting, and asks QMSum's queries about parts of it. Each
question is asked in a user's turn behind the conversation as it is held in each way:

    nothing         the chat template alone
    memory          what `MemoryStore` keeps: for each 256 tokens as many slots as `--kept` says, matched with no
                    training, and the newest tokens as they are
    attended        the same keys with their own values: the most attended ones
    kvzip ...       of the whole conversation, the keys that a press of kvpress chooses (`--presses`)
    last            the last tokens
    bm25, minilm    turns that fit the question best, by BM25 (SQLite's FTS5, and then the newest) or by embeddings of
                    all-MiniLM-L6-v2, in the order in which they were said; the worst of them is cut to fit
    memory+bm25     a memory with half as many slots, and turns in the place of the others; also memory+minilm
    found           with --passages N: N turns that BM25 finds, as `MemoryStore.ask(passages=N)` quotes them, alone;
                    and as memory+found behind the whole memory: fewer tokens, and more, than the other ways have
    anchored        as memory, and as memory+minilm, with what an adapter of anchors has learned (--adapter)
    foreign         another user's memory: what one is worth that knows nothing of it
    full            the whole conversation; its beginning is cut (`full_cut_tokens`) where the model's positions do not
                    suffice, or half of them if answers are written: they leave half to what stands behind a memory

`last`, `bm25`, `minilm`, the presses and `memory+bm25` have as many tokens and slots before the question as `memory`
has, for each user and number of slots. A record a way has the mean of nats a token of the references; F1, ROUGE-L and
containment of what is written, greedily; and the share of what the full conversation gains over nothing in nats, with
an interval over users. No model judges. With --output, the same command goes on where it was interrupted.
"""

import argparse
import contextlib
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from r3mem_fast import Memory, MemoryStore, R3MemConfig, R3MemPipeline
from r3mem_fast.memory.slots import slots_a_head
from r3mem_fast.store.answering import with_passages
from r3mem_fast.store.beside import pinned_memory, with_layout
from r3mem_fast.store.memories import History
from r3mem_fast.store.turns import TurnCodec

from .anchored import anchored_memory, load_adapter
from .asking import Asked, add_grades, ask_in_each_way
from .places import interval
from .presses import PRESSES, REPEAT, add_allocation_option, add_presses_option, keep, press_scores
from .records import run
from .rivals import laid_out, values_kept
from .talks import READERS, Talk, short_enough
from .unfinished import Unfinished, settings_of

_MEASURES = ("nats", "f1", "rouge_l", "contains")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.agent", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="(%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="(%(default)s)")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets, see bench/answers_data.py")
    parser.add_argument("--kind", choices=READERS, default="memorybank", help="data set (%(default)s)")
    parser.add_argument("--users", type=int, default=15, help="whose conversations are read (%(default)s)")
    parser.add_argument("--most-tokens", type=int, help="of a conversation that is read (any)")
    parser.add_argument("--kept", type=int, nargs="+", default=[64, 16], help="slots of 256 tokens (%(default)s)")
    parser.add_argument("--raw-tokens", type=int, default=64, help="newest tokens as they are (%(default)s)")
    parser.add_argument("--adapter", help="folder of an adapter of anchors, whose memories are a way, too")
    parser.add_argument("--passages", type=int, default=0, help="also N turns as `ask` finds them (%(default)s: no)")
    add_allocation_option(parser)
    add_presses_option(parser)
    parser.add_argument("--new-tokens", type=int, default=40, help="of an answer, at most; 0: none (%(default)s)")
    return run(parser, _records, arguments)


def _records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    pipeline = R3MemPipeline(options.model, dtype=options.dtype, config=_config(64, 256, options.allocation))
    talks = short_enough(READERS[options.kind](options.data), pipeline.codec, options.most_tokens)[: options.users]
    if len(talks) < 2:
        raise ValueError("there must be two conversations at least: the memory of another user is the control")
    yield {
        "model": Path(options.model).name, "dtype": options.dtype, "kind": options.kind, "kept": options.kept,
        "most_tokens": options.most_tokens, "raw_tokens": options.raw_tokens, "passages": options.passages,
        "allocation": options.allocation, "presses": options.presses, "new_tokens": options.new_tokens,
        "adapter": options.adapter and Path(options.adapter).name,
        "users": len(talks), "questions": sum(len(talk.questions) for talk in talks),
    }  # fmt: skip
    asker = Asker(options, pipeline)
    unfinished = Unfinished(options.output, settings_of(options), batch=1, progress=not options.json)
    pairs = [(talk, talks[index - 1]) for index, talk in enumerate(talks)]
    graded = unfinished.each("users", pairs, lambda pair: asker.ask(*pair), "Users")
    lengths = [group.pop("history") for group in graded]
    counts = torch.tensor([float(len(talk.questions)) for talk in talks])
    yield {
        "history_tokens": round(statistics.mean(length["tokens"] for length in lengths), 1),
        "full_cut_tokens": [int(length["cut"]) for length in lengths],
    }  # fmt: skip
    rivals = ("last", "bm25", "minilm", "found", "attended", "memory", "memory+minilm", *options.presses)
    yield from summary(graded, counts, rivals=rivals)
    unfinished.remove()


def summary(
    graded: Sequence[dict[str, dict[str, float]]], counts: torch.Tensor, *, rivals: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Records of what was graded: means by way, shares of what all of a text gains, and paired differences.

    Args:
        graded: For each group of questions, by way and measure, the sum over its questions.
        counts: Questions of each group, `[groups]`.
        rivals: Ways that ours (memories) are compared with at equal slots, named `RIVAL_SLOTS`.
    """
    ways = list(graded[0])
    measures = [name for name in _MEASURES if name in graded[0][ways[0]]]
    sums = {(way, name): torch.tensor([group[way][name] for group in graded]) for way in ways for name in measures}
    for way in ways:
        slots = sum(group[way]["slots"] for group in graded) / counts.sum().item()
        record: dict[str, Any] = {"way": way, "slots": round(slots, 1)}
        for name in measures:
            record[name] = round((sums[way, name].sum() / counts.sum()).item(), 4)
        if way not in ("nothing", "full"):
            wanted = sums["full", "nats"] - sums["nothing", "nats"]
            record["share"] = interval(sums[way, "nats"] - sums["nothing", "nats"], wanted)
        yield record
    for way in ways:
        kind, _, slots = way.rpartition("_")
        if kind.startswith(("memory", "anchored")):
            for rival in rivals:
                if rival != kind and f"{rival}_{slots}" in ways:
                    for name in measures:
                        better = sums[way, name] - sums[f"{rival}_{slots}", name]
                        better = -better if name == "nats" else better
                        yield {"way": way, "better_than": rival, "of": name, **interval(better, counts)}


class Asker:
    """Asks the questions about a conversation in all ways.

    Args:
        options: The command's options.
        pipeline: Pipeline of the model.
    """

    def __init__(self, options: argparse.Namespace, pipeline: R3MemPipeline):
        self._options, self._pipeline = options, pipeline
        self._learned = load_adapter(options.adapter, pipeline.model, anchored=True) if options.adapter else None
        self._held: dict[tuple[str, int, str], History] = {}

    def ask(self, talk: Talk, other: Talk) -> dict[str, dict[str, float]]:
        """Ask all questions about a conversation; by way and measure, the sum over the questions, and its `history`.

        Args:
            talk: The conversation.
            other: Another one, whose memory is read as a control.
        """
        pipeline = self._pipeline
        with tempfile.TemporaryDirectory() as folder, MemoryStore(folder, pipeline) as store:
            talk.add_to(store)
            turns = store.answering().turns
            items = store.get_all(user_id=talk.user)
            history = turns.ids([(item.role, item.text) for item in items])
            head = History(pinned_memory(pipeline.model, turns.opening), [], None)
            most = _positions(pipeline) if self._options.new_tokens else self._read_at_most(turns, talk)
            ways = self._ways(talk, other, turns, history, head, items[-1].role, most)
            read = {"tokens": float(len(history)), "cut": float(max(0, len(history) - most))}
            totals: dict[str, dict[str, float]] = {"history": read}
            for question, answer in talk.questions:
                asked = {way: _asked(turns, held, question) for way, held in ways.items() if "half" not in way}
                asked |= self._beside_turns(store, talk, question, ways)
                own = len(turns.reply([("user", question)], None))
                self._grade(asked, answer, own, totals)
        return totals

    def _ways(
        self, talk: Talk, other: Talk, turns: TurnCodec, history: list[int], head: History, last: str, most: int
    ) -> dict[str, History]:
        """A conversation as it is held in each way, the halves of memories that turns stand beside among them."""
        full = self._as_it_is(head, history[-most:], last)
        cut = history[-_positions(self._pipeline) :]
        scores = self._scores(turns.opening, cut)
        ways = {"nothing": head, "full": full}
        for kept in self._options.kept:
            whole, half = (self._memory(talk, slots, "matched") for slots in (kept, kept // 2))
            ways |= {
                f"memory_{kept}": whole,
                f"half_{kept}": half,
                f"attended_{kept}": self._memory(talk, kept, "attended"),
                f"foreign_{kept}": self._memory(other, kept, "matched"),
                f"last_{kept}": self._as_it_is(head, history[-_size(whole) :], last),
            }
            if self._learned is not None:
                read = torch.tensor([turns.opening + history])
                ways[f"anchored_{kept}"] = self._anchored(whole, read, kept, len(turns.opening))
                ways[f"half_anchored_{kept}"] = self._anchored(half, read, kept // 2, len(turns.opening))
            for name, of_keys in scores.items():
                held = self._as_it_is(head, cut, last)
                ways[f"{name}_{kept}"] = held._replace(memory=keep(held.memory, of_keys, _size(whole)))
        return ways

    def _as_it_is(self, head: History, ids: list[int], last: str) -> History:
        """Tokens as they are: in a memory's slots, which are read once, or behind it if these are too far away."""
        if len(ids) > _positions(self._pipeline):
            return head._replace(tail=ids, last_role=last)
        return History(held_as_it_is(self._pipeline, head.memory, ids), [], last)

    def _beside_turns(
        self, store: MemoryStore, talk: Talk, question: str, ways: dict[str, History]
    ) -> dict[str, Asked]:
        """A question behind turns that are looked up for it, and behind memories with them."""
        turns, asked = store.answering().turns, {}
        for kept in self._options.kept:
            size, half = _size(ways[f"memory_{kept}"]), _size(ways[f"half_{kept}"])
            for way, by in (("bm25", "bm25"), ("minilm", "embedding")):
                found = self._turns(store, talk, question, by, size)
                asked[f"{way}_{kept}"] = _asked(turns, ways["nothing"], question, found)
                found = self._turns(store, talk, question, by, size - half)
                asked[f"memory+{way}_{kept}"] = _asked(turns, ways[f"half_{kept}"], question, found)
                if self._learned is not None:
                    asked[f"anchored+{way}_{kept}"] = _asked(turns, ways[f"half_anchored_{kept}"], question, found)
            if self._options.passages:
                limit, whole = self._options.passages, ways[f"memory_{kept}"]
                best = store.search(question, user_id=talk.user, by="bm25", limit=limit)
                said = with_passages(question, [one.item for one in best])
                asked[f"found_{kept}"] = _asked(turns, ways["nothing"], said)
                asked[f"memory+found_{kept}"] = _asked(turns, whole, said)
        return asked

    def _read_at_most(self, turns: TurnCodec, talk: Talk) -> int:
        """Tokens that the model reads as they are at most, with each question and its answer behind them."""
        behind = [
            len(turns.reply([("user", question)], "user")) + len(self._pipeline.codec.ids(answer))
            for question, answer in talk.questions
        ]
        return (self._pipeline.model.max_tokens or 2**20) - len(turns.opening) - max(behind) - 16

    def _memory(self, talk: Talk, kept: int, keeping: str) -> History:
        """A conversation's memory with so many slots of each segment, the tokens behind it, and the last role."""
        key = (talk.user, kept, keeping)
        if key not in self._held:
            model = self._pipeline.model
            layout = _config(kept, 64 * kept, self._options.allocation).memory_layout(model.max_tokens)
            assert layout is not None, "there are memory tokens"
            values = values_kept() if keeping == "attended" else contextlib.nullcontext()
            with (
                tempfile.TemporaryDirectory() as folder,
                laid_out(model, layout),
                MemoryStore(folder, self._pipeline, raw_tokens=self._options.raw_tokens) as store,
                values,
            ):
                talk.add_to(store)
                self._held[key] = store.answering().histories.history(talk.user)
        return self._held[key]

    def _anchored(self, matched: History, ids: torch.Tensor, kept: int, pinned: int) -> History:
        """A history whose memory an adapter of anchors makes of what a matched one was made of.

        Args:
            matched: The history with the matched memory.
            ids: Token ids of the whole conversation, int64 `[1, T]`.
            kept: Slots of each segment.
            pinned: First tokens, which stay as they are.
        """
        assert self._learned is not None and matched.memory is not None, "there are an adapter and a memory"
        layout = _config(kept, 64 * kept, self._options.allocation).memory_layout(self._pipeline.model.max_tokens)
        assert layout is not None, "there are memory tokens"
        start = self._pipeline.model.empty_memory(pinned=pinned)
        seen = int(matched.memory.tokens_seen[0])
        return matched._replace(memory=anchored_memory(self._learned, ids[:, :seen], start, layout))

    def _scores(self, opening: list[int], ids: list[int]) -> dict[str, torch.Tensor]:
        """What each press thinks of the keys of a conversation; those before it are always kept."""
        model, found = self._pipeline.model, {}
        repeat = torch.tensor(self._pipeline.codec.ids(REPEAT))
        for name in self._options.presses:
            with model.disable_adapters():
                found[name] = press_scores(
                    model.plain_model,
                    PRESSES[name](2 * self._options.raw_tokens),
                    torch.tensor([opening + ids]),
                    prefix=len(opening),
                    repeat_ids=repeat,
                )
        return found

    def _turns(self, store: MemoryStore, talk: Talk, question: str, by: str, tokens: int) -> list[int]:
        """Token ids of the turns that fit a question best, in the order in which they were said, as many as asked for.

        Turns without a word of the question come behind those with one, the newest first.
        """
        every = store.get_all(user_id=talk.user)
        best = [found.item for found in store.search(question, user_id=talk.user, by=by, limit=len(every))]
        known = {item.id for item in best}
        left, chosen = tokens, {}
        for item in [*best, *(item for item in reversed(every) if item.id not in known)]:
            if left <= 0:
                break
            chosen[item.id] = self._pipeline.codec.said(f"- {talk.speakers[item.role]}{item.text}\n")[:left]
            left -= len(chosen[item.id])
        return [token for number in sorted(chosen) for token in chosen[number]]

    def _grade(self, ways, answer, own, totals):
        found = ask_in_each_way(self._pipeline, ways, [answer], new_tokens=self._options.new_tokens)
        for way, asked in ways.items():
            found[way]["slots"] = asked.slots - own
        add_grades(totals, found)


def held_as_it_is(pipeline: R3MemPipeline, head: Memory, ids: Sequence[int]) -> Memory:
    """A memory with a slot for every token, which is read as the tokens themselves are.

    Args:
        pipeline: The pipeline.
        head: Memory of what stands before them.
        ids: Token ids.
    """
    length = min(256, len(ids))
    count = math.ceil(len(ids) / length) * length
    config = _config(length, count, head.layout.allocation, segment_length=length, overlap=0)
    layout = config.memory_layout(pipeline.model.max_tokens)
    assert layout is not None, "there are memory tokens"
    return pipeline.model.compress(torch.tensor([list(ids)]), memory=with_layout(head, layout), finish=True)


def _asked(turns: TurnCodec, held: History, question: str, found: Sequence[int] = ()) -> Asked:
    """A question in a user's turn behind a conversation, and behind what was found for it, up to the answer."""
    said, role = [("user", question)], held.last_role
    ids, between = turns.reply(said, role), len(turns.ids(said, role)) - len(turns.ids(said))
    assert held.memory is not None, "there is at least the memory of the template"
    return Asked(held.memory, [*held.tail, *ids[:between], *found, *ids[between:]])


def _size(history: History) -> int:
    """Slots and tokens of a conversation, without pinned slots, with the tokens that the memory carries."""
    memory = history.memory
    assert memory is not None, "a conversation of several segments"
    return slots_a_head(memory) + len(memory.recent[0]) + len(history.tail)


def _positions(pipeline: R3MemPipeline) -> int:
    """Tokens that a memory holds at most, each at its own place."""
    return pipeline.model.reader.layout.reach - 64


def _config(slots: int, budget: int, allocation: str, *, segment_length: int = 256, overlap: int = 32) -> R3MemConfig:
    return R3MemConfig(
        memory_writer="matched", adapter_rows="memory", num_memory_tokens=slots, memory_budget=budget,
        segment_length=segment_length, segment_overlap=overlap, beyond_budget="forget", memory_allocation=allocation,
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
