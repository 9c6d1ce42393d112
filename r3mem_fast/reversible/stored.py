"""The couplings with activations that autograd stores: the same values, and gradients to compare with."""

import collections
from typing import Any

import torch

from r3mem_fast.kernels import coupling

from .forms import FORMS_OF_UPDATE, Update
from .node import StoredValue


def enter(streams: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Begin a pass: return the first layer's input with its value on the grid of the streams.

    Args:
        streams: The `Streams` of the pass.
        hidden: Input of the first layer, `[B, T, width]`.
    """
    hidden = StoredValue.apply(hidden, streams.input_of_next(hidden))
    streams.surrogates = collections.defaultdict(lambda: torch.zeros_like(hidden, dtype=torch.float32))
    streams.surrogates["additive"] = hidden.float()
    return hidden


def joined(streams: Any, update: Update, hidden: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """Add a layer's branch to the streams: return a hidden state that autograd follows by a surrogate in floats.

    Args:
        streams: The `Streams` of the pass.
        update: How the branch joins them.
        hidden: Input of the layer, `[B, T, width]`.
        branch: The branch, in the shape of the input, with its graph.

    Returns:
        The layer's output, `[B, T, width]`.
    """
    of_form = FORMS_OF_UPDATE[update.form]
    with torch.no_grad():
        value = streams.forward(branch.detach(), update)
    if of_form.adapts_position:
        velocity = streams.surrogates[update.form] = _velocity(update, streams.surrogates[update.form], branch)
        surrogate = hidden + velocity.to(hidden.dtype)
        if update.adapter is not None:
            exact = coupling.dequantize(streams.velocities[update.form], streams.fraction_bits, hidden.dtype)
            adapted = update.adapter(StoredValue.apply(velocity.to(hidden.dtype), exact))
            surrogate = surrogate + adapted.to(hidden.dtype)
        return StoredValue.apply(surrogate, value)
    surrogate = streams.surrogates[update.form] * 2.0 ** -(update.bits or 0) + branch.float()
    surrogate = surrogate + hidden if update.form == "scaled" else surrogate
    output = StoredValue.apply(surrogate.to(hidden.dtype), value)
    adapted = hidden.new_zeros(()) if update.adapter is None else update.adapter(output)
    streams.surrogates[update.form] = hidden.float() + adapted.float()
    return output


def _velocity(update, velocity, branch):
    momentum: Any = 0.0 if update.bits is None else 2.0**-update.bits
    if update.signs is not None:
        momentum = momentum * update.signs.view(-1, *(1 for _ in branch.shape[1:])).float()
    addend = (1.0 - momentum if update.gain is None else update.gain) * branch.float()
    return (velocity + addend) / momentum if update.form == "inverse" else momentum * velocity + addend
