"""Key-value caches while gradients are on: seen alike by both evaluations, written once, differentiable."""

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Exactly these: a subclass may keep its states quantised, or elsewhere.
_SUPPORTED = (DynamicLayer, DynamicSlidingWindowLayer)


class PastKeysValues:
    """What one layer's attention sees of a cache: the keys and values before this forward pass, read only.

    It stands in for the cache in both evaluations of a branch. `update` returns past and new states as the cache
    would, and leaves the new ones in `new`, for the caller to write into the real cache once.
    past: (), or (keys, values), each `[batch, kv_heads, tokens, head_dim]`.
    """

    def __init__(self, past):
        self.past, self.new = past, ()

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.new = (key_states, value_states)
        if not self.past:
            return self.new
        return tuple(torch.cat(pair, dim=-2) for pair in zip(self.past, self.new, strict=True))

    def __getattr__(self, name):
        raise AttributeError(
            f"while gradients are on, a reversible layer's cache has no {name!r}; pass use_cache=False"
        )


def past_of(cache, layer_idx) -> tuple:
    """Keys and values that `cache` holds for a layer: () or a pair, `[batch, kv_heads, tokens, head_dim]` each.

    Raises TypeError for a cache whose states cannot simply be concatenated.
    """
    layers = getattr(cache, "layers", None)
    if layers is None or any(type(layer) not in _SUPPORTED for layer in layers):
        raise TypeError(
            f"while gradients are on, a reversible model reads and writes a DynamicCache only, not a "
            f"{type(cache).__name__}; pass use_cache=False, or run under torch.no_grad()"
        )
    if layer_idx >= len(layers) or layers[layer_idx].get_seq_length() == 0:
        return ()
    return layers[layer_idx].keys, layers[layer_idx].values
