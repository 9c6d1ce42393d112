"""`Room`: the memory of one layer and the tokens behind it in one place, so that a new token copies nothing else."""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..reversible.past import States

# Tokens for which room is made at least.
_LEAST = 64


class Room:
    """Keys and values of one layer, a memory's and those of tokens, in tensors with room for more tokens.

    The layer's own keys and values are views of them. Where they are others, since the cache was cropped or its rows
    changed, everything is copied once.
    """

    def __init__(self) -> None:
        self._states: States = ()
        self._views: States = ()

    def extended(self, own: Any, placed: States, new: States) -> States:
        """Write new tokens behind those of a layer.

        Args:
            own: The layer of the cache, a `DynamicLayer`.
            placed: The memory; () for none.
            new: Keys and values of the new tokens.

        Returns:
            Keys and values of memory and tokens.
        """
        if not own.is_initialized:
            own.lazy_initialization(*new)
        before, count = placed[0].shape[-2] if placed else 0, new[0].shape[-2]
        length = own.get_seq_length()
        known = bool(self._views) and own.keys is self._views[0] and own.values is self._views[1]
        total = before + length + count
        # What was made in inference mode cannot be written to outside of it.
        known = known and self._states[0].is_inference() == torch.is_inference_mode_enabled()
        if not known or self._states[0].shape[-2] < total:
            # Half as much again, so that the copies of a long text take time in proportion to it.
            size = total + max(_LEAST, total // 2)
            self._states = tuple(some.new_empty(*some.shape[:-2], size, some.shape[-1]) for some in new)
            for state, some in zip(self._states, placed, strict=False):
                state[..., :before, :] = some
            for state, some in zip(self._states, (own.keys, own.values) if length else (), strict=False):
                state[..., before : before + length, :] = some
        for state, some in zip(self._states, new, strict=True):
            state[..., total - count : total, :] = some
        own.keys, own.values = self._views = tuple(state[..., before:total, :] for state in self._states)
        return tuple(state[..., :total, :] for state in self._states)


class RoomyLayer(DynamicLayer):
    """A layer of a `DynamicCache` in which new tokens are written behind the others, which stay where they are."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._room = Room()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> States:
        """Add new keys and values, `[B, kv_heads, T, head_dim]` each; returns all of the layer."""
        if key_states.requires_grad or value_states.requires_grad:  # what a graph has saved is not written over
            return super().update(key_states, value_states)
        return self._room.extended(self, (), (key_states, value_states))


def roomy_cache(layers: int) -> DynamicCache:
    """Make an empty `DynamicCache` of so many layers, all of which are `RoomyLayer`."""
    cache = DynamicCache()
    cache.layers = [RoomyLayer() for _ in range(layers)]
    return cache
