"""The arguments of both operations, bundled: what every implementation of them takes."""

from typing import NamedTuple

import torch


class MatchingInputs(NamedTuple):
    """Queries, and the keys that they ask. None stands for a tensor that is absent.

    B is the number of rows (batch items), H and KV the numbers of query and key heads (query head h reads key head
    `h // (H / KV)`), n and S the numbers of queries and keys, and D the head_dim.

    Attributes:
        query: `[B, H, n, D]`.
        key: `[B, KV, S, D]`.
        value: `[B, KV, S, D]`.
        query_positions: int32 `[B, n]`; negative where a query does not exist.
        key_positions: int32 `[B, KV, S]`; negative where a key does not exist.
        sinks: `[H]`, one logit for each query head that takes part in the softmax and has no value.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    query_positions: torch.Tensor
    key_positions: torch.Tensor
    sinks: torch.Tensor | None = None


class MatchingSettings(NamedTuple):
    """Numbers that define an attention.

    Attributes:
        scale: Factor of `q · k`.
        softcap: c of `c * tanh(scale * q · k / c)`; None for no cap.
        window: A query sees a key only if its own position is less than this behind the key's; None for no limit.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
