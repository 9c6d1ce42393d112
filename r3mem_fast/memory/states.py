"""The tensor that holds what memories keep: making it, and appending to it.

Its shape depends on the placement, see `Memory.states`.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence

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


def states_at(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Keys and values at some places of each head; differentiable.

    A slot's numbers are copied at one time. `gather`, which takes them one by one, is many times as slow on a CPU.

    Args:
        states: States of placement "every_layer", `[layers, 2, A, kv_heads, N, head_dim]`.
        places: int64 `[layers, A, kv_heads, n]`, from 0 to N - 1.

    Returns:
        `[layers, 2, A, kv_heads, n, head_dim]`.
    """
    *heads, slots, width = states.shape
    first = slots * torch.arange(math.prod(heads), device=states.device).view(*heads, 1)
    chosen = (first + places[:, None]).flatten()
    return states.reshape(-1, width).index_select(0, chosen).view(*heads, places.shape[-1], width)


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


class Constants:
    """Tensors that one run of a step has uploaded, for runs that would upload the same.

    A CUDA graph must not upload: it would copy from the host's memory whatever stands there when it is replayed.
    """

    def __init__(self) -> None:
        self._known: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._next: Iterator[tuple[torch.Tensor, torch.Tensor]] | None = None

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note what is uploaded in the block: a context manager."""
        self._known, self._next = [], None
        with _within(self):
            yield

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Use what has been noted in place of uploads, in the same order: a context manager.

        Raises:
            RuntimeError: In the block: something else would be uploaded.
        """
        self._next = iter(self._known)
        with _within(self):
            yield

    def uploaded(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A tensor on the device: a new one, or the one that was noted. Raises as `used`."""
        if self._next is None:
            self._known.append((tensor.clone(), _uploaded(tensor, device)))
            return self._known[-1][1]
        known, on_device = next(self._next, (None, None))
        if known is None or on_device is None or known.dtype != tensor.dtype or not torch.equal(known, tensor):
            raise RuntimeError("a step uploads other tensors than it did before, so it cannot be one graph")
        return on_device


_constants: contextvars.ContextVar[Constants | None] = contextvars.ContextVar("constants", default=None)


@contextlib.contextmanager
def _within(constants):
    token = _constants.set(constants)
    try:
        yield
    finally:
        _constants.reset(token)


def uploaded(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on another device, without waiting for what that device is doing.

    Args:
        tensor: The tensor.
        device: The device.
    """
    constants = _constants.get()
    if constants is not None and tensor.device.type == "cpu" != device.type:
        return constants.uploaded(tensor, device)
    return _uploaded(tensor, device)


def _uploaded(tensor, device):
    if tensor.device.type != "cpu":
        return tensor.to(device)
    # CUDA promises not to wait only where it copies from pinned memory.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def right_aligned(states: torch.Tensor, width: int) -> torch.Tensor:
    """Put zeros before keys or values until there are so many tokens.

    Args:
        states: Keys or values, `[B, kv_heads, T, head_dim]`.
        width: Tokens that the result has, T at least.
    """
    missing = width - states.shape[2]
    return torch.nn.functional.pad(states, (0, 0, missing, 0)) if missing else states


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


def without_gaps(states: torch.Tensor, ages: torch.Tensor) -> dict[str, torch.Tensor]:
    """Put the slots of heads that have other numbers of them one behind the other, by row, layer and head.

    Args:
        states: States as in `Memory`, of placement "every_layer".
        ages: Their ages, 0 where a head has no slot.

    Returns:
        `states` `[2, n, head_dim]`, `ages` int32 `[n]`, and `head_slots`, the number of each head, int64
        `[B, layers, kv_heads]`.
    """
    states, ages = states.permute(1, 2, 0, 3, 4, 5), ages.transpose(0, 1)
    exists = ages > 0
    return {"states": states[:, exists], "ages": ages[exists], "head_slots": exists.sum(-1)}


def with_gaps(
    states: torch.Tensor, ages: torch.Tensor, head_slots: torch.Tensor, slots: torch.Tensor, pinned: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put slots back to where `without_gaps` took them from: pinned ones first, and the others at the end of a row.

    Args:
        states: See `without_gaps`.
        ages: See there.
        head_slots: See there.
        slots: Slots of the head of each row that has most, int64 `[B]`.
        pinned: How many of them are pinned, int64 `[B]`.

    Returns:
        States and ages as in `Memory`.

    Raises:
        ValueError: The numbers do not fit together.
    """
    width = int(slots.max()) if len(slots) else 0
    counts = head_slots.to(states.device)[..., None]
    slots, pinned = (some.to(states.device)[:, None, None, None] for some in (slots, pinned))
    # What fills up a layer with fewer heads than others has none.
    right = (counts == 0) | ((pinned <= counts) & (counts <= slots))
    if not (int(head_slots.sum()) == len(ages) == states.shape[1] and right.all()):
        raise ValueError("its heads have other numbers of slots than it says")
    place = torch.arange(width, device=states.device) - (width - slots)
    exists = (place >= 0) & ((place < pinned) | (place >= slots - (counts - pinned))) & (counts > 0)
    shape = (2, *exists.shape, states.shape[2])
    found, found_ages = states.new_zeros(shape), ages.new_zeros(exists.shape)
    found[:, exists], found_ages[exists] = states, ages
    return found.permute(2, 0, 1, 3, 4, 5).contiguous(), found_ages.transpose(0, 1).contiguous()
