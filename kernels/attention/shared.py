"""Attention of many rows to memories of which several rows may read the same, each memory being read once.

The queries of all rows that read a memory are given to it as queries of one row, so that its keys are loaded once for
all of them (as the shared prefixes of Juravsky et al. 2024, arXiv 2402.05099). What the rows see beside it is merged
into that (`reference.merge`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import ops


class Readers(NamedTuple):
    """Which rows read which memory.

    Attributes:
        rows: Rows that read each of N memories, int64 `[N, G]`; any row where there are fewer than G.
        places: Where each row stands in `rows`, flattened, int64 `[B]`.
    """

    rows: torch.Tensor
    places: torch.Tensor


def readers_of(memories: Sequence[int]) -> Readers:
    """Sort rows by the memory that they read; the result is on the CPU.

    Args:
        memories: The memory of each row, a number from 0; every memory has a row.
    """
    rows: list[list[int]] = [[] for _ in range(max(memories) + 1)]
    for row, memory in enumerate(memories):
        rows[memory].append(row)
    width = max(map(len, rows))
    places = [0] * len(memories)
    for memory, some in enumerate(rows):
        for index, row in enumerate(some):
            places[row] = memory * width + index
    padded = [some + some[:1] * (width - len(some)) for some in rows]
    return Readers(torch.tensor(padded), torch.tensor(places))


def read_shared_memories(
    query: torch.Tensor,
    memory_key: torch.Tensor,
    memory_value: torch.Tensor,
    readers: Readers,
    *,
    memory_lengths: torch.Tensor | None = None,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from the queries of each row to its memory, and to nothing else.

    Args:
        query: `[B, Hq, T, D]`.
        memory_key: Keys of N memories, `[N, Hkv, M, D]`.
        memory_value: Values of the memories, `[N, Hkv, M, D]`.
        readers: Which rows read which memory, as `readers_of` gives it, on the device of the query.
        memory_lengths: int32 `[N]`, number of each memory's last tokens that are read; None: all.
        scale: Factor of `q · k`.
        softcap: c of `c * tanh(scale * q · k / c)`; None for no cap.

    Returns:
        The output, `[B, Hq, T, D]`, and the log-sum-exps, `[B, Hq, T]`, to be merged with those of other keys.
    """
    count, width = readers.rows.shape
    _, heads, tokens, size = query.shape
    shared = memory_key.shape[1]
    # [N, G, Hkv, Hq / Hkv, T, D] to queries of key heads: [N, Hkv, G * Hq / Hkv * T, D]
    grouped = query.index_select(0, readers.rows.flatten()).view(count, width, shared, -1, size)
    folded = grouped.transpose(1, 2).reshape(count, shared, -1, size)
    output, lse = ops.memory_attention(
        folded, None, None, memory_key, memory_value, memory_lengths, None, None, None, scale, 0, softcap or 0.0, 0
    )
    output = output.reshape(count, shared, width, -1, size).transpose(1, 2).reshape(-1, heads, tokens, size)
    lse = lse.reshape(count, shared, width, -1).transpose(1, 2).reshape(-1, heads, tokens)
    return output.index_select(0, readers.places), lse.index_select(0, readers.places)
