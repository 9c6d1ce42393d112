"""What layers keep of before a pass, in the form in which they read it: keys and values, states of recurrences."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..integrations.compat import (
    DYNAMIC_RECURRENT_LAYERS,
    has_recurrent_layers,
    is_recurrent,
    recurrent_states,
    set_recurrent_states,
)

# Keys and values, `[batch, kv_heads, tokens, head_dim]` each; () if there are none.
States = tuple[torch.Tensor, ...]
# What a layer keeps, by name: "keys" and "values" as above; of a recurrent or convolutional layer its states, such as
# "conv.0" and "recurrent.0", `[batch, ...]`.
Past = dict[str, torch.Tensor]
# These classes alone: a subclass may keep its states quantised, or elsewhere.
_SUPPORTED = (DynamicLayer, DynamicSlidingWindowLayer, *DYNAMIC_RECURRENT_LAYERS)


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
        """Keys and values of a layer from before this pass; () if there are none."""
        raise NotImplementedError

    def carried(self, layer_idx: int) -> Past:
        """The states of a recurrent layer from before this pass."""
        raise NotImplementedError

    def carry(self, states: Mapping[str, torch.Tensor], layer_idx: int) -> None:
        """Take over a recurrent layer's new states.

        Args:
            states: The states, named as in `Past`.
            layer_idx: Index by which the layer addresses the cache.
        """
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
    """Stands in for a cache in one layer, in both evaluations of a branch; it never changes the cache.

    Args:
        past: What the layer keeps from before this pass; empty if it has read nothing.
        tokens: Number of the cache's own tokens before this pass.

    Attributes:
        past: What the layer keeps from before this pass.
        new: What the caller writes into the real cache, once: keys and values of this pass, and states after it.
    """

    def __init__(self, past: Past, tokens: int):
        self.past, self._tokens = past, tokens
        self.new: Past = {}

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
        self.new |= {"keys": key_states, "values": value_states}
        if "keys" not in self.past:
            return key_states, value_states
        return tuple(torch.cat([self.past[name], self.new[name]], dim=-2) for name in ("keys", "values"))

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The last inputs of a convolution, `[batch, channels, kernel]`; None if it has read nothing."""
        return self.past.get(f"conv.{state_idx}")

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The state of a recurrence, `[batch, ...]`; None if it has read nothing."""
        return self.past.get(f"recurrent.{state_idx}")

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Keep the last inputs of a convolution in `new`.

        Args:
            conv_states: New inputs, `[batch, channels, tokens]`.
            layer_idx: Ignored; this object is for one layer.
            state_idx: Which of the layer's convolutions it is.
            conv_kernel_size: How many inputs are kept; None: as many as before, or as there are now.
            kwargs: Ignored; caches of transformers take more arguments.

        Returns:
            What the convolution is to read, `[batch, channels, kernel + tokens]`: inputs from before this pass too, if
            there are any.
        """
        name = f"conv.{state_idx}"
        known = self.past.get(name)
        if known is None:
            size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            missing = max(0, size - conv_states.shape[-1])
            whole = torch.nn.functional.pad(conv_states, (missing, 0))
        else:
            size, whole = known.shape[-1], torch.cat([known, conv_states], dim=-1)
        self.new[name] = whole[..., whole.shape[-1] - size :]
        return whole

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Keep the state of a recurrence in `new`, and return it; its arguments are as in `update_conv_state`."""
        self.new[f"recurrent.{state_idx}"] = recurrent_states
        return recurrent_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of the cache's own tokens before this pass, by which Llama 4 scales its queries."""
        return self._tokens

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether states must not be changed in place, by which a layer would escape `update_conv_state`: always."""
        return True

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"while gradients are on, a reversible layer's cache has no {name!r}; pass use_cache=False"
        )


def past_of(cache: Any, layer_idx: int) -> Past:
    """What a cache holds for a layer.

    Args:
        cache: A `PassCache`, or a `DynamicCache` of transformers.
        layer_idx: Index by which the layer addresses the cache.

    Returns:
        Keys and values, and states of a recurrence; nothing for a layer that has read nothing.

    Raises:
        TypeError: The cache's states cannot simply be concatenated.
    """
    if isinstance(cache, PassCache):
        keys_and_values = dict(zip(("keys", "values"), cache.past(layer_idx), strict=False))
        return {**keys_and_values, **cache.carried(layer_idx)}
    layers = getattr(cache, "layers", None)
    if layers is None or any(type(layer) not in _SUPPORTED for layer in layers):
        kinds = sorted({type(layer).__name__ for layer in layers or () if type(layer) not in _SUPPORTED})
        raise TypeError(
            f"while gradients are on, a reversible model reads and writes a DynamicCache only, not a "
            f"{type(cache).__name__}{f' with {kinds}' if kinds else ''}; pass use_cache=False, or run under "
            "torch.no_grad()"
        )
    if layer_idx >= len(layers):
        return {}
    layer = layers[layer_idx]
    found = dict(recurrent_states(layer)) if is_recurrent(layer) else {}
    if hasattr(layer, "get_seq_length") and layer.get_seq_length():
        found |= {"keys": layer.keys, "values": layer.values}
    return found


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


def goes_without_cache(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a decoder that nobody gave a cache is to make none of its own in a pass with gradients.

    Args:
        decoder: The decoder.
        args: Arguments that it is called with.
        kwargs: Keyword arguments that it is called with.
    """
    if decoder.training:  # a cache would keep every layer's keys and values beyond the backward pass
        return True
    # Recurrent layers change the states that they keep in place, some of them in the layer itself, where a second
    # evaluation would go on from what the first has left.
    return has_recurrent_layers(decoder.config) and any(
        isinstance(tensor, torch.Tensor) and tensor.requires_grad
        for tensor in (*decoder.parameters(), *tree_leaves([args, kwargs]))
    )


def memory_cache(kwargs: dict[str, Any]) -> "PassCache | None":
    """The `PassCache` among the keyword arguments of a layer or a decoder; None if there is none."""
    return next((value for value in kwargs.values() if isinstance(value, PassCache)), None)


def viewed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a layer, with a `PassView` in place of a `PassCache`."""
    return {name: PassView(value) if isinstance(value, PassCache) else value for name, value in kwargs.items()}


def append_to(cache: Any, new: Past, layer_idx: int) -> None:
    """Write what a layer keeps of a pass into a cache.

    Args:
        cache: A `PassCache`, or a `DynamicCache` of transformers.
        new: New keys and values, and states that take the place of those before.
        layer_idx: Index by which the layer addresses the cache.
    """
    states = {name: state for name, state in new.items() if name not in ("keys", "values")}
    if "keys" in new:
        add = cache.extend if isinstance(cache, PassCache) else cache.update
        add(new["keys"], new["values"], layer_idx)
    if not states:
        return
    if isinstance(cache, PassCache):
        cache.carry(states, layer_idx)
    else:
        set_recurrent_states(cache.layers[layer_idx], states)
