"""LoRA on decoder layers: which modules it adapts, and on which tokens it acts."""

import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import R3MemConfig
from .integrations.peft import adapters_in, renamed_targets
from .reversible.convert import find_decoder_layers

# Models whose kernels take the weight of a state-space mixer's last projection, `out_proj`, past an adapter on it.
# PEFT refuses one in most of them.
_FUSED = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "bamba", "granitemoehybrid", "nemotron_h", "zamba2")


def check_adapters(base: PeftModel, config: R3MemConfig) -> None:
    """Check the adapters that a PeftModel brings.

    Args:
        base: The PeftModel.
        config: Settings of the memory network that it is to become.

    Raises:
        ValueError: They are not of a kind that all directions read alike.
    """
    if base.active_adapter != "default":
        raise ValueError(f"the PeftModel's adapter must be called 'default', not {base.active_adapter!r}")
    if base.active_peft_config.is_prompt_learning:
        raise ValueError(
            "the PeftModel learns a prompt, which some of the methods here would read and others not; use an "
            "adapter inside the layers, such as LoRA"
        )
    if base.active_peft_config.is_adaption_prompt or base.active_peft_config.peft_type == "XLORA":
        raise ValueError(
            f"{base.active_peft_config.peft_type} adapters cannot be turned off layer by layer; use an adapter inside "
            "the layers, such as LoRA"
        )
    if config.adapter_rows == "memory":
        check_tokens_can_be_chosen(base)


