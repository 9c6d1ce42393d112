"""Mixtures of experts: which implementation of the experts gives the same bits at every evaluation."""

import warnings
from typing import Any

# transformers' own loop over experts, which adds what they give by `index_add_`: on a GPU, in no fixed order.
_UNORDERED = "eager"
_ORDERED = "grouped_mm"


def order_experts(model: Any, config: Any) -> None:
    """Let a mixture of experts on a GPU add in a fixed order, so that its branches can be evaluated again.

    transformers' `batched_mm` and `grouped_mm` do so, and on a CPU its loop does, too. A model that brings experts of
    its own is left as it is: if its sums have no fixed order, the streams' checksums find it out in the first backward
    pass.

    Args:
        model: A `transformers` model, or a PeftModel of one.
        config: Its text configuration.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(config, "_experts_implementation", None) != _UNORDERED or base.device.type != "cuda":
        return
    if base._can_set_experts_implementation():
        base.set_experts_implementation(_ORDERED)
        warnings.warn(
            f'experts_implementation="{_UNORDERED}" adds in no fixed order on a GPU, so that a branch would not give '
            f'the same bits when it is evaluated again; it is set to "{_ORDERED}"',
            stacklevel=4,
        )
