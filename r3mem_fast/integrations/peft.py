"""Tells a base model's own parameters from those of PEFT's adapters."""

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel


def own_parameters(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters of a base model, without those of adapters.

    Args:
        model: A causal language model, or a PeftModel of one.

    Yields:
        Names and parameters. The names are those that the model has without adapters.
    """
    adapter_prefix = getattr(model.base_model, "prefix", "lora_") if isinstance(model, PeftModel) else None
    for name, parameter in model.named_parameters():
        if adapter_prefix is not None:
            if adapter_prefix in name or ".modules_to_save." in name:
                continue
            name = (
                name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
            )
        yield name, parameter
