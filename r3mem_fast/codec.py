"""`TextCodec`: turns texts into token ids, and token ids into texts."""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .data.text import opening_ids
from .fingerprints import tokenizer_fingerprint

# Stand for a user's words in a chat template; no template holds them.
_WORDS = "\u2047words\u2047"


def around_words(tokenizer: Any, turns: Sequence[tuple[str, str]] = ()) -> tuple[str, str]:
    """What a tokenizer's chat template puts before a user's words, and after them, up to the answer.

    Args:
        tokenizer: The tokenizer.
        turns: What a user has said, and what was answered, earlier in the conversation.

    Raises:
        ValueError: The tokenizer has no chat template, or one that changes a user's words.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("the tokenizer has no chat template, so that nothing can stand in a user's turn")
    talk = [
        {"role": role, "content": said}
        for turn in turns
        for role, said in zip(("user", "assistant"), turn, strict=True)
    ]
    talk.append({"role": "user", "content": _WORDS})
    text = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    if text.count(_WORDS) != 1:
        raise ValueError("the tokenizer's chat template does not hold a user's words as they are")
    before, after = text.split(_WORDS)
    return before, after


class TextCodec:
    """Encodes texts of any length as a memory network reads them, and decodes them.

    A piece of a text has no special tokens. The beginning of one has those that the tokenizer puts there (`begun`).

    Args:
        tokenizer: Tokenizer of the model.

    Attributes:
        tokenizer: Tokenizer of the model.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    @functools.cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the tokenizer."""
        return tokenizer_fingerprint(self.tokenizer)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text."""
        # Not verbose, as it would warn about texts that are longer than the model's positions.
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def said(self, text: str) -> list[int]:
        """Token ids of what somebody said: special tokens in it, such as the end of a turn, are mere letters."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids

    def count(self, text: str) -> int:
        """Number of tokens of a text, without special tokens."""
        return len(self.ids(text))

    @functools.cached_property
    def opening(self) -> list[int]:
        """Token ids that the tokenizer puts before a text; often none."""
        return opening_ids(self.tokenizer)

    def begun(self, text: str) -> list[int]:
        """Token ids of a text that nothing stands before: behind `opening`, unless the text itself begins with it."""
        ids = self.ids(text)
        return ids if ids[: len(self.opening)] == self.opening else self.opening + ids

    @functools.cached_property
    def turn(self) -> tuple[list[int], list[int]]:
        """Token ids of what the chat template puts before a user's words, and after them, up to the answer.

        Raises:
            ValueError: The tokenizer has no chat template, or one that changes a user's words.
        """
        before, after = around_words(self.tokenizer)
        return self.ids(before), self.ids(after)

    def histories(
        self, texts: Sequence[str], *, chat: bool, begins: bool, behind: Sequence[int] | None = None
    ) -> tuple[list[list[int]], int]:
        """Token ids of texts that are to be compressed, and how many of them are pinned at the beginning of each.

        In a user's turn special tokens of a text, such as the end of a turn, are mere letters.

        Args:
            texts: The texts.
            chat: Whether each stands in a user's turn.
            begins: Whether nothing stands before them and their first tokens can be pinned, as in a matched memory.
            behind: Pinned tokens of the memory that each goes on from; None: from none.

        Raises:
            ValueError: They cannot stand in a turn.
        """
        if chat:
            before = self.turn[0]
            return [before + self.said(text) for text in texts], len(before)
        if begins:
            return [self.begun(text) for text in texts], len(self.opening)
        of_turns = [False] * len(texts) if behind is None else [self._is_of_turn(count) for count in behind]
        return [
            self.said(text) if of_turn else self.ids(text) for text, of_turn in zip(texts, of_turns, strict=True)
        ], 0

    def read_again(self, texts: Sequence[str], pinned: Sequence[int]) -> list[torch.Tensor]:
        """Token ids of texts that were compressed, int64 `[T]` each, as `histories` gave them.

        Args:
            texts: The texts.
            pinned: Pinned tokens of the memory of each.
        """
        rows = []
        for text, count in zip(texts, pinned, strict=True):
            rows += self.histories([text], chat=self._is_of_turn(count), begins=count > 0)[0]
        return [torch.tensor(row, dtype=torch.int64) for row in rows]

    def prompts(self, prompts: Sequence[str], *, chat: bool | None, pinned: Sequence[int] | None) -> list[list[int]]:
        """Token ids of prompts that are to be continued; special tokens as in `histories`.

        Args:
            prompts: The prompts.
            chat: Whether each stands in a user's turn, which an answer follows; None: if a text before it does, as far
                as that can be known (not of a template with as few tokens before a user's words as before any text).
            pinned: Pinned tokens of the memories before them: as many as stand before a user's words in the template,
                if a memory's text stands in a user's turn. None: there is no memory.

        Raises:
            ValueError: A prompt is empty, or there is none; or it cannot stand in a turn.
        """
        if not prompts or not all(prompts):
            raise ValueError("the prompt is empty")
        if chat is None:
            chat = pinned is not None and any(map(self._is_of_turn, pinned))
        if not chat:
            return [self.begun(text) if pinned is None else self.ids(text) for text in prompts]
        before, after = self.turn
        if pinned is None:
            return [before + self.said(text) + after for text in prompts]
        if any(count != len(before) for count in pinned):
            raise ValueError(
                "a memory's text stands in no user's turn, or in that of another template; compress it with chat=True "
                "(--chat), or ask with chat=False"
            )
        return [self.said(f"\n\n{text}") + after for text in prompts]

    def _is_of_turn(self, pinned: int) -> bool:
        """Whether a memory with so many pinned tokens is of a text in a user's turn, as far as that can be known."""
        if not pinned or getattr(self.tokenizer, "chat_template", None) is None:
            return False
        # Where the template puts as many tokens before a user's words as stand before any text, nothing tells one from
        # the other.
        return pinned == len(self.turn[0]) != len(self.opening)

    def queries(self, queries: str | Sequence[str]) -> list[list[int]]:
        """Token ids of each query. A run of white space counts as a single space.

        Args:
            queries: One query, or several.

        Raises:
            ValueError: A query is empty, or there is none.
        """
        queries = [queries] if isinstance(queries, str) else queries
        rows = [self.ids(re.sub(r"\s+", " ", text).strip()) for text in queries]
        if not rows or not all(rows):
            raise ValueError("the query is empty")
        return rows

    def text(self, ids: torch.Tensor) -> str:
        """The text of token ids, including that of special tokens.

        Args:
            ids: Token ids, int64 `[n]`.
        """
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def texts(self, rows: Iterable[torch.Tensor]) -> list[str]:
        """The text of each row of token ids, including that of special tokens.

        Args:
            rows: Token ids of each row, int64 `[n]`.
        """
        return [self.text(row) for row in rows]

    def continuations(self, rows: torch.Tensor) -> list[str]:
        """The text of each row of token ids, without special tokens.

        Args:
            rows: Token ids, int64 `[B, T]`.
        """
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
