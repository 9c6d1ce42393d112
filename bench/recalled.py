"""Questions about paragraphs that adapters have learned: what is recalled, reading backward, beside looking it up.

    python -m bench.recalled --data FOLDER --folder SHELF --output bench/results/recalled_smollm2.jsonl

XQuAD's paragraphs, some of them, are taught to an `AdapterShelf`, an adapter each. Then all questions about these are
asked behind what each way finds, and what is found stands there as it is:

    nothing         the chat template, with an example, alone
    full            the paragraph that the question is about
    another         another one: what it is worth that a text stands there
    bm25, minilm    the paragraph, of those that were taught, that fits best by words (SQLite's FTS5) or by embeddings
                    (all-MiniLM-L6-v2)
    bm25+           the sentence, of all of these, that fits best by words
    recalled        what `recall` gives for the question itself; nothing, if it gives nothing
    by_query        what `recall` gives for the query, of all that were learned, that fits the question best by words:
                    what is looked up are queries, and no text is kept
    by_document     what `recall` gives for the document's own query, of that document

A record a way has the mean of nats a token of the reference; F1, ROUGE-L and containment of what is written, greedily;
how often something was found, and how often the answer is in it; tokens before the question; and the share of what the
paragraph gains over nothing in nats, with an interval over paragraphs. With --folder the shelf is kept, and what it
has learned is not taught again (no seconds are told then); with --output, the same command goes on where it was
interrupted.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pysbd
import torch

from r3mem_fast import AdapterShelf, R3MemPipeline
from r3mem_fast.store.beside import pinned_memory
from r3mem_fast.store.lookup import WordIndex, minilm_embedder

from .answers_data import Question, chosen_groups, contains, read_xquad
from .asking import Asked, add_grades, ask_in_each_way
from .places import interval
from .prompts import template_of
from .records import add_output_option, add_records
from .unfinished import Unfinished, settings_of

_MEASURES = ("nats", "f1", "rouge_l", "contains", "found", "has_answer", "tokens")
_RECALLED, _LOOKED_UP = ("recalled", "by_query", "by_document"), ("another", "bm25", "minilm", "bm25+")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.recalled", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="(%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="(%(default)s)")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets, see bench/answers_data.py")
    parser.add_argument(
        "--questions", type=int, default=48, help="about as many paragraphs as have so many (%(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="keep the shelf here (in a folder that is removed)")
    parser.add_argument("--new-tokens", type=int, default=24, help="of an answer, at most; 0: none (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of paragraphs (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as afterwards:
        folder = options.folder or Path(afterwards.enter_context(tempfile.TemporaryDirectory()))
        add_records(_records(options, folder), options)
    return 0


def _records(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    pipeline = R3MemPipeline(options.model, dtype=options.dtype, seed=options.seed)
    shelf = AdapterShelf(folder, pipeline)
    groups = chosen_groups(read_xquad(options.data), options.questions, options.seed)
    if len(groups) < 2:
        raise ValueError("there must be two paragraphs at least: another one is the control")
    paragraphs = [group[0].context for group in groups]
    settings = {name: value for name, value in settings_of(options).items() if name != "folder"}
    unfinished = Unfinished(options.output, settings, batch=1, progress=not options.json)

    def teach(index: int) -> list[float]:
        reports = shelf.remember({f"paragraph {index}": paragraphs[index]}, progress=False)
        return [report.seconds for report in reports.values()]

    seconds = [one for some in unfinished.each("taught", range(len(groups)), teach, "Teaching") for one in some]
    entries = shelf.entries()
    yield {
        "model": Path(options.model).name, "dtype": options.dtype, "new_tokens": options.new_tokens,
        "paragraphs": len(groups), "questions": sum(map(len, groups)),
        "contexts": len(entries), "exact": sum(entry["exact"] for entry in entries),
        "seconds_a_paragraph": round(sum(seconds) / len(seconds), 1) if seconds else None,
        "bytes_a_paragraph": round(sum(_sizes(folder)) / len(groups)),
        "bytes_of_text": round(sum(len(text.encode()) for text in paragraphs) / len(groups)),
    }  # fmt: skip
    asker = _Asker(pipeline, shelf, paragraphs, options.new_tokens)
    yield from _summary(unfinished.each("questions", groups, asker.ask, "Asking"), groups)
    unfinished.remove()


def _sizes(folder: Path) -> Iterator[int]:
    """Bytes of each file of a shelf."""
    return (path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _summary(graded: Sequence[dict[str, dict[str, float]]], groups: Sequence[Sequence[Question]]) -> Iterator[dict]:
    """Records of what was graded.

    Args:
        graded: For each paragraph, by way and measure, the sum over its questions.
        groups: The questions of each paragraph.
    """
    counts = torch.tensor([float(len(group)) for group in groups])
    ways = list(graded[0])
    nats = {way: torch.tensor([group[way]["nats"] for group in graded]) for way in ways}
    for way in ways:
        names = [name for name in _MEASURES if name in graded[0][way]]
        total = {name: sum(group[way][name] for group in graded) / counts.sum().item() for name in names}
        record: dict[str, Any] = {"way": way, **{name: round(value, 4) for name, value in total.items()}}
        if way not in ("nothing", "full"):
            record["share"] = interval(nats["nothing"] - nats[way], nats["nothing"] - nats["full"])
        yield record
    for way in _RECALLED:
        for rival in ("nothing", *_LOOKED_UP):
            yield {"way": way, "better_than": rival, "of": "nats", **interval(nats[rival] - nats[way], counts)}


class _Asker:
    """Asks the questions about a paragraph behind what each way finds for them.

    Args:
        pipeline: Pipeline of the model.
        shelf: What the paragraphs were taught to.
        paragraphs: The paragraphs.
        new_tokens: Tokens of an answer at most.
    """

    def __init__(self, pipeline: R3MemPipeline, shelf: AdapterShelf, paragraphs: Sequence[str], new_tokens: int):
        self._pipeline, self._shelf, self._paragraphs, self._new_tokens = pipeline, shelf, paragraphs, new_tokens
        segmenter = pysbd.Segmenter(language="en", clean=False)
        self._sentences = [found.strip() for text in paragraphs for found in segmenter.segment(text) if found.strip()]
        self._words, self._words_of_sentences = WordIndex(paragraphs), WordIndex(self._sentences)
        self._embed = minilm_embedder()
        self._vectors = self._embed(paragraphs)
        before, _, self._asking = template_of(pipeline.tokenizer, "xquad")
        self._head = pinned_memory(pipeline.model, pipeline.codec.ids(before))

    def ask(self, questions: Sequence[Question]) -> dict[str, dict[str, float]]:
        """Ask the questions about one paragraph; by way and measure, the sum over them."""
        totals: dict[str, dict[str, float]] = {}
        for question in questions:
            found = self._found(question)
            ways = {way: Asked(self._head, self._ids(text, question)) for way, text in found.items()}
            graded = ask_in_each_way(self._pipeline, ways, question.answers, new_tokens=self._new_tokens, until='"')
            for way, text in found.items():
                graded[way] |= {
                    "found": float(bool(text)),
                    "has_answer": contains(text, question.answers),
                    "tokens": float(len(self._pipeline.codec.ids(text))),
                }
            add_grades(totals, graded)
        return totals

    def _found(self, question: Question) -> dict[str, str]:
        """What stands before a question in each way."""
        asked, place = question.question, self._paragraphs.index(question.context)
        near = [self._shelf.find(asked, whole=whole)[0] for whole in (False, True)]
        recalled, by_query, by_document = self._shelf.recall([asked, *near])
        by_meaning = int((self._vectors @ self._embed([asked])[0]).argmax())
        return {
            "nothing": "",
            "full": question.context,
            "another": self._paragraphs[place - 1],
            "bm25": self._paragraphs[self._words.ranked(asked)[0]],
            "minilm": self._paragraphs[by_meaning],
            "bm25+": self._sentences[self._words_of_sentences.ranked(asked)[0]],
            "recalled": recalled,
            "by_query": by_query,
            "by_document": by_document,
        }

    def _ids(self, text: str, question: Question) -> list[int]:
        return self._pipeline.codec.ids(text) + self._pipeline.codec.ids(self._asking(question.question))


if __name__ == "__main__":
    raise SystemExit(main())
