"""The tensor that holds what memories keep: making it, and appending to it.

Its shape depends on the placement, see `Memory.states`.
"""

from collections.abc import Sequence

import torch

from .layout import MemoryLayout

# Dimensions of the states by placement: `BATCH` counts the rows, `SLOTS` the memory tokens.
BATCH = {"every_layer": 2, "input": 0}
SLOTS = {"every_layer": 4, "input": 1}


def empty_states(
    layout: MemoryLayout, batch: int, sizes: Sequence[int], *, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """States of memories without a segment.

    Args:
        layout: Layout of the memories.
        batch: Number of rows.
        sizes: `(layers, kv_heads, head_dim)`; with placement "input" `(hidden_size,)`.
        dtype: Their dtype.
        device: Their device.

    Returns:
        States as in `Memory`, with N = 0.
    """
    if layout.placement == "input":
        return torch.zeros(batch, 0, *sizes, dtype=dtype, device=device)
    layers, heads, width = sizes
    return torch.zeros(layers, 2, batch, heads, 0, width, dtype=dtype, device=device)


def appended(states: torch.Tensor, written: torch.Tensor, rows: Sequence[int], layout: MemoryLayout) -> torch.Tensor:
    """Append the memory of one more segment to some rows; differentiable.

    Where there is no room left, the memory of the oldest segment is dropped.

    Args:
        states: States of all rows, as in `Memory`.
        written: States of the new segment for `rows` alone, with N = `num_memory_tokens`.
        rows: Indices of the rows that have the new segment.
        layout: Layout of the memories.

    Returns:
        New states of all rows.
    """
    batch, slots = BATCH[layout.placement], SLOTS[layout.placement]
    width = min(states.shape[slots] + layout.num_memory_tokens, layout.first_position)
    indices = uploaded(torch.as_tensor(rows), states.device)
    moved = torch.cat([states.index_select(batch, indices), written], slots)
    moved = moved.narrow(slots, moved.shape[slots] - width, width)
    if len(rows) == states.shape[batch]:
        return moved
    return widened(states, width, layout.placement).index_copy(batch, indices, moved)


def uploaded(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on another device, without waiting for what that device is doing.

    Args:
        tensor: The tensor.
        device: The device.
    """
    if tensor.device.type != "cpu":
        return tensor.to(device)
    # CUDA promises not to wait only where it copies from pinned memory.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def widened(states: torch.Tensor, slots: int, placement: str) -> torch.Tensor:
    """Put zeros before states until they have a given number of memory tokens.

    Args:
        states: States as in `Memory`.
        slots: Memory tokens that the result has, N at least.
        placement: "every_layer" or "input".
    """
    dim = SLOTS[placement]
    shape = list(states.shape)
    shape[dim] = slots - shape[dim]
    return torch.cat([states.new_zeros(shape), states], dim) if shape[dim] else states


def joined_ages(ages: Sequence[torch.Tensor | None], slots: int) -> torch.Tensor | None:
    """Join the ages of several memories.

    Args:
        ages: Ages of each, int32 `[layers, B, kv_heads, N]`; None: the memories have none.
        slots: N of the result.
    """
    found = [given for given in ages if given is not None]
    if not found:
        return None
    return torch.cat([torch.nn.functional.pad(given, (slots - given.shape[-1], 0)) for given in found], 1)
