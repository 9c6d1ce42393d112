"""Memories of an adapter of anchors, to be read by the base model beside matched ones."""

import dataclasses

import torch

from r3mem_fast import Memory, R3MemModel, R3MemPipeline
from r3mem_fast.memory import MemoryLayout

from .rivals import laid_out


def load_adapter(folder: str, model: R3MemModel, *, anchored: bool = False) -> R3MemModel:
    """Load an adapter with memory tokens.

    Args:
        folder: Its folder.
        model: The model that it is compared with.
        anchored: Whether it must be one of anchors.

    Raises:
        ValueError: It was made of another model, or is none of anchors.
    """
    learned = R3MemPipeline(folder, dtype=str(model.dtype).removeprefix("torch.")).model
    if anchored and not learned.is_anchored:
        raise ValueError(f"{folder} holds no adapter of anchors (memory_writer='anchored')")
    if learned.base_fingerprint() != model.base_fingerprint():
        raise ValueError(f"{folder} was made of another model than the one that it is compared with")
    return learned


def anchored_memory(learned: R3MemModel, ids: torch.Tensor, start: Memory, layout: MemoryLayout) -> Memory:
    """Compress tokens with an adapter of anchors, into a memory that the base model can read.

    Args:
        learned: The model with the adapter.
        ids: Token ids, int64 `[B, T]`.
        start: Memory of what is before them, of B rows.
        layout: Layout of the memory.
    """
    with laid_out(learned, layout):
        before = dataclasses.replace(start, layout=layout, origin=learned.origin())
        memory = learned.compress(ids, memory=before, finish=True)
    return dataclasses.replace(memory, origin=start.origin)
