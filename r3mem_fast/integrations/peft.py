"""Tells a base model's own parameters from those of PEFT's adapters, and turns adapters off for a while."""

import collections
import contextlib
import copy
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from .scoped import temporarily

# Name of the modules of which PEFT trains copies.
_SAVED = "modules_to_save"


def own_parameters(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters of a base model, without those of adapters.

    Args:
        model: A causal language model, or a PeftModel of one.

    Yields:
        Names and parameters. The names are those that the model has without adapters.
    """
    adapter_prefix = _adapter_prefix(model)
    for name, parameter in model.named_parameters():
        if adapter_prefix is not None:
            if adapter_prefix in name or f".{_SAVED}." in name:
                continue
            name = (
                name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
            )
        yield name, parameter


def base_parameters(model: Any) -> list[torch.nn.Parameter]:
    """Those of `own_parameters`, without their names, which take four times as long to make; some may come twice.

    Args:
        model: A causal language model, or a PeftModel of one.
    """
    prefix = _adapter_prefix(model)
    found: list[torch.nn.Parameter] = []
    waiting = [model]
    while waiting:
        module = waiting.pop()
        parameters, modules = module._parameters, module._modules
        if prefix is not None:
            parameters, modules = (
                {name: x for name, x in some.items() if prefix not in name and name != _SAVED}
                for some in (parameters, modules)
            )
        found += [parameter for parameter in parameters.values() if parameter is not None]
        waiting += [child for child in modules.values() if child is not None]
    return found


def _adapter_prefix(model):
    """What is part of the names of adapters' modules or parameters; None for a model without adapters."""
    return getattr(model.base_model, "prefix", "lora_") if isinstance(model, PeftModel) else None


def adapters_are_off(peft_model: Any) -> bool:
    """Whether a model's adapters are off for now, as inside of PEFT's `disable_adapter`."""
    return any(module.disable_adapters for module in peft_model.modules() if isinstance(module, BaseTunerLayer))


# PEFT's, since 0.19: mixtures whose experts were modules in older versions of transformers get other targets.
_CONVERSION = "peft.utils.transformers_weight_conversion"


def renamed_targets(model: Any, config: LoraConfig) -> str | set[str]:
    """Find what PEFT makes of the modules that are to be adapted, before it looks for them.

    Args:
        model: The causal language model that gets adapters.
        config: Their configuration; it stays as it is.

    Returns:
        The `target_modules` that PEFT would look for.
    """
    if importlib.util.find_spec(_CONVERSION) is None:
        return config.target_modules
    config = copy.deepcopy(config)
    convert = importlib.import_module(_CONVERSION).convert_peft_config_for_transformers
    convert(config, model=model, conversions=None)
    return config.target_modules


def adapters_in(module: torch.nn.Module) -> list[Any]:
    """Find the modules of PEFT's adapters in a module; finding them takes longer than switching them.

    Args:
        module: A model with adapters, or one of its layers.
    """
    return [part for part in module.modules() if isinstance(part, BaseTunerLayer)]


def adapter_parameters(adapters: Sequence[Any]) -> set[int]:
    """Identities (`id`) of the parameters of adapters.

    Args:
        adapters: Modules as `adapters_in` finds them.
    """
    parts = (getattr(adapter, name, None) for adapter in adapters for name in adapter.adapter_layer_names)
    return {id(p) for part in parts if isinstance(part, torch.nn.Module) for p in part.parameters()}


@contextlib.contextmanager
def adapters_off(peft_model: PeftModel) -> Iterator[None]:
    """Turn a model's adapters off in the block.

    PEFT's `disable_adapter` computes the same, and looks at every module several times (tens of milliseconds for each
    token that is asked for alone); it also lets all adapters require gradients afterwards.

    Args:
        peft_model: A PeftModel whose adapters are in its layers (see `lora.check_adapters`).

    Yields:
        Nothing.
    """
    with disabled(_switched(peft_model)):
        yield


@contextlib.contextmanager
def adapters_on(peft_model: PeftModel) -> Iterator[None]:
    """Turn a model's adapters on in the block, which is within one of `adapters_off`.

    Args:
        peft_model: A PeftModel.

    Yields:
        Nothing.
    """
    with disabled(_switched(peft_model), are_off=False):
        yield


def _switched(peft_model):
    """Modules of a model that turn their adapters on and off."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [module for module in peft_model.modules() if isinstance(module, kinds)]


@contextlib.contextmanager
def disabled(modules: Sequence[Any], are_off: bool = True) -> Iterator[None]:
    """Turn adapters off, or on, in the block.

    Args:
        modules: Their modules, see `adapters_in`.
        are_off: Whether they are off.

    Yields:
        Nothing.
    """
    others = [module for module in modules if module._disable_adapters != are_off]  # setting takes longer than asking
    try:
        for module in others:
            module._disable_adapters = are_off
        yield
    finally:
        for module in others:
            module._disable_adapters = not are_off


class MergedAdapters:
    """The weights of a model with its active adapters added to them, beside the weights as they were.

    PEFT adds them, in the weights' dtype: what is computed with them is what the adapters give but for that rounding.
    Undoing is exact, because nothing is subtracted; it takes the memory of the adapted weights once more.

    Args:
        peft_model: A PeftModel.

    Raises:
        ValueError: Its adapters are not LoRA on linear modules with weights of their own in floating point, they are
            merged or off already, or a sum is not finite. The model is then as it was.
    """

    def __init__(self, peft_model: PeftModel):
        self._peft_model = peft_model
        self._layers = [module for module in peft_model.modules() if isinstance(module, BaseTunerLayer)]
        self._check()
        self._weights: list[tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor]] = []
        for layer in self._layers:
            own = [(parameter, parameter.data) for parameter in layer.get_base_layer().parameters()]
            try:
                for parameter, original in own:
                    parameter.data = original.clone()  # so that nothing that PEFT does in place reaches the original
                layer.merge(safe_merge=True)
                self._weights += [(parameter, original, parameter.data) for parameter, original in own]
            except RuntimeError as error:  # PEFT's, for an adapter with a bias on a layer that has none
                raise ValueError(f"PEFT cannot merge these adapters: {error}") from error
            finally:
                for parameter, original in own:
                    parameter.data = original
                layer.merged_adapters.clear()

    def _check(self) -> None:
        owners = collections.Counter(
            id(parameter) for module in self._peft_model.modules() for parameter in module._parameters.values()
        )
        if adapters_are_off(self._peft_model):
            raise ValueError("the adapters are off (in disable_adapter of PEFT), and would be merged all the same")
        for layer in self._layers:
            if layer.merged:
                raise ValueError(
                    "PEFT has merged adapters of this model already; unmerge them first (unmerge_adapter)"
                )
            weights = list(layer.get_base_layer().parameters())
            plain = isinstance(layer, Linear) and all(weight.is_floating_point() for weight in weights)
            if not plain or any(owners[id(weight)] > 1 for weight in weights):
                raise ValueError(
                    f"a {type(layer).__name__} on a {type(layer.get_base_layer()).__name__} cannot be merged and "
                    "taken out again: adapters must be LoRA on linear modules whose weights are in floating point, "
                    "and are not shared with other modules"
                )

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Let the model compute with the merged weights in the block, and its adapters nothing: a context manager.

        Whatever would change weights or adapters meanwhile (PEFT's methods for that, training, a move to another
        device or dtype) is a RuntimeError.
        """
        refused = dict.fromkeys(_CHANGING, _refuse)
        with disabled(self._layers), temporarily(self._peft_model, **refused, train=self._train):
            self._swap(merged=True)
            try:
                yield
            finally:
                self._swap(merged=False)

    def _train(self, mode: bool = True) -> Any:
        return _refuse() if mode else type(self._peft_model).train(self._peft_model, False)

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


# Methods of a PeftModel that change weights or adapters, or turn these on and off.
_CHANGING = (
    "merge_adapter", "unmerge_adapter", "merge_and_unload", "unload", "disable_adapter", "set_adapter", "load_adapter",
    "delete_adapter", "add_adapter", "_apply",
)  # fmt: skip


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        "the adapters are merged into the weights for now, which nothing may train, move or change: leave the block "
        "of merged_adapters() first; inside of it the base model is had by disable_adapters() of the R3MemModel"
    )
