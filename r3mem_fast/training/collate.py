"""Makes batches of token ids from context–query pairs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PairCollator:
    """Turns a list of pairs into the arguments of `R3MemModel.forward`, padded on the right."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Take the tokenizer.

        Args:
            tokenizer: Tokenizer of the model.
        """
        self._tokenizer = tokenizer

    def __call__(self, pairs: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Args:
            pairs: B pairs: each a `hierarchy.Pair`, or anything else with the strings `context` and `query` as
                attributes or keys. An empty context says that there is none for the query.

        Returns:
            int64 `[B, T]` `input_ids`, `attention_mask`, `labels` of the contexts, and `[B, Q]` `query_input_ids`,
            `query_attention_mask`.

        Raises:
            ValueError: There is no pair, or a pair has an empty query.
        """
        if not pairs:
            raise ValueError("there is no pair to make a batch of")
        rows = [(self._ids(pair, "context"), self._ids(pair, "query")) for pair in pairs]
        return collate_ids(rows)

    def _ids(self, pair: Any, name: str) -> list[int]:
        text = pair[name] if isinstance(pair, dict) else getattr(pair, name)
        ids = self._tokenizer(text, add_special_tokens=False).input_ids if text else []
        if name == "query" and not ids:
            raise ValueError("a pair has an empty query")
        return ids


def collate_ids(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, torch.Tensor]:
    """Make the arguments of `R3MemModel.forward` from token ids, padded on the right.

    Args:
        rows: For each of B batch items, `(context ids, query ids)`.

    Returns:
        int64 `[B, T]` `input_ids`, `attention_mask`, `labels` (-100 at padding) of the contexts, and `[B, Q]`
        `query_input_ids`, `query_attention_mask`.
    """
    input_ids, mask = padded([context for context, _ in rows])
    queries, query_mask = padded([query for _, query in rows])
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": input_ids.masked_fill(mask == 0, -100),
        "query_input_ids": queries,
        "query_attention_mask": query_mask,
    }


def padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad lists of token ids on the right with 0.

    Args:
        rows: B lists of token ids.

    Returns:
        Ids and mask, int64 `[B, longest]`, where `longest` is at least 1. The mask is 1 at tokens and 0 at padding.
    """
    longest = max((1, *map(len, rows)))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[index, : len(row)] = 1
    return ids, mask
