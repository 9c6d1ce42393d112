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


class MergedAdapters:
    """The weights of a model with its active adapters added to them, beside the weights as they were.

    PEFT adds them, in the weights' dtype: what is computed with them is what the adapters give but for that rounding.
    Undoing is exact, because nothing is subtracted; it takes the memory of the adapted weights once more.

    Args:
        peft_model: A PeftModel with adapters in its layers.

    Raises:
        ValueError: Adapters are merged already, or a sum is not finite; the model is then as it was.
    """

    def __init__(self, peft_model: PeftModel):
        self._layers = [module for module in peft_model.modules() if isinstance(module, BaseTunerLayer)]
        if any(layer.merged for layer in self._layers):
            raise ValueError("PEFT has merged adapters of this model already; unmerge them first (unmerge_adapter)")
        self._weights: list[tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor]] = []
        for layer in self._layers:
            own = [(parameter, parameter.data) for parameter in layer.get_base_layer().parameters()]
            try:
                for parameter, original in own:
                    parameter.data = original.clone()
                layer.merge(safe_merge=True)
                self._weights += [(parameter, original, parameter.data) for parameter, original in own]
            finally:
                for parameter, original in own:
                    parameter.data = original
                layer.merged_adapters.clear()

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Let the model compute with the merged weights in the block, and its adapters nothing: a context manager."""
        before = [layer._disable_adapters for layer in self._layers]
        try:
            for layer in self._layers:
                layer._disable_adapters = True
            self._swap(merged=True)
            yield
        finally:
            self._swap(merged=False)
            for layer, was_off in zip(self._layers, before, strict=True):
                layer._disable_adapters = was_off

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside of `used`: let the weights be what they were in the block: a context manager."""
        self._swap(merged=False)
        try:
            yield
        finally:
            self._swap(merged=True)

    def _swap(self, merged):
        for parameter, original, with_adapters in self._weights:
            parameter.data = with_adapters if merged else original