def lora_config(base: nn.Module, config: R3MemConfig) -> LoraConfig:
    """Configuration of new adapters for PEFT.

    In some mixtures PEFT takes modules of certain names (`gate_proj` in a dense layer or a shared expert) for what the
    experts' weights were called once, and adapts the experts of all layers in their place. "all-linear" leaves such
    modules out there, and says so.

    Args:
        base: The model that gets them.
        config: Settings of the memory network.

    Raises:
        TypeError: The model's decoder layers are not found.
        ValueError: No linear module has one of the names, or PEFT would adapt the experts where it cannot be done as
            the settings say.
    """
    first_layer = config.first_adapted_layer or 0
    pattern, names = _targets(base, config.target_modules, first_layer)
    settings = {"r": config.lora_r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    made = LoraConfig(task_type="CAUSAL_LM", target_modules=pattern, **settings)
    if renamed_targets(base, made) == pattern:
        return made
    # PEFT rewrites an expression to the last parts of names, in all layers, but leaves lists of names as they are.
    made.target_modules = set(names)
    moved = set(names) - set(renamed_targets(base, made))
    last_parts = ", ".join(sorted({name.rpartition(".")[2] for name in moved}))
    if moved and config.target_modules == "all-linear":
        made.target_modules = set(names) - moved
        warnings.warn(
            f"adapters leave out {last_parts} in the layers of a {type(base).__name__}: PEFT would adapt the experts "
            "in place of modules of these names. To adapt the experts, name them in target_modules",
            stacklevel=2,
        )
    elif moved and (first_layer or config.adapter_rows == "memory" or config.lora_dropout):
        raise ValueError(
            f"PEFT adapts the experts of all layers of a {type(base).__name__} in place of {last_parts}, on all "
            'tokens and without dropout: take first_adapted_layer=0, adapter_rows="all" and lora_dropout=0, or leave '
            "these names out of target_modules"
        )
    return made


def _targets(base: Any, targets: str | Iterable[str], first_layer: int) -> tuple[str, list[str]]:
    """Find the modules that are to be adapted.

    Args:
        base: A causal language model.
        targets: "all-linear" (but what kernels would read past an adapter), or the names of linear modules in a layer,
            in full or their last parts.
        first_layer: Index of the first layer that is adapted; those above it are, too.

    Returns:
        A regular expression that matches the names of these modules and no others, and the names.

    Raises:
        TypeError: The model's decoder layers are not found.
        ValueError: No linear module has one of the names.
    """
    layers = find_decoder_layers(base)[1]
    name_of = {module: name for name, module in base.named_modules()}
    linear = {
        name.removeprefix(f"{name_of[layer]}.")
        for layer in layers
        for name, module in ((name_of[m], m) for m in layer.modules())
        if _is_linear(module)
    }
    if targets != "all-linear":
        wanted = [targets] if isinstance(targets, str) else targets
        linear = {name for name in linear if any(f".{name}".endswith(f".{target}") for target in wanted)}
    elif getattr(base.config, "model_type", None) in _FUSED:
        linear = {name for name in linear if name.rpartition(".")[2] != "out_proj"}
    if not linear:
        raise ValueError(f"target_modules={targets!r} names no linear module of a {type(layers[0]).__name__}")
    holder = name_of[layers[0]].rpartition(".")[0]
    indices = "|".join(str(index) for index in range(first_layer, len(layers)))
    pattern = rf"{re.escape(holder)}\.({indices})\.({'|'.join(re.escape(name) for name in sorted(linear))})"
    return pattern, [name for name in name_of.values() if re.fullmatch(pattern, name)]


# Models' own subclasses of `Linear` that compute the same; others are routers, or linear in groups.
_OWN_LINEAR = ("FalconLinear",)


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is linear, and not a model's own subclass of a linear module that computes something else."""
    if not isinstance(module, (nn.Linear, Conv1D)):
        return False
    kind = type(module)
    own = kind.__module__.startswith(("transformers.models.", "transformers_modules."))
    return not own or kind.forward is nn.Linear.forward or kind.__name__ in _OWN_LINEAR


def check_tokens_can_be_chosen(model: Any) -> None:
    """Check that a model's adapters can act on some tokens alone.

    Args:
        model: A PeftModel.

    Raises:
        ValueError: They are not one adapter, plain LoRA on linear modules of the layers, not merged.
    """
    layers = find_decoder_layers(model)[1]
    inside = {module for layer in layers for module in layer.modules()}
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        chosen = [adapter for adapter in module.active_adapters if adapter in getattr(module, "lora_B", {})]
        plain = module in inside and not module.merged and chosen == list(module.active_adapters)
        plain = plain and not isinstance(
            module, ParamWrapper
        )  # which computes with the weights of these modules alone
        plain = plain and not any(getattr(module, "use_dora", {}).get(adapter) for adapter in chosen)
        plain = plain and all(isinstance(module.lora_B[adapter], nn.Linear) for adapter in chosen)
        if not plain or set(chosen) - {"default"}:
            raise ValueError(
                'adapter_rows="memory" needs one adapter, LoRA on linear modules of the layers alone, not merged; '
                f'{name} has another. Use adapter_rows="all"'
            )


class _ChosenTokens:
    """Forward hook on a LoRA module of a layer: makes its output zero for tokens that adapters do not act on."""

    def __init__(self, link):
        self._link = link

    def __call__(self, module, args, output):
        if self._link.adapted_tokens is None:
            return output
        count, tokens = self._link.adapted_tokens
        if count == tokens:
            return output
        keep = torch.arange(tokens, device=output.device) >= tokens - count
        # Some layers flatten rows and tokens into one dimension.
        rows = output.view(-1, tokens, output.shape[-1])
        return (rows * keep[:, None].to(output.dtype)).view(output.shape)


def let_adapters_choose_tokens(layers: Iterable[Any]) -> None:
    """Let the LoRA modules of layers act on the tokens that `LayerLink.adapted_tokens` says.

    Args:
        layers: Reversible layers with adapters.
    """
    for layer in layers:
        layer.reversible.adapters = adapters_in(layer)
        for name, module in layer.named_modules():
            if name.rpartition(".")[0].endswith("lora_B"):
                module.register_forward_hook(_ChosenTokens(layer.reversible))
