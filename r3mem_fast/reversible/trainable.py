"""Says what in a layer's pass wants a gradient."""

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ..integrations.compat import cache_name
from ..integrations.peft import adapter_parameters
from .past import layer_index, memory_cache, past_of


def idle_parameters(layer: Any, kwargs: dict[str, Any]) -> set[int]:
    """Find the parameters of a layer that have no part in a pass: its adapters', if they act on no token.

    Args:
        layer: The layer.
        kwargs: Keyword arguments that it is called with.

    Returns:
        Their identities (`id`).
    """
    cache = memory_cache(kwargs)
    acts_on_none = cache is not None and cache.adapted_tokens == 0
    return adapter_parameters(layer.reversible.adapters) if acts_on_none else set()


def is_differentiated(layer: torch.nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any], idle: set[int]) -> bool:
    """Whether a gradient may be wanted of a layer's pass: of its input, its arguments, its past or its parameters.

    Args:
        layer: The layer.
        hidden: Its input.
        kwargs: Keyword arguments that it is called with.
        idle: Identities of parameters that have no part in the pass.
    """
    if not torch.is_grad_enabled():
        return False
    if hidden.requires_grad or any(p.requires_grad and id(p) not in idle for p in layer.parameters()):
        return True
    memory, name = memory_cache(kwargs), cache_name(kwargs)
    cached = None if name is None else kwargs[name]
    past = tree_leaves([list(vars(kept).values()) for kept in getattr(cached, "layers", ())])
    past += [] if memory is None else past_of(memory, layer_index(layer)).values()
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in [*tree_leaves(kwargs), *past])
