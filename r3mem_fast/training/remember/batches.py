"""Makes batches of contexts and queries of like lengths."""

from collections.abc import Iterable, Sequence

import torch

# Token ids of a context, and those of its query.
Row = tuple[list[int], list[int]]


def all_predicted(logits: torch.Tensor, targets: torch.Tensor) -> list[bool]:
    """Tell for each row whether all its tokens are predicted.

    Args:
        logits: Logits `[B, N, V]`.
        targets: Tokens to be predicted, int64 `[B, N]`; -100 where it does not count.
    """
    return ((logits.argmax(-1) == targets) | (targets == -100)).all(1).tolist()


def length(row: Row) -> int:
    """Number of tokens that a context and its query take together, including those that separate and end them."""
    context, query = row
    return len(context) + len(query) + 3


def by_length(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Put items of like lengths into batches.

    Args:
        lengths: Length of each item, in tokens.
        tokens: Tokens of a batch at most, padding included. A longer item is a batch of its own.

    Returns:
        Batches, each a list of indices into `lengths`.
    """
    return packed(sorted(range(len(lengths)), key=lengths.__getitem__), lengths, tokens)


def packed(indices: Iterable[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Put neighbouring items into batches.

    Args:
        indices: Indices of the items, in order.
        lengths: Length of each item, in tokens, by index.
        tokens: Tokens of a batch at most, padding included. A longer item is a batch of its own.

    Returns:
        Batches, each a list of indices.
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
