"""The autograd node of a reversible layer.

A node saves nothing. The streams of a pass are held by a `Streams` object and updated in place, layer by layer. In the
backward pass each node runs them one layer backward, and evaluates its branch again on the reconstructed input.
"""

from typing import Any

import torch

from ..integrations.scoped import hooks_paused
from .integrity import poisoned


class LayerNode(torch.autograd.Function):
    """One reversible layer: `(hidden, *step.inputs()) -> (new hidden, *new keys and values)`."""

    @staticmethod
    def forward(
        ctx: Any, integrity: Any, streams: Any, step: Any, update: Any, hidden: torch.Tensor, *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Evaluate the branch, and add it to the streams."""
        ctx.set_materialize_grads(False)
        ctx.integrity, ctx.streams, ctx.index = integrity, streams, streams.level
        branch, new_states = step.evaluate(streams.input_of_next(hidden))
        return (streams.forward(branch, update, step), *new_states)

    @staticmethod
    def backward(ctx: Any, grad_output: Any, *grad_states: Any) -> tuple[Any, ...]:
        """Reconstruct the layer's input, evaluate the branch again, and return the gradients of all inputs."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a reversible layer has no second derivative (create_graph=True); call restore(model) first"
            )
        integrity, streams, index = ctx.integrity, ctx.streams, ctx.index
        if streams.begin_backward():
            # Called when backward() ends, at whatever layer: it may stop above the lowest one.
            torch.autograd.Variable._execution_engine.queue_callback(
                lambda: integrity.report(streams.flags, streams.fraction_bits)
            )
        hidden = streams.input_of(index)
        step = streams.layer(index).step
        branch, new_states, leaves = step.evaluate_again(hidden)
        if grad_output is None:  # only the keys and values have a part in the loss
            grad_output = torch.zeros_like(hidden)
        grad_branch, grad_beside, of_adapter = streams.branch_gradient(grad_output, index, branch.detach())
        where = f"layer {index} ({type(step.layer).__name__}): "
        integrity.report_if_known(streams.flags, streams.fraction_bits, where)
        outputs, grads = [branch], [grad_branch]
        for new_state, gradient in zip(new_states, grad_states, strict=True):
            if gradient is not None:
                outputs.append(new_state)
                grads.append(gradient)
        if not ctx.needs_input_grad[4]:  # the layers below, and what lies before them, are frozen
            leaves = leaves[1:]
        with hooks_paused(leaves):
            gradients = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
        if of_adapter:  # the layer's branch has no part in it
            gradients = [of_adapter.get(leaf, found) for leaf, found in zip(leaves, gradients, strict=True)]
        if ctx.needs_input_grad[4]:
            grad_branch, *grad_inputs = gradients
            grad_hidden = streams.finish(index, branch.detach(), grad_beside, grad_branch)
        else:
            grad_hidden, grad_inputs = None, list(gradients)
            streams.finish(index, branch.detach(), None, None)
        if index == streams.start:
            streams.release()
            integrity.report_if_known(streams.flags, streams.fraction_bits)
            grad_hidden = poisoned(grad_hidden, streams.flags)
            grad_inputs = [poisoned(gradient, streams.flags) for gradient in grad_inputs]
        return (None, None, None, None, grad_hidden, *grad_inputs)


class StoredValue(torch.autograd.Function):
    """Function with the value of `value`, and the gradient of `surrogate`."""

    @staticmethod
    def forward(ctx: Any, surrogate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return `value`."""
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Pass the gradient on to `surrogate`."""
        return gradient, None
