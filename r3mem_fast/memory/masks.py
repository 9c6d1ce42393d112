"""Attention masks with columns for a memory before those of a pass's keys."""

from typing import Any

import torch

from .states import uploaded


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


def columns_in_use(ages: torch.Tensor) -> list[torch.Tensor]:
    """Find where some head of a layer has a slot, as the others of a layer need not be read: int64 `[n]` by layer.

    Heads of one layer may have few slots where those of another have many. Asks the device once.

    Args:
        ages: Tokens from each slot to the first one behind the memory, `[layers, B, kv_heads, N]`; 0 for none.
    """
    used = (ages > 0).any(2).any(1)
    return [uploaded(torch.nonzero(row)[:, 0], ages.device) for row in used.cpu()]


def seen(
    visible: torch.Tensor,
    ages: torch.Tensor,
    later: torch.Tensor,
    heads: int,
    window: int | None,
    columns: torch.Tensor | None,
) -> torch.Tensor:
    """Whether each query of a pass sees each slot of a memory: bool `[B, heads, T, n]`.

    Args:
        visible: Which of N slots each row has, bool `[B, 1, T, N]`.
        ages: Tokens from each slot to the first one behind the memory, `[B, kv_heads, N]`; 0 where a head has none.
        later: Tokens from that one to each query, `[1 or B, T]`.
        heads: Number of query heads.
        window: Number of keys that a query sees, its own included; None: all.
        columns: The n of the N slots that the layer has, where heads have other numbers of them; None: all N.
    """
    found = visible.expand(-1, ages.shape[1], -1, -1)
    if columns is not None:
        ages = ages.index_select(-1, columns)
        found = found.index_select(-1, columns) & (ages > 0)[:, :, None]
    if window is not None:
        found = found & (ages[:, :, None] + later.to(ages.device)[:, None, :, None] < window)
    return found.repeat_interleave(heads // ages.shape[1], 1)


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
