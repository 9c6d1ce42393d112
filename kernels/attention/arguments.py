"""The arguments of an attention, bundled: what every implementation of it takes."""

from typing import NamedTuple

import torch


class AttentionInputs(NamedTuple):
    """Tensors that an attention reads. None stands for a tensor that is absent.

    B is the number of rows (batch items), Hq and Hkv the numbers of query and key heads, T, S and M the numbers of
    queries, keys of the segment and memory tokens, and D the head_dim. With `cu_seqlens`, N sequences lie one after
    the other in place of the rows.

    Attributes:
        query: `[B, Hq, T, D]`; `[total, Hq, D]` with `cu_seqlens`.
        key: `[B, Hkv, S, D]`; `[total, Hkv, D]` with `cu_seqlens`; None for a pass over the memory alone.
        value: As `key`.
        memory_key: `[B, Hkv, M, D]`, or `[1, Hkv, M, D]` for one memory that all rows read (N in place of B with
            `cu_seqlens`); None for no memory.
        memory_value: As `memory_key`.
        memory_lengths: int32 `[B]` (or `[N]`); each row reads the last so many memory tokens; None for all.
        segment_starts: int32 `[B]`; keys of the segment before these are padding; None for no padding.
        cu_seqlens: int32 `[N + 1]`, where each sequence starts, and the total; None for rows.
        sinks: `[Hq]`, one logit for each query head that takes part in the softmax and has no value.
    """

    query: torch.Tensor
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None
    memory_key: torch.Tensor | None = None
    memory_value: torch.Tensor | None = None
    memory_lengths: torch.Tensor | None = None
    segment_starts: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    sinks: torch.Tensor | None = None


class AttentionSettings(NamedTuple):
    """Numbers that define an attention.

    Attributes:
        scale: Factor of `q · k`.
        window: Number of keys of the segment that a query sees, its own included; None for all of them. A query sees
            the memory whatever the window.
        softcap: c of `c * tanh(scale * q · k / c)`; None for no cap.
        query_offset: Position of the first query among the segment's keys; where an implementation allows it, an
            integer tensor `[B]`.
        max_seqlen: Length of the longest sequence; needed with `cu_seqlens`, and read only then.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    query_offset: int | torch.Tensor = 0
    max_seqlen: int | None = None
