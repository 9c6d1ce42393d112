"""Finds the parameters that PEFT parametrises while their module runs: `target_parameters`, weights of experts."""

from typing import Any

import torch


def parametrised(module: torch.nn.Module) -> set[int]:
    """Find the parameters that adapters are added to for as long as their module runs.

    PyTorch counts the parametrisation as a change in place, though the values stay what they are: the versions of
    these parameters say nothing.

    Args:
        module: A layer or a model, with adapters or without.

    Returns:
        The `id` of each such parameter.
    """
    # Recognised by what they have, so that who uses no adapters need not import PEFT.
    wrappers: list[Any] = [m for m in module.modules() if "lora_A" in m._modules and "parameter_name" in vars(m)]
    return {id(wrapper.get_param()) for wrapper in wrappers}
