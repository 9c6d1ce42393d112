"""Chooses the binary places of the streams by the hidden states of the plain network: `fraction_bits="auto"`."""

import math
from typing import Any

import torch
from torch import nn

from r3mem_fast.kernels.coupling import MAX_FRACTION_BITS

from ..integrations.compat import without_cache, without_new_cache
from .integrity import IntegrityError

# One bit for a velocity larger than every position that was seen, one for a longer or stranger text.
_HEADROOM_BITS = 2


class Observer:
    """Keeps the largest magnitude of the hidden states that it is shown.

    Attributes:
        largest: The magnitude, a float32 scalar on the device of the last hidden state.
    """

    def __init__(self):
        self.largest = torch.zeros(())

    def see(self, *hidden_states: torch.Tensor) -> None:
        """Take note of hidden states, all on one device."""
        for hidden in hidden_states:
            largest = hidden.abs().amax().float()
            self.largest = torch.maximum(self.largest.to(largest.device), largest)


def run_to_observe(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Run a decoder on the new tokens of a call alone, without gradients and without changing the random state.

    Args:
        decoder: The module whose loop calls the layers.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Raises:
        ValueError: The model is sharded.
    """
    if any(hasattr(p, "full_tensor") for p in decoder.parameters()):
        raise ValueError(
            "fraction_bits='auto' needs the whole model on one device: run one forward pass before sharding it, "
            "or pass a number"
        )
    with torch.random.fork_rng(), torch.no_grad():
        args, kwargs = without_new_cache(decoder, args, _without_past(args, kwargs))
        decoder.forward(*args, **kwargs)
    # Under autocast it would hold casts of weights that carry no gradient, for the pass that follows.
    torch.clear_autocast_cache()


def fraction_bits_for(largest: float) -> int:
    """The most binary places with which 32-bit streams can hold hidden states, with some headroom.

    Args:
        largest: Largest magnitude of the hidden states.

    Raises:
        IntegrityError: It is not finite, or leaves no place at all.
    """
    if not math.isfinite(largest):
        raise IntegrityError("fraction_bits='auto': the plain network's hidden states are not finite")
    magnitude = math.ceil(math.log2(max(largest, 1.0)))
    fraction_bits = min(31 - _HEADROOM_BITS - magnitude, MAX_FRACTION_BITS)
    if fraction_bits < 0:
        raise IntegrityError(f"fraction_bits='auto': hidden states of {largest:.3g} leave no room in 32-bit streams")
    return fraction_bits


def _without_past(args, kwargs):
    """The arguments of a pass over the new tokens alone: no cache, and no mask of what it holds."""
    kwargs = without_cache(kwargs)
    tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    tokens = args[0] if tokens is None and args else tokens
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and tokens is not None:
        kwargs["attention_mask"] = mask[..., -tokens.shape[1] :]
    return kwargs
