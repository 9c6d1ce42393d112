"""How the layers of different families rotate keys: pairs of elements that stand side by side, or in two halves."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

# Rotates keys `[B, kv_heads, T, width]` by tables `(cos, sin)`, `[B, T, width]`.
RotaryFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def rotary_function(module: str) -> RotaryFunction:
    """Find the function by which the layers of a module of transformers rotate keys.

    Args:
        module: Name of the module.

    Raises:
        ValueError: The module has none of a name that is known here.
    """
    namespace = vars(sys.modules[module])
    if "apply_rotary_emb" in namespace and "freqs_cis" in _parameters(namespace["apply_rotary_emb"]):
        return rotated_by_pairs  # by products of complex numbers
    function = namespace.get("apply_rotary_pos_emb")
    if function is None:
        raise ValueError(f"{module} has no apply_rotary_pos_emb, so a memory's keys cannot be rotated")
    # DeepSeek V3 rotates pairs that stand side by side, too, but leaves them in halves: those its memory's keys have.
    if _parameters(function)[1] == "cos":  # it takes queries and keys one by one
        return function
    # It rotates queries, too: give it none.
    return lambda keys, cos, sin: function(keys[:, :0], keys, cos, sin)[1]


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def rotated_by_pairs(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of elements that stand side by side.

    Args:
        keys: `[B, kv_heads, T, width]`.
        cos: `[B, T, width]`, the same for both of a pair.
        sin: Likewise.
    """
    pairs = keys.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
    return keys * cos[:, None] + turned * sin[:, None]


def of_pairs(tables: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables `(cos, sin)` of what a rotary embedding gives: these, or complex numbers `[B, T, width / 2]`."""
    if not isinstance(tables, torch.Tensor):
        return tables
    return tables.real.repeat_interleave(2, -1), tables.imag.repeat_interleave(2, -1)


class OwnTables:
    """Stands in for a rotary embedding where layers have tables.

    Args:
        tables: `[positions, width]`, sines in the first half and cosines in the second.
    """

    def __init__(self, tables: torch.Tensor):
        self._tables = tables

    def __call__(self, like: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables `(cos, sin)` of positions, `[B, T, width]`, in the dtype of a tensor and on its device."""
        found = self._tables.to(position_ids.device)[position_ids.abs()].to(like.device, like.dtype)
        sin, cos = found.chunk(2, -1)
        sin = torch.where(position_ids[..., None].to(like.device) < 0, -sin, sin)  # turned back as far
        return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
