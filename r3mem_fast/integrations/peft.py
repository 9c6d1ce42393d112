"""Tells a base model's own parameters from those of PEFT's adapters, and turns adapters off for a while."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper


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


def adapters_are_off(peft_model: Any) -> bool:
    """Whether a model's adapters are off for now, as inside of PEFT's `disable_adapter`."""
    return any(module.disable_adapters for module in peft_model.modules() if isinstance(module, BaseTunerLayer))


@contextlib.contextmanager
def adapters_off(peft_model: PeftModel) -> Iterator[None]:
    """Turn a model's adapters off in the block.

    PEFT's `disable_adapter` computes the same, and looks at every module several times (tens of milliseconds for each
    token that is asked for alone); it also lets all adapters require gradients afterwards.

    Args:
        peft_model: A PeftModel whose adapters are in its layers: one that learns no prompt.

    Yields:
        Nothing.
    """
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    before = [(module, module.disable_adapters) for module in peft_model.modules() if isinstance(module, kinds)]
    try:
        for module, _ in before:
            module._disable_adapters = True
        yield
    finally:
        for module, was_off in before:
            module._disable_adapters = was_off
