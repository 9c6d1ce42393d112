"""How a layer's branch joins the streams, and leaves them again: the operations of every coupling, by form."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from r3mem_fast.kernels import coupling
from r3mem_fast.kernels.coupling import others


class Update(NamedTuple):
    """How a layer's branch joins the streams.

    Attributes:
        form: A key of `FORMS_OF_UPDATE`: "momentum", "inverse" for a layer that is read backward in the coupling's
            inverse form, "adapted" for momentum with an adapter, "bdia", "additive" or "scaled".
        bits: The momentum, or what the second stream is multiplied by, is `2**-bits`; None means no momentum, or 1.
        signs: int32 `[B]`, the sign of each row in the form "bdia"; None in a route, and in other forms.
        gain: What the branch is multiplied by, in the forms "momentum" and "adapted"; None: one minus the momentum.
        adapter: Module that adds what it computes of one stream to the other; None in a route, or without one.
    """

    form: str
    bits: int | None
    signs: torch.Tensor | None = None
    gain: float | None = None
    adapter: Any = None


class Operations(NamedTuple):
    """What a form does with the position and a second stream, which for "momentum" is the velocity.

    Attributes:
        start: `(position) -> second stream`, before the first layer.
        forward: `(update, position, second, branch, **settings) -> (hidden, kept)`, see `coupling.momentum_forward`.
        rewind: `(position, second, **settings) -> hidden`: takes the position to the layer's input.
        gradient: `(update, above, grad_output, grad_second, branch, kept, **settings) -> (gradient of the branch,
            grad_second, gradient of the input that does not pass through the branch)`, where `above` is the update of
            the layer above, and None at the top. The last one is None where it is that of the output, without what
            comes through an adapter.
        backward: `(update, position, second, branch, kept, *gradients, **settings) -> (hidden, gradient)`, see
            `coupling.momentum_backward`; hidden is None if the position was not taken to the layer below.
        adapts_position: Whether an adapter reads the second stream and changes the position; else the other way round.
    """

    start: Callable
    forward: Callable
    rewind: Callable
    gradient: Callable
    backward: Callable
    adapts_position: bool = True


def _of_momentum(forward, rewind, gradient, backward, *, steps_down=True):
    def forward_of(update, position, velocity, branch, **settings):
        return forward(position, velocity, branch, bits=update.bits, **_gain(update), **settings)

    def gradient_of(update, above, grad_output, grad_velocity, branch, kept, **settings):
        bits_above = None if above is None else above.bits
        found = gradient(
            grad_output,
            grad_velocity,
            branch,
            kept,
            bits=update.bits,
            bits_above=bits_above,
            **_gain(update),
            **settings,
        )
        return *found, None

    def backward_of(update, position, velocity, *rest, last, **settings):
        hidden, grad = backward(position, velocity, *rest, bits=update.bits, last=last, **_gain(update), **settings)
        if steps_down or last:
            return hidden, grad
        position += velocity  # up again: an adapter of the layer below comes first
        return None, grad

    return Operations(torch.zeros_like, forward_of, rewind, gradient_of, backward_of)


def _gain(update):
    return {} if update.gain is None else {"gain": update.gain}


def _bdia_forward(update, position, velocity, branch, **settings):
    return others.bdia_forward(position, velocity, branch, update.signs, bits=update.bits, **settings)


def _bdia_gradient(update, above, grad_output, grad_velocity, branch, kept, **settings):
    gradient, grad_velocity = others.bdia_gradient(
        grad_output, grad_velocity, branch, kept, update.signs, bits=update.bits, **settings
    )
    return gradient, grad_velocity, None


def _bdia_backward(update, position, velocity, branch, kept, grad_output, grad_branch, *, dtype, **settings):
    others.bdia_backward(position, velocity, branch, kept, update.signs, bits=update.bits, **settings)
    return None, _sum(grad_output, grad_branch)


def _of_two_steps(start, *, residual):
    def forward(update, position, previous, branch, **settings):
        return others.two_step_forward(position, previous, branch, residual=residual, bits=update.bits, **settings)

    def gradient(update, above, grad_output, grad_previous, branch, kept, **settings):
        return others.two_step_gradient(
            grad_output, grad_previous, branch, kept, residual=residual, bits=update.bits, **settings
        )

    def backward(update, position, previous, branch, kept, grad_output, grad_branch, *, dtype, **settings):
        others.two_step_backward(position, previous, branch, kept, residual=residual, bits=update.bits, **settings)
        return None, _sum(grad_output, grad_branch)

    return Operations(start, forward, others.two_step_rewind, gradient, backward, adapts_position=False)


def _sum(grad_output: Any, grad_branch: Any) -> Any:
    return None if grad_output is None or grad_branch is None else (grad_output + grad_branch).contiguous()


_MOMENTUM = (
    coupling.momentum_forward,
    coupling.momentum_rewind,
    coupling.momentum_gradient,
    coupling.momentum_backward,
)
FORMS_OF_UPDATE = {
    "momentum": _of_momentum(*_MOMENTUM),
    "inverse": _of_momentum(
        coupling.inverse_forward, coupling.inverse_rewind, coupling.inverse_gradient, coupling.inverse_backward
    ),
    "adapted": _of_momentum(*_MOMENTUM, steps_down=False),
    "bdia": Operations(torch.zeros_like, _bdia_forward, coupling.momentum_rewind, _bdia_gradient, _bdia_backward),
    "additive": _of_two_steps(torch.clone, residual=False),
    "scaled": _of_two_steps(torch.zeros_like, residual=True),
}
