"""`TextCodec`: turns texts into token ids, and token ids into texts."""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .fingerprints import tokenizer_fingerprint


class TextCodec:
    """Encodes texts of any length as a memory network reads them, without special tokens, and decodes them.

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

    def count(self, text: str) -> int:
        """Number of tokens of a text, without special tokens."""
        return len(self.ids(text))

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
