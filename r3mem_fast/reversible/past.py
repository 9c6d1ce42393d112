"""Keys and values from before a pass, in the form in which the layers' attention reads them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# Keys and values, `[batch, kv_heads, tokens, head_dim]` each; () if there are none.
States = tuple[torch.Tensor, ...]
# These classes alone: a subclass may keep its states quantised, or elsewhere.
_SUPPORTED = (DynamicLayer, DynamicSlidingWindowLayer)


class MemoryNotReadError(RuntimeError):
    """Not all layers of a pass read the memory before it, or wrote one of their own: its output means nothing."""


class PassCache(DynamicCache):
    """A cache that takes part in every pass of a reversible decoder; `memory.cache.PrefixCache` is one.

    The stack tells it where a pass begins and ends, lets it widen the layers' masks, and gives its keys and values to
    both evaluations of a branch. The methods that raise NotImplementedError here are a subclass's to define.

    Attributes:
        adapted_tokens: Number of tokens at the end of a pass that adapters act on; None: all.
        passes: Number of passes that have ended without an error.
    """

    adapted_tokens: int | None
    passes: int

    @property
    def prefix_length(self) -> int:
        """Number of tokens that every layer reads before the cache's own."""
        raise NotImplementedError

    def begin_pass(
        self, decoder: Any, layers: Sequence[Any], order: Sequence[int], args: tuple, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Begin a call of the decoder.

        Args:
            decoder: The decoder.
            layers: Its layers.
            order: Indices of the layers, in the order in which they run.
            args: Arguments that it is called with.
            kwargs: Keyword arguments that it is called with.

        Returns:
            Keyword arguments to use in place of all of these.

        Raises:
            ValueError: The cache cannot take part in this call.
        """
        raise NotImplementedError

    def end_pass(self) -> None:
        """Check a call of the decoder that has returned.

        Raises:
            MemoryNotReadError: Not all layers read the memory, or wrote one of their own.
        """
        raise NotImplementedError

    def abandon_pass(self) -> None:
        """Forget a call of the decoder that failed."""
        raise NotImplementedError

    def widened(self, mask: Any, hidden: torch.Tensor, layer_idx: int, implementation: str) -> Any:
        """Widen a layer's attention mask by columns for the tokens that are read before the cache's own.

        Args:
            mask: The mask that the model's loop gives the layer, in any form.
            hidden: Input of the layer, `[batch, tokens, width]`.
            layer_idx: Index by which the layer addresses the cache.
            implementation: Name of the attention implementation.

        Returns:
            The mask that the layer is to use.
        """
        raise NotImplementedError

    def past(self, layer_idx: int) -> States:
        """Keys and values of a layer from before this pass, as from `past_of`."""
        raise NotImplementedError

    def extend(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int) -> States:
        """Add a layer's new keys and values.

        Args:
            key_states: New keys, `[batch, kv_heads, tokens, head_dim]`.
            value_states: New values, likewise.
            layer_idx: Index by which the layer addresses the cache.

        Returns:
            All keys and values that the layer's attention is to read.
        """
        raise NotImplementedError


class PassView:
    """Stands in for a `PassCache` in a layer's attention while no gradient is wanted.

    Args:
        cache: The cache.
    """

    def __init__(self, cache: PassCache):
        self._cache = cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> States:
        """Add a layer's new keys and values.

        Args:
            key_states: New keys, `[batch, kv_heads, tokens, head_dim]`.
            value_states: New values, likewise.
            layer_idx: Index by which the layer addresses the cache.
            args: Ignored; caches of transformers take more arguments.
            kwargs: Ignored, likewise.

        Returns:
            All keys and values that the layer's attention is to read.
        """
        return self._cache.extend(key_states, value_states, layer_idx)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class PastKeysValues:
    """Stands in for a cache in one layer's attention, in both evaluations of a branch; it never changes the cache.

    Args:
        past: Keys and values from before this pass, `[batch, kv_heads, tokens, head_dim]` each; () if there are none.

    Attributes:
        past: Keys and values from before this pass.
        new: Keys and values of this pass, which the caller writes into the real cache, once.
    """

    def __init__(self, past: States):
        self.past = past
        self.new: States = ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> States:
        """Keep a layer's new keys and values in `new`.

        Args:
            key_states: New keys, `[batch, kv_heads, tokens, head_dim]`.
            value_states: New values, likewise.
            layer_idx: Ignored; this object is for one layer.
            args: Ignored; caches of transformers take more arguments.
            kwargs: Ignored, likewise.

        Returns:
            Past and new keys and values together, as the cache would return them.
        """
        self.new = (key_states, value_states)
        if not self.past:
            return self.new
        return tuple(torch.cat(pair, dim=-2) for pair in zip(self.past, self.new, strict=True))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"while gradients are on, a reversible layer's cache has no {name!r}; pass use_cache=False"
        )


def past_of(cache: Any, layer_idx: int) -> States:
    """Keys and values that a cache holds for a layer.

    Args:
        cache: A `PassCache`, or a `DynamicCache` of transformers.
        layer_idx: Index by which the layer addresses the cache.

    Returns:
        `(keys, values)`, each `[batch, kv_heads, tokens, head_dim]`; () if it holds none.

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
    """Index by which a layer's attention addresses its cache.

    Args:
        layer: The decoder layer.

    Raises:
        TypeError: No module of the layer has a `layer_idx`, which is `layer_id` in GPT-Neo.
    """
    for module in layer.modules():
        index = getattr(module, "layer_idx", getattr(module, "layer_id", None))
        if isinstance(index, int):
            return index
    raise TypeError(f"{type(layer).__name__} does not say its place in the cache (layer_idx); pass use_cache=False")


def memory_cache(kwargs: dict[str, Any]) -> "PassCache | None":
    """The `PassCache` among the keyword arguments of a layer or a decoder; None if there is none."""
    return next((value for value in kwargs.values() if isinstance(value, PassCache)), None)


def viewed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a layer, with a `PassView` in place of a `PassCache`."""
    return {name: PassView(value) if isinstance(value, PassCache) else value for name, value in kwargs.items()}


def append_to(cache: Any, keys: torch.Tensor, values: torch.Tensor, layer_idx: int) -> States:
    """Write a layer's new keys and values into a cache.

    Args:
        cache: A `PassCache`, or a `DynamicCache` of transformers.
        keys: New keys, `[batch, kv_heads, tokens, head_dim]`.
        values: New values, likewise.
        layer_idx: Index by which the layer addresses the cache.

    Returns:
        All keys and values that the cache holds for the layer.
    """
    if isinstance(cache, PassCache):
        return cache.extend(keys, values, layer_idx)
    return cache.update(keys, values, layer_idx)
