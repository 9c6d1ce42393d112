"""Conversations that questions are asked about: those of MemoryBank's users, and QMSum's meetings.

The files lie in one folder: `memorybank/memory_bank_en.json` and `memorybank/probing_questions_en.jsonl`, for which
`bench/data` has references, and `qmsum/val.jsonl`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from r3mem_fast import MemoryStore
from r3mem_fast.codec import TextCodec

from .answers_data import meetings

HISTORIES, QUESTIONS = "memorybank/memory_bank_en.json", "memorybank/probing_questions_en.jsonl"
REFERENCES = Path(__file__).parent / "data" / "memorybank_answers.jsonl"
# Words of a piece of a meeting: utterances are put together until there are as many.
_PIECE = 100


@dataclasses.dataclass(frozen=True)
class Talk:
    """A conversation, and questions about it.

    Attributes:
        user: Whose it is; of a meeting its number.
        days: What was said on each day: of each turn the messages, each a role and a text.
        questions: Questions, each with the reference answer.
        speakers: What stands before a message of a role where it is quoted.
    """

    user: str
    days: dict[str, list[list[tuple[str, str]]]]
    questions: list[tuple[str, str]]
    speakers: dict[str, str]

    def turns(self) -> Iterator[tuple[str, list[dict[str, str]]]]:
        """Day and messages of each turn, as a store takes them."""
        for day, turns in self.days.items():
            for turn in turns:
                yield day, [{"role": role, "content": text} for role, text in turn]

    def tokens(self, codec: TextCodec) -> int:
        """Tokens of all messages, without what a template puts around them.

        Args:
            codec: Turns text into tokens.
        """
        return sum(len(codec.ids(message["content"])) for _, messages in self.turns() for message in messages)

    def add_to(self, store: MemoryStore) -> None:
        """Add all turns to a store, one by one."""
        for day, messages in self.turns():
            store.add(messages, user_id=self.user, run_id=day)


def read_memorybank(folder: Path) -> list[Talk]:
    """Read MemoryBank's conversations in English, and the questions with their reference answers.

    Args:
        folder: Folder of the data.

    Raises:
        ValueError: A reference is of another question.
    """
    histories = json.loads((folder / HISTORIES).read_text(encoding="utf-8"))
    days = {
        name.strip(): {
            day: [[("user", turn["query"]), ("assistant", turn["response"])] for turn in turns]
            for day, turns in user["history"].items()
        }
        for name, user in histories.items()
    }
    asked: dict[str, list[str]] = {}
    for line in (folder / QUESTIONS).read_text(encoding="utf-8").splitlines():
        asked |= json.loads(line)
    found: dict[str, list[tuple[str, str]]] = {}
    for line in REFERENCES.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        question = asked[record["user"]][record["index"]]
        if hashlib.sha256(question.encode()).hexdigest()[:16] != record["question_sha256"]:
            raise ValueError(f"question {record['index']} of {record['user']} is another one than the reference's")
        if record["answerable"]:
            found.setdefault(record["user"].strip(), []).append((question, record["answer"]))
    speakers = {"user": "I said: ", "assistant": "You said: "}
    return [Talk(user, days[user], questions, speakers) for user, questions in found.items()]


def read_qmsum(folder: Path) -> list[Talk]:
    """Read QMSum's meetings, with the queries about a part of each.

    A user tells a meeting in pieces of about 100 words, utterances of several speakers each with their names: most of
    them are a few words long, and would be found by none of these.

    Args:
        folder: Folder of the data.
    """
    found = []
    for index, (utterances, meeting) in enumerate(meetings(folder)):
        pieces: list[str] = []
        for utterance in utterances:
            if pieces and len(pieces[-1].split()) < _PIECE:
                pieces[-1] += utterance
            else:
                pieces.append(utterance)
        turns = [[("user", piece.strip())] for piece in pieces]
        questions = [(asked["query"], asked["answer"]) for asked in meeting["specific_query_list"]]
        found.append(Talk(f"meeting {index}", {"meeting": turns}, questions, {"user": ""}))
    return found


def short_enough(talks: Sequence[Talk], codec: TextCodec, most_tokens: int | None) -> list[Talk]:
    """Conversations of a number of tokens at most.

    Args:
        talks: The conversations.
        codec: Turns text into tokens.
        most_tokens: Tokens of all messages of one; None: any.
    """
    return [talk for talk in talks if most_tokens is None or talk.tokens(codec) <= most_tokens]


READERS = {"memorybank": read_memorybank, "qmsum": read_qmsum}
