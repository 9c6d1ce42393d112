"""Questions about 240 paragraphs: what memories are worth behind a lookup, at equal slots.

    python -m bench.rag --data FOLDER --output bench/results/rag_smollm2.jsonl

One question about each paragraph of XQuAD, asked of all of them. What stands before it is found by its words (BM25 of
SQLite's FTS5, function words left out) or by embeddings (all-MiniLM-L6-v2), and has `--slots` tokens or slots:

    nothing                 the chat template, with an example, alone
    bm25, minilm            the paragraphs that fit best, cut to the slots
    bm25+, minilm+          the sentences that fit best, of all paragraphs
    memory                  the matched memory of the paragraph that fits best (BM25), made before it was asked
    attended                the same keys with their own values
    kvzip ...               the keys of that paragraph that a press of kvpress chooses, with their own values
    memory+bm25             the sentence that fits best, and the memory of its paragraph in the other slots; also
                            memory+minilm
    anchored                as memory, and as memory+minilm, with what an adapter of anchors has learned (--adapter)
    memories                the memories of the two paragraphs that fit best, side by side
    foreign                 the memory of a paragraph that has nothing to do with it
    first                   the whole paragraph that fits best: more slots than the others have
    full                    the whole paragraph that the question is about

Records as of `bench.agent`: nats a token of the reference, F1, ROUGE-L and containment of what is written, greedily,
and the share of what the right paragraph gains over nothing in nats. With --output, the same command goes on where it
was interrupted.
"""

import argparse
import contextlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pysbd
import torch

from r3mem_fast import Memory, R3MemConfig, R3MemPipeline
from r3mem_fast.store.beside import pinned_memory, side_by_side, with_layout
from r3mem_fast.store.lookup import WordIndex, minilm_embedder

from .agent import summary
from .anchored import anchored_memory, load_adapter
from .answers_data import Question, read_xquad
from .asking import Asked, ask_in_each_way
from .presses import PRESSES, REPEAT, add_allocation_option, add_presses_option, keep, press_scores
from .prompts import template_of
from .records import run
from .rivals import values_kept
from .unfinished import Unfinished, settings_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.rag", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="(%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="(%(default)s)")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets, see bench/answers_data.py")
    parser.add_argument("--questions", type=int, default=240, help="of as many paragraphs (%(default)s)")
    parser.add_argument("--slots", type=int, nargs="+", default=[48, 96], help="before a question (%(default)s)")
    parser.add_argument("--adapter", help="folder of an adapter of anchors, whose memories are a way, too")
    add_allocation_option(parser)
    add_presses_option(parser)
    parser.add_argument("--new-tokens", type=int, default=24, help="of an answer, at most; 0: none (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of questions (%(default)s)")
    return run(parser, _records, arguments)


def _records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    pipeline = R3MemPipeline(options.model, dtype=options.dtype)
    by_paragraph: dict[str, list[Question]] = {}
    for question in read_xquad(options.data):
        by_paragraph.setdefault(question.context, []).append(question)
    choice = random.Random(options.seed)
    questions = [choice.choice(of_one) for of_one in by_paragraph.values()]
    choice.shuffle(questions)
    questions = questions[: options.questions]
    asker = _Asker(options, pipeline, list(by_paragraph))
    yield {
        "model": Path(options.model).name, "dtype": options.dtype, "slots": options.slots,
        "new_tokens": options.new_tokens,
        "allocation": options.allocation,
        "presses": options.presses, "adapter": options.adapter and Path(options.adapter).name,
        "questions": len(questions), "paragraphs": len(by_paragraph), "paragraph_tokens": asker.mean_tokens,
        "found_first": {"bm25": asker.found(questions, "bm25"), "minilm": asker.found(questions, "minilm")},
    }  # fmt: skip
    unfinished = Unfinished(options.output, settings_of(options), batch=1, progress=not options.json)
    graded = unfinished.each("questions", questions, asker.ask, "Asking")
    rivals = ("bm25", "minilm", "bm25+", "minilm+", "attended", "memory", "memory+minilm", *options.presses)
    yield from summary(graded, torch.ones(len(graded)), rivals=rivals)
    unfinished.remove()


