"""Keys and values from before a pass, as the two evaluations of a branch and plain inference see them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# Keys and values, `[batch, kv_heads, tokens, head_dim]` each, or ().
States = tuple[torch.Tensor, ...]
# Exactly these: a subclass may keep its states quantised, or elsewhere.
_SUPPORTED = (DynamicLayer, DynamicSlidingWindowLayer)


class MemoryNotReadError(RuntimeError):
    """Layers of a pass behind a memory did not all read it, or not all wrote theirs: its output means nothing."""


class PassCache(DynamicCache):
    """A cache that takes part in every pass of a reversible decoder; `memory.cache.PrefixCache` is one.

    The stack tells it where a pass begins and ends, widens the layers' masks by it, and gives its keys and values to
    both evaluations of a branch.

    Attributes:
        adapted_tokens: Number of trailing tokens of a pass that adapters act on; None means all.
        passes: Passes that have ended as they should.
    """

    adapted_tokens: int | None
    passes: int

    @property
    def prefix_length(self) -> int:
        """Tokens that every layer reads before the cache's own."""
        raise NotImplementedError

    def begin_pass(
        self, decoder: Any, layers: Sequence[Any], order: Sequence[int], args: tuple, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Keyword arguments for a decoder's call with these arguments. May raise ValueError, to refuse it."""
        raise NotImplementedError

    def end_pass(self):
        """Check a decoder's call that has returned; raises MemoryNotReadError."""
        raise NotImplementedError

    def abandon_pass(self):
        """Forget a decoder's call that failed."""
        raise NotImplementedError

    def widened(self, mask: Any, hidden: torch.Tensor, layer_idx: int, implementation: str) -> Any:
        """A layer's attention mask, with columns for what is read before the cache's own tokens."""
        raise NotImplementedError

    def past(self, layer_idx: int) -> States:
        """Keys and values before those of this pass, as `past_of` returns them."""
        raise NotImplementedError

    def extend(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int) -> States:
        """Take over a layer's new keys and values; returns all that its attention is to see."""
        raise NotImplementedError


class PassView:
    """What a layer's attention is given in place of a `PassCache` while no gradient is wanted."""

    def __init__(self, cache: PassCache):
        self._cache = cache

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs) -> States:
        """Take over a layer's new keys and values; returns all that its attention is to see."""
        return self._cache.extend(key_states, value_states, layer_idx)

    def __getattr__(self, name):
        return getattr(self._cache, name)


class PastKeysValues:
    """What one layer's attention sees of a cache: the keys and values before this forward pass, read only.

    It stands in for the cache in both evaluations of a branch.

    Args:
        past: (), or (keys, values), each `[batch, kv_heads, tokens, head_dim]`.

    Attributes:
        new: Keys and values of this pass, for the caller to write into the real cache once.
    """

    def __init__(self, past: States):
        self.past = past
        self.new: States = ()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs) -> States:
        """Past and new states, as the cache would return them; leaves the new ones in `new`."""
        self.new = (key_states, value_states)
        if not self.past:
            return self.new
        return tuple(torch.cat(pair, dim=-2) for pair in zip(self.past, self.new, strict=True))

    def __getattr__(self, name):
        raise AttributeError(
            f"while gradients are on, a reversible layer's cache has no {name!r}; pass use_cache=False"
        )


def past_of(cache: Any, layer_idx: int) -> States:
    """Keys and values that a cache holds for a layer: () or a pair, `[batch, kv_heads, tokens, head_dim]` each.

    Raises:
        TypeError: The cache's states cannot simply be concatenated.
    """
    if isinstance(cache, PassCache):
        return cache.past(layer_idx)
    layers = getattr(cache, "layers", None)
    if layers is None or any(type(layer) not in _SUPPORTED for layer in layers):
        raise TypeError(
            f"while gradients are on, a reversible model reads and writes a DynamicCache only, not a "
            f"{type(cache).__name__}; pass use_cache=False, or run under torch.no_grad()"
        )
    if layer_idx >= len(layers) or layers[layer_idx].get_seq_length() == 0:
        return ()
    return layers[layer_idx].keys, layers[layer_idx].values


def layer_index(layer: nn.Module) -> int:
    """The index by which a layer's attention addresses its cache.

    Raises:
        TypeError: The layer does not say it.
    """
    for module in layer.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            return module.layer_idx
    raise TypeError(f"{type(layer).__name__} does not say its place in the cache (layer_idx); pass use_cache=False")


def memory_cache(kwargs: dict[str, Any]) -> "PassCache | None":
    """The `PassCache` among a layer's or decoder's arguments, None if there is none."""
    return next((value for value in kwargs.values() if isinstance(value, PassCache)), None)


def viewed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A layer's arguments, with a `PassCache` among them as its attention is to see it."""
    return {name: PassView(value) if isinstance(value, PassCache) else value for name, value in kwargs.items()}


def append_to(cache: Any, keys: torch.Tensor, values: torch.Tensor, layer_idx: int) -> States:
    """Write a layer's new keys and values into a cache; returns all that it holds for the layer."""
    if isinstance(cache, PassCache):
        return cache.extend(keys, values, layer_idx)
    return cache.update(keys, values, layer_idx)
