"""Questions about texts, put into words that a small model answers."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from .answers_data import Question, template_parts
from .presses import REPEAT

EXAMPLE = (
    "The bridge over the Lune was opened in 1849 by Joseph Locke. It cost 12,000 pounds and carried two tracks until "
    "a storm destroyed it.\n\n"
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """Words around the questions of a data set.

    Attributes:
        instruction: What is said before each question.
        opener: How each answer begins, which a small model would not do of itself; it ends with the quotation mark.
        new_tokens: Tokens of an answer, at most.
        segment: Tokens of a text that are read, and compressed, at once; None: all.
        examples: Questions about an example's text, and answers, that come before as turns of the conversation.
    """

    instruction: str
    opener: str
    new_tokens: int
    segment: int | None = None
    examples: tuple[tuple[str, str], ...] = ()


KINDS = {
    # Chosen among eight wordings: with it smollm2-135m answers best when it reads the whole text.
    "xquad": Kind(
        "Answer with a short phrase from the text.\n",
        'The answer is "',
        24,
        examples=(
            ("Who opened the bridge?", "Joseph Locke"),
            ("How much did the bridge cost?", "12,000 pounds"),
        ),
    ),
    "qmsum": Kind("Answer the question in two sentences, using the meeting above.\n", "", 64, segment=256),
    "pairs": Kind("Answer with the value from the JSON object above, and nothing else.\n", 'The value is "', 48),
}


@dataclasses.dataclass
class Prompt:
    """Tokens of the questions about one text.

    Attributes:
        questions: The questions.
        before: Tokens before the text, int64 `[1, P]`.
        context: The text, int64 `[1, n]`.
        asked: Tokens of each question and what follows it, up to the answer.
        answers: Tokens of the first reference of each.
        repeat: Tokens that ask for a repetition of the text.
    """

    questions: list[Question]
    before: torch.Tensor
    context: torch.Tensor
    asked: list[list[int]]
    answers: list[list[int]]
    repeat: list[int]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without special tokens at its ends."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def template_of(
    tokenizer: Any, kind: str, instruction: str | None = None, opener: str | None = None
) -> tuple[str, str, Callable[[str], str]]:
    """Put questions about a text into the chat template: return what stands around them, and how to ask.

    Args:
        tokenizer: The tokenizer.
        kind: The data set, whose examples come first.
        instruction: What is said before each question; None: that of the kind.
        opener: How each answer begins; None: that of the kind.

    Returns:
        What stands before the text, and after a user's words; and a function that gives what stands between the text
        and the answer to a question.
    """
    instruction = KINDS[kind].instruction if instruction is None else instruction
    opener = KINDS[kind].opener if opener is None else opener
    closing = '"' if opener.endswith('"') else ""
    turns = [
        (f"{EXAMPLE}{instruction}Question: {question}", f"{opener}{answer}{closing}")
        for question, answer in KINDS[kind].examples
    ]
    before, after = template_parts(tokenizer, turns)
    return before, after, lambda question: f"\n\n{instruction}Question: {question}{after}{opener}"


def prompt_of(options: argparse.Namespace, tokenizer: Any, questions: list[Question]) -> Prompt:
    """Put questions about one text into the chat template."""
    before, after, asking = template_of(tokenizer, options.kind, options.instruction, options.opener)
    context, segment = ids_of(tokenizer, questions[0].context), KINDS[options.kind].segment
    if segment is not None and len(context) > segment:
        # Whole segments, of which each gets its share of the slots: otherwise the last, short one would be matched
        # together with all others.
        context = context[: len(context) // segment * segment]
    asked = [asking(question.question) for question in questions]
    return Prompt(
        questions,
        torch.tensor([ids_of(tokenizer, before)], dtype=torch.int64),
        torch.tensor([context]),
        [ids_of(tokenizer, text) for text in asked],
        [ids_of(tokenizer, question.answers[0]) for question in questions],
        ids_of(tokenizer, REPEAT + after),
    )
