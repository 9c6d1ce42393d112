"""Rivals of matched memories with as many slots: other choices of keys, and values that stay what they are."""

import contextlib
from collections.abc import Iterator

import torch

from r3mem_fast import R3MemModel
from r3mem_fast.integrations.scoped import temporarily
from r3mem_fast.memory import MemoryLayout
from r3mem_fast.memory.writers import matching


@contextlib.contextmanager
def laid_out(model: R3MemModel, layout: MemoryLayout) -> Iterator[None]:
    """Let a model make and read memories of a layout in the block: a context manager."""
    with temporarily(model, layout=layout), temporarily(model.reader, layout=layout):
        yield


def values_kept() -> contextlib.AbstractContextManager[None]:
    """Let kept keys stay what they are, with their values, in the block: a context manager."""

    def moved_by_nothing(query: torch.Tensor, missing: torch.Tensor, key_heads: int, scale: float) -> torch.Tensor:
        return torch.zeros(len(query), key_heads, query.shape[-1], device=query.device)

    def unchanged(gram: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(residual), gram.new_ones(gram.shape[:2], dtype=torch.bool)

    return temporarily(matching, solved=unchanged, move_for_mass=moved_by_nothing)


@contextlib.contextmanager
def evenly_spaced() -> Iterator[None]:
    """Keep evenly spaced keys, beside the pinned ones, with their values in the block: a context manager.

    All rows must have as many keys, as the rows of a benchmark's batch do.
    """

    def spaced(scores: torch.Tensor, positions: torch.Tensor, limit: int) -> torch.Tensor:
        # Keys that exist have the first places in this order.
        order = (positions < 0).to(torch.int8).sort(dim=-1, stable=True).indices
        count, pinned = int((positions[0, 0] >= 0).sum()), int((scores[0, 0] == torch.inf).sum())
        chosen = min(limit, count) - pinned
        steps = torch.linspace(pinned, count - 1, chosen).round().long()
        return order[..., torch.cat([torch.arange(pinned), steps])]

    with values_kept(), temporarily(matching, best_places=spaced):
        yield
