"""A cache with a fixed number of places, of which only the device knows how many are filled: for steps in a graph."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


class FixedLayer(DynamicLayer):
    """A layer of a cache that writes at a place, and gives all of its places: a mask has to hide the others.

    Args:
        keys: Keys of the tokens so far, `[B, kv_heads, n, head_dim]`.
        values: Values of the tokens so far, likewise.
        room: Places in all, n at least.
        place: Place of the next token, int64 `[1]`, on the device; who runs the model moves it on.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, room: int, place: torch.Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self._place = place
        missing = (0, 0, 0, room - keys.shape[2])
        self.keys, self.values = (torch.nn.functional.pad(states, missing) for states in (keys, values))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values of one token, `[B, kv_heads, 1, head_dim]`; returns those of all places."""
        self.keys.index_copy_(2, self._place, key_states)
        self.values.index_copy_(2, self._place, value_states)
        return self.keys, self.values


def fixed_cache(states: Sequence[tuple[torch.Tensor, torch.Tensor]], room: int, place: torch.Tensor) -> DynamicCache:
    """Make a cache of layers that write at a place.

    Args:
        states: Keys and values of each layer's tokens so far.
        room: See `FixedLayer`.
        place: See `FixedLayer`.
    """
    cache = DynamicCache()
    cache.layers = [FixedLayer(keys, values, room, place) for keys, values in states]
    return cache