class _Asker:
    """Asks a question in all ways.

    Args:
        options: The command's options.
        pipeline: Pipeline of the model.
        paragraphs: All paragraphs.
    """

    def __init__(self, options: argparse.Namespace, pipeline: R3MemPipeline, paragraphs: list[str]):
        self._options, self._pipeline, self._paragraphs = options, pipeline, paragraphs
        learned = load_adapter(options.adapter, pipeline.model, anchored=True) if options.adapter else None
        self._learned = learned
        self._ids = [pipeline.codec.ids(text) for text in paragraphs]
        self.mean_tokens = round(sum(map(len, self._ids)) / len(paragraphs), 1)
        segmenter = pysbd.Segmenter(language="en", clean=False)
        pieces = [(place, text) for place, whole in enumerate(paragraphs) for text in segmenter.segment(whole)]
        self._places = [place for place, text in pieces if text.strip()]
        self._sentences = [pipeline.codec.ids(text.strip()) for _, text in pieces if text.strip()]
        texts = [text.strip() for _, text in pieces if text.strip()]
        self._words = {"bm25": WordIndex(paragraphs), "bm25+": WordIndex(texts)}
        self._embed = minilm_embedder()
        self._vectors = {"minilm": self._embed(paragraphs), "minilm+": self._embed(texts)}
        before, _, self._asking = template_of(pipeline.tokenizer, "xquad")
        self._before, self._repeat = pipeline.codec.ids(before), pipeline.codec.ids(REPEAT)
        self._head = pinned_memory(pipeline.model, self._before)
        self._line = pipeline.codec.ids("\n")
        self._memories: dict[tuple[int, int, str], Memory] = {}
        self._scores: dict[tuple[int, str], torch.Tensor] = {}  # of presses, by paragraph and the press's settings

    def found(self, questions: Sequence[Question], way: str) -> float:
        """How often the paragraph that fits best is the one that the question is about."""
        first = [self._paragraphs[self._ranked(question.question, way)[0]] for question in questions]
        right = [found == question.context for found, question in zip(first, questions, strict=True)]
        return round(sum(right) / len(questions), 4)

    def ask(self, question: Question) -> dict[str, dict[str, float]]:
        """Ask a question in all ways; grades by way and measure."""
        codec, options = self._pipeline.codec, self._options
        self._memories.clear()  # another question is about another paragraph
        self._scores.clear()
        asked = codec.ids(self._asking(question.question))
        ranked = {way: self._ranked(question.question, way) for way in (*self._words, *self._vectors)}
        right, first = self._paragraphs.index(question.context), ranked["bm25"][0]
        ways = {
            "nothing": Asked(self._head, asked),
            "first": Asked(self._head, self._ids[first] + asked),
            "full": Asked(self._head, self._ids[right] + asked),
        }
        for slots in options.slots:
            for way, order in ranked.items():
                ways[f"{way}_{slots}"] = Asked(self._head, self._passages(way, order, slots) + asked)
            second = ranked["bm25"][1]
            halves = [self._memory(place, slots // 2) for place in sorted((first, second))]
            foreign = (right + len(self._paragraphs) // 2) % len(self._paragraphs)
            ways |= {
                f"memory_{slots}": Asked(self._memory(first, slots), asked),
                f"attended_{slots}": Asked(self._memory(first, slots, "attended"), asked),
                f"foreign_{slots}": Asked(self._memory(foreign, slots), asked),
                f"memories_{slots}": Asked(side_by_side(halves), asked),
                f"memory+bm25_{slots}": self._sentence_and_memory(ranked["bm25+"][0], slots, asked),
                f"memory+minilm_{slots}": self._sentence_and_memory(ranked["minilm+"][0], slots, asked),
            }
            if self._learned is not None:
                mixed = self._sentence_and_memory(ranked["minilm+"][0], slots, asked, "anchored")
                ways[f"anchored_{slots}"] = Asked(self._memory(first, slots, "anchored"), asked)
                ways[f"anchored+minilm_{slots}"] = mixed
            for name in options.presses:
                ways[f"{name}_{slots}"] = Asked(self._pressed(first, slots, name), asked)
        found = ask_in_each_way(self._pipeline, ways, question.answers, new_tokens=options.new_tokens, until='"')
        for way, how in ways.items():
            found[way]["slots"] = how.slots - len(asked)
        return found

    def _ranked(self, question: str, way: str) -> list[int]:
        if way in self._words:
            return self._words[way].ranked(question)
        return (self._vectors[way] @ self._embed([question])[0]).argsort(descending=True).tolist()

    def _passages(self, way: str, order: Sequence[int], slots: int) -> list[int]:
        """Paragraphs, or sentences in the order of the text, as many as fit; the last one is cut."""
        of, left, chosen = (self._sentences if way.endswith("+") else self._ids), slots, {}
        for place in order:
            if left <= len(self._line):
                break
            chosen[place] = of[place][: left - len(self._line)] + self._line
            left -= len(chosen[place])
        places = sorted(chosen) if way.endswith("+") else chosen
        return [token for place in places for token in chosen[place]]

    def _sentence_and_memory(self, place: int, slots: int, asked: list[int], keeping: str = "matched") -> Asked:
        sentence = self._sentences[place][: slots - len(self._line)] + self._line
        left = slots - len(sentence)
        memory = self._memory(self._places[place], left, keeping) if left else self._head
        return Asked(memory, sentence + asked)

    def _memory(self, place: int, slots: int, keeping: str = "matched") -> Memory:
        """Memory of a paragraph with so many slots, or a slot for each token if it has fewer."""
        key = (place, slots, keeping)
        if key not in self._memories:
            ids = self._ids[place]
            slots = min(slots, len(ids))
            config = R3MemConfig(
                memory_writer="matched", num_memory_tokens=slots, memory_budget=slots, segment_length=len(ids),
                memory_allocation=self._options.allocation,
            )  # fmt: skip
            layout = config.memory_layout(self._pipeline.model.max_tokens)
            assert layout is not None, "there are memory tokens"
            start, text = with_layout(self._head, layout), torch.tensor([ids])
            if keeping == "anchored":
                assert self._learned is not None, "there is an adapter"
                self._memories[key] = anchored_memory(self._learned, text, start, layout)
            else:
                with values_kept() if keeping == "attended" else contextlib.nullcontext():
                    self._memories[key] = self._pipeline.model.compress(text, memory=start, finish=True)
        return self._memories[key]

    def _pressed(self, place: int, slots: int, name: str) -> Memory:
        """The keys and values of a paragraph that a press chooses."""
        press, ids, prefix = PRESSES[name](slots), self._ids[place], len(self._before)
        key, model = (place, repr(press)), self._pipeline.model
        if key not in self._scores:
            whole = torch.tensor([self._before + ids])
            with model.disable_adapters():
                repeat = torch.tensor(self._repeat)
                scores = press_scores(model.plain_model, press, whole, prefix=prefix, repeat_ids=repeat)
            self._scores[key] = scores
        return keep(self._memory(place, len(ids)), self._scores[key], slots)


if __name__ == "__main__":
    raise SystemExit(main())
