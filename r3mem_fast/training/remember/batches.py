"""Batches of contexts and queries by their lengths."""

from collections.abc import Iterable, Sequence

import torch

# Token ids of a context and of its query.
Row = tuple[list[int], list[int]]


def all_predicted(logits: torch.Tensor, targets: torch.Tensor) -> list[bool]:
    """Whether every token that counts is predicted, by row.

    Args:
        logits: `[B, N, V]`.
        targets: int64 `[B, N]`, -100 where none counts.
    """
    return ((logits.argmax(-1) == targets) | (targets == -100)).all(1).tolist()


def length(row: Row) -> int:
    """Tokens that a context takes with its query, with those that separate and end."""
    context, query = row
    return len(context) + len(query) + 3


def by_length(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices of all lengths in batches of at most so many tokens, padding included; like lengths together."""
    return packed(sorted(range(len(lengths)), key=lengths.__getitem__), lengths, tokens)


def packed(indices: Iterable[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices in batches of neighbours, of at most so many tokens, padding included.

    What is longer than that is a batch of its own.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in indices:
        longest = max(longest, lengths[index])
        if batches and longest * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = lengths[index]
    return batches
