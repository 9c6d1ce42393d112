"""Reference models of preference training: made from the model that is trained, and compared with it.

DPO and its kin compare the log-probabilities of a model with those of a reference that does not learn. Before the
first step both have to be one network. A reversible network is not quite the network that it was made from, so the
ordinary model is no reference for it: losses would be shifted from the first step on, without an error.
"""

import copy
import sys
import warnings
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import nn

from .stack import ReversibleStack
from .untraced import untraced

ModelT = TypeVar("ModelT", bound=nn.Module)


def reference_model(model: ModelT, *, share_frozen: bool = True) -> ModelT:
    """Copy a model as it is now, to be a trainer's `ref_model`: the same network, frozen, in eval mode.

    Call it before the trainer is made. A PEFT model that `make_reversible` has changed needs no such copy: TRL's
    trainers turn its adapters off, and what is left is the same reversible network.

    Args:
        model: A model that `make_reversible` has changed, an `R3MemModel`, or any other module.
        share_frozen: Whether parameters that require no gradient are those of the model itself, so that the copy takes
            the memory of what learns alone. Set it to False for FSDP, which shards each model's parameters.

    Returns:
        The copy.

    Raises:
        ValueError: The `forward` of the model has been replaced already, as trainers do, and the copy would run the
            original's.
    """
    if "forward" in vars(model):
        raise ValueError(
            f"the forward of this {type(model).__name__} has been replaced on the instance (by a trainer, say), and a "
            "copy would run the original's: call reference_model(model) before the trainer is made"
        )
    shared = {id(p): p for p in model.parameters() if not p.requires_grad} if share_frozen else {}
    reference = copy.deepcopy(model, shared)
    for parameter in reference.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)
    return reference.eval()


class ReferenceCheck:
    """Forward pre-hook of a decoder: warns once if a trainer compares it with a reference of another network.

    TRL's trainers make such a reference themselves, from the name of the model, where none is given; no method of the
    model is told of it, so the trainer is looked for among the callers of a pass in training.

    Args:
        stack: The stack of the model.
    """

    def __init__(self, stack: ReversibleStack):
        self._stack, self._done = stack, False

    @untraced
    def __call__(self, decoder: nn.Module, args: tuple) -> None:
        """Look for a trainer with a reference.

        Args:
            decoder: The decoder.
            args: Arguments that it is called with.
        """
        # Only TRL's trainers have references, and only a pass in training is one of the model that learns.
        if self._done or "trl" not in sys.modules or not (decoder.training and torch.is_grad_enabled()):
            return
        trainer = _trainer_with_reference(sys._getframe(1))
        if trainer is None:
            return
        self._done = True
        if reason := self._difference(trainer.model, trainer.ref_model):
            warnings.warn(
                f"the reference of this {type(trainer).__name__} {reason}, so that their log-probabilities differ "
                "before anything has been learned. Give it ref_model=reference_model(model), made before the trainer. "
                "One that takes no ref_model: make_reversible(trainer.ref_model, coupling), or beta=0, or, for an "
                "R3MemModel, trainer.ref_model = reference_model(model), and add_fused_lm_head of TRL on it "
                "(docs/compatibility.md). Adapters (a peft_config) need no ref_model",
                stacklevel=2,
            )

    def _difference(self, model: nn.Module, reference: nn.Module) -> str | None:
        """What a reference computes other than the model that is trained; None if it is the same network."""
        if _memory_settings(model) != _memory_settings(reference):
            return "is no R3MemModel with the settings of the model that is trained"
        links: Any = (vars(module).get("reversible") for module in reference.modules())
        stack = next((link.stack for link in links if hasattr(link, "stack")), None)
        if stack is None:
            return "is not reversible, and the model that is trained is"
        chosen = {stack.fraction_bits, self._stack.fraction_bits} - {None}  # None: chosen in the first pass
        if stack.route.updates != self._stack.route.updates or len(chosen) > 1:
            return "is reversible with another coupling than the model that is trained"
        return None


def _trainer_with_reference(frame: FrameType | None) -> Any:
    """The trainer among the callers that has a model and a reference; None if there is none."""
    while frame is not None:
        # No other frame's locals are asked for: that keeps them alive as they are now until the frame is left.
        if frame.f_globals.get("__name__", "").partition(".")[0] == "trl":
            owner = frame.f_locals.get("self")
            if isinstance(vars(owner).get("ref_model") if hasattr(owner, "__dict__") else None, nn.Module):
                return owner
        frame = frame.f_back
    return None


def _memory_settings(model: nn.Module) -> Any:
    """Settings of the `R3MemModel` that a model is, or wraps; None without one."""
    found = (vars(module).get("r3mem_config") for module in model.modules())
    return next((config for config in found if config is not None), None)
