"""The autograd node of a reversible layer.

A node saves nothing. The streams of the pass live in a `Streams`, are updated in place layer by layer, and are run
backward by the nodes, which evaluate their branch again on the reconstructed input.
"""

import torch

from ..integrations.scoped import hooks_paused
from .integrity import poisoned


class LayerNode(torch.autograd.Function):
    """One reversible layer: `(hidden, *step.inputs()) -> (hidden', *new keys and values)`."""

    @staticmethod
    def forward(ctx, integrity, streams, step, update, hidden, *inputs):
        ctx.set_materialize_grads(False)
        ctx.integrity, ctx.streams, ctx.index = integrity, streams, streams.level
        branch, new_states = step.evaluate(streams.input_of_next(hidden))
        return (streams.forward(branch, update, step), *new_states)

    @staticmethod
    def backward(ctx, grad_output, *grad_states):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a reversible layer has no second derivative (create_graph=True); call restore(model) first"
            )
        integrity, streams, index = ctx.integrity, ctx.streams, ctx.index
        if streams.begin_backward():
            # At its end, wherever that is: a pass may stop above the lowest layer.
            torch.autograd.Variable._execution_engine.queue_callback(
                lambda: integrity.report(streams.flags, streams.fraction_bits)
            )
        hidden = streams.input_of(index)
        step = streams.layer(index).step
        branch, new_states, leaves = step.evaluate_again(hidden)
        if grad_output is None:  # only the keys and values have a part in the loss
            grad_output = torch.zeros_like(hidden)
        grad_branch = streams.branch_gradient(grad_output, index, branch.detach())
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
        if ctx.needs_input_grad[4]:
            grad_branch, *grad_inputs = gradients
            grad_hidden = streams.finish(index, branch.detach(), grad_output, grad_branch)
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
    """`value` in the forward pass, the gradient of `surrogate` in the backward pass."""

    @staticmethod
    def forward(ctx, surrogate, value):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None
