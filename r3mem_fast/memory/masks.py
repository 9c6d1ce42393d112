"""Attention masks with columns for a memory before those of a pass's keys."""

from typing import Any

import torch


def with_memory(
    mask: torch.Tensor | None, visible: torch.Tensor, tokens: int, keys: int, like: torch.Tensor, implementation: str
) -> torch.Tensor:
    """Put columns for a memory before a mask.

    Args:
        mask: `[B or 1, 1, tokens, keys]`, bool or additive; None: it is causal.
        visible: Which slots each query sees, bool `[B, 1 or heads, tokens, N]`.
        tokens: Number of queries of the pass.
        keys: Number of keys, without the memory's.
        like: A tensor of the model's dtype, on its device.
        implementation: Name of the model's attention; "eager" takes additive masks alone.

    Returns:
        `[B, 1 or heads, tokens, N + keys]`, of the mask's dtype.
    """
    known: Any = mask
    if known is None:
        ones = torch.ones(tokens, keys, dtype=torch.bool, device=like.device)
        known = ones.tril(keys - tokens)[None, None]
        if implementation == "eager":
            known = _additive(known, like.dtype)
    if known.dtype != torch.bool:
        visible = _additive(visible, known.dtype)
    return torch.cat([visible, known.expand(*visible.shape[:2], *known.shape[2:])], -1)


def seen(ages: torch.Tensor, later: torch.Tensor, heads: int, window: int | None, uneven: bool) -> torch.Tensor:
    """Whether each query of a pass sees each slot of a memory: bool `[B, heads, T, N]`.

    Args:
        ages: Tokens from each slot to the first one behind the memory, `[B, kv_heads, N]`.
        later: Tokens from that one to each query, `[1 or B, T]`.
        heads: Number of query heads.
        window: Number of keys that a query sees, its own included; None: all.
        uneven: Whether heads have other numbers of slots; where one has none, its age is 0.
    """
    found = ages[:, :, None] > 0 if uneven else torch.ones_like(ages[:, :, None], dtype=torch.bool)
    if window is not None:
        found = found & (ages[:, :, None] + later.to(ages.device)[:, None, :, None] < window)
    return found.expand(-1, -1, later.shape[1], -1).repeat_interleave(heads // ages.shape[1], 1)


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
