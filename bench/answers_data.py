"""Questions about texts, with answers, from files of public data sets; and how an answer is graded.

The files lie in one folder: `xquad/xquad.en.json` (SQuAD's format), `qmsum/val.jsonl` and
`lost_in_the_middle/kv-retrieval-75_keys.jsonl.gz`, as their authors publish them.
"""

import dataclasses
import gzip
import itertools
import json
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from r3mem_fast.codec import around_words

XQUAD = "xquad/xquad.en.json"
QMSUM = "qmsum/val.jsonl"
PAIRS = "lost_in_the_middle/kv-retrieval-75_keys.jsonl.gz"


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a text.

    Attributes:
        context: The text.
        question: The question.
        answers: References, of which one suffices.
    """

    context: str
    question: str
    answers: tuple[str, ...]


def read_xquad(folder: Path) -> list[Question]:
    """Read the questions of XQuAD, in English: about paragraphs of Wikipedia, answered by a few of their words."""
    articles = json.loads((folder / XQUAD).read_text(encoding="utf-8"))["data"]
    return [
        Question(paragraph["context"], asked["question"], tuple(answer["text"] for answer in asked["answers"]))
        for article in articles
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
    ]


def read_qmsum(folder: Path, length_of: Callable[[str], int], most: int) -> list[Question]:
    """Read the queries of QMSum, about as much of a meeting as `most` tokens hold.

    Args:
        folder: Folder of the data.
        length_of: Number of tokens of a text.
        most: Tokens of a context, at most.

    Returns:
        Queries about a part of a meeting come with the turns of this part, and turns around it; those about all of it
        come with its beginning.
    """
    found = []
    for turns, meeting in meetings(folder):
        lengths = [length_of(turn) for turn in turns]
        for asked in [*meeting["general_query_list"], *meeting["specific_query_list"]]:
            spans = [[int(end) for end in span] for span in asked.get("relevant_text_span", [])]
            first, last = (min(span[0] for span in spans), max(span[1] for span in spans)) if spans else (0, 0)
            window = _window(lengths, min(first, len(turns) - 1), min(last, len(turns) - 1), most)
            found.append(Question("".join(turns[window]), asked["query"], (asked["answer"],)))
    return found


def meetings(folder: Path) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Read the meetings of QMSum.

    Args:
        folder: Folder of the data.

    Yields:
        What was said, a line with the speaker's name each, and the meeting as it is in the file, with its queries.
    """
    for line in (folder / QMSUM).read_text(encoding="utf-8").splitlines():
        meeting = json.loads(line)
        yield [f"{turn['speaker']}: {_spoken(turn['content'])}\n" for turn in meeting["meeting_transcripts"]], meeting


def _spoken(text: str) -> str:
    """Words of a turn, without what a transcriber noted between them."""
    return re.sub(r"\s*\{\w+\}", "", text).strip()


def _window(lengths: Sequence[int], first: int, last: int, most: int) -> slice:
    """Choose turns: from `first` on to `last`, then by turns one after and one before these, as many as fit."""
    start, stop, room = first, first, most
    forward = list(range(last + 1, len(lengths)))
    backward = list(range(first - 1, -1, -1))
    around = [turn for pair in itertools.zip_longest(forward, backward) for turn in pair if turn is not None]
    for turn in [*range(first, last + 1), *around]:
        if lengths[turn] > room:
            break
        room -= lengths[turn]
        start, stop = min(start, turn), max(stop, turn + 1)
    return slice(start, max(stop, start + 1))


def read_pairs(folder: Path, pairs: int, seed: int = 0, characters: int = 36) -> list[Question]:
    """Read key-value retrieval of `lost_in_the_middle`, cut to few pairs.

    Args:
        folder: Folder of the data.
        pairs: Number of pairs of a context: the one that is asked for, at a random place, and the first of the others.
        seed: Seed of the places.
        characters: Characters of a key or a value that stay, of 36.

    Raises:
        ValueError: The data have fewer pairs.
    """
    places = random.Random(seed)
    found = []
    with gzip.open(folder / PAIRS, "rt", encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            others = [pair for pair in record["ordered_kv_records"] if pair[0] != record["key"]][: pairs - 1]
            if len(others) < pairs - 1:
                raise ValueError(f"the data have {len(others) + 1} pairs a context, fewer than {pairs}")
            others.insert(places.randrange(pairs), [record["key"], record["value"]])
            cut = [(key[:characters], value[:characters]) for key, value in others]
            rows = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in cut)
            key, value = record["key"][:characters], record["value"][:characters]
            found.append(Question(f"{{{rows}}}", f'What is the value of the key "{key}"?', (value,)))
    return found


def chosen_groups(questions: Sequence[Question], count: int, seed: int = 0) -> list[list[Question]]:
    """Choose contexts at random, with all their questions, until there are enough of these.

    Args:
        questions: All questions.
        count: Number of questions, at most.
        seed: Seed of the choice.

    Returns:
        The questions of each chosen context; those of the last one that are too many are left out.
    """
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.context, []).append(question)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    return list(_until(order, count))


def _until(groups: Sequence[list[Question]], count: int) -> Iterator[list[Question]]:
    for group in groups:
        if count <= 0:
            return
        yield group[:count]
        count -= len(group)


def normalised(text: str) -> str:
    """Write a text in lower case, without punctuation, articles and double spaces, as SQuAD's evaluation does."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(found: str, answers: Sequence[str]) -> float:
    """Grade words that an answer shares with a reference, from 0 to 1: the best of all references."""
    return max(_f1(normalised(found).split(), normalised(answer).split()) for answer in answers)


def _f1(found: list[str], wanted: list[str]) -> float:
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted)) if shared else float(found == wanted)


def contains(found: str, answers: Sequence[str]) -> float:
    """Tell whether an answer has a reference in it, as 1 or 0."""
    text = normalised(found)
    return float(any(bool(wanted) and wanted in text for wanted in map(normalised, answers)))


def template_parts(tokenizer: Any, turns: Sequence[tuple[str, str]] = ()) -> tuple[str, str]:
    """Return what a tokenizer's chat template puts before a user's words, and after them, up to the answer.

    Args:
        tokenizer: The tokenizer. Without a template the parts are nothing, and the end of the line.
        turns: What a user has said, and what was answered, earlier in the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        return "", "\n"
    return around_words(tokenizer, turns)
