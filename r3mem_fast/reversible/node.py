"""One forward pass of a reversible stack, and the autograd node of each of its layers.

A node saves nothing. The streams of the pass live in a `ReversibleState`, are updated in place layer by layer, and
are run backward by the nodes, which re-evaluate their branch on the reconstructed input.
"""

import contextlib
import operator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_flatten, tree_unflatten

from r3mem_fast.kernels import coupling

from ..integrations.compat import cache_name
from . import offload
from .past import PastKeysValues, append_to, layer_index, past_of
from .surroundings import Surroundings


class IntegrityError(RuntimeError):
    """The streams cannot be trusted: reconstruction failed, a value left the range, or a value is not finite."""


class Update(NamedTuple):
    """How a layer's branch joins the streams: with the momentum `m = 2**-bits`, or 0 where `bits` is None.

    form: "momentum", or "inverse" for a layer that is read backward in the coupling's inverse form.
    """

    form: str
    bits: int | None


class _Operations(NamedTuple):
    forward: callable
    rewind: callable
    gradient: callable
    backward: callable


_FORMS = {
    form: _Operations(*(getattr(coupling, f"{form}_{operation}") for operation in _Operations._fields))
    for form in ("momentum", "inverse")
}


class Step:
    """One layer of one forward pass: what its branch is called with, and what its inverse needs.

    Once it has run forward: update, how its branch joined the streams; kept, what that left; opens, whether the layers
    below have another form or are out of autograd's reach, so that the streams are verified here. evaluated_once: of a
    pass that nothing goes back through.
    """

    def __init__(self, layer, branch, kwargs, device, *, evaluated_once=False):
        if dist.is_initialized() and any(isinstance(m, FSDPModule) for m in layer.modules() if m is not layer):
            # Their hooks would see the inner backward pass, not the outer: each process would keep its own gradients.
            raise ValueError(
                f"fully_shard was called on a module inside a {type(layer).__name__}; shard reversible layers whole"
            )
        self.layer, self._branch = layer, branch
        self._surroundings = Surroundings(device)
        self._cache_name = cache_name(kwargs)
        self._cache, self._past = None, ()
        if self._cache_name is not None:
            kwargs = dict(kwargs)
            self._cache = kwargs.pop(self._cache_name)
            self._cache_index = layer_index(layer)
            self._past = past_of(self._cache, self._cache_index)
        self._leaves, self._structure = tree_flatten(kwargs)
        self._evaluated_once = evaluated_once
        if evaluated_once:
            return
        # Watched, not copied: an in-place change before the backward pass would make it reconstruct something else.
        self._parameters, self._modes, self._hooks = _watched_parts(layer)
        self._trainable = [p for p in self._parameters if p.requires_grad]
        self._watched = [
            (tensor, tensor._version)
            for tensor in [*self._arguments(), *self._parameters]
            if not tensor.is_inference()
        ]

    def _arguments(self):
        return [leaf for leaf in [*self._leaves, *self._past] if isinstance(leaf, torch.Tensor)]

    def inputs(self):
        """Tensors beside the hidden state that want a gradient: arguments, then parameters (after any unshard)."""
        return [*(tensor for tensor in self._arguments() if tensor.requires_grad), *self._trainable]

    def evaluate(self, hidden):
        """First evaluation: (branch value, new keys and values for the cache), both without a graph."""
        # With gradients on, as in the second evaluation: attention libraries choose their kernels by that. What
        # autograd would save is let go at once, so that the layer's activations do not pile up.
        leaf = hidden.detach().requires_grad_()
        leaf.register_hook(_refuse_capture)
        with self._surroundings.recorded(), torch.enable_grad(), _nothing_saved():
            branch, new_states = self._call(leaf, self._leaves, self._past)
        if not self._evaluated_once:
            refuse_outside_tensors(f"a {type(self.layer).__name__}", (branch, *new_states), [leaf, *self.inputs()])
        return branch.detach(), tuple(state.detach() for state in new_states)

    def evaluate_again(self, hidden):
        """Second evaluation, with a graph: (branch value, new keys and values, leaves that gradients go to).

        `hidden` must be a leaf; the leaves stand in the order of `[hidden, *inputs()]`.
        """
        self._check_unmodified()
        substitutes = []

        def leaf_of(argument):
            if not (isinstance(argument, torch.Tensor) and argument.requires_grad):
                return argument
            substitutes.append(argument.detach().requires_grad_())
            return substitutes[-1]

        arguments = [leaf_of(argument) for argument in self._leaves]
        past = tuple(leaf_of(tensor) for tensor in self._past)
        with self._surroundings.restored(), torch.enable_grad():
            branch, new_states = self._call(hidden.requires_grad_(), arguments, past)
        return branch, new_states, [hidden, *substitutes, *self._trainable]

    def value_again(self, hidden):
        """Second evaluation for its value alone, outside the layer's own backward pass."""
        # There FSDP2 gathers no parameters.
        sharded = isinstance(self.layer, FSDPModule)
        if sharded:
            self.layer.unshard()
        branch, _, _ = self.evaluate_again(hidden)
        if sharded:
            self.layer.reshard()
        return branch.detach()

    def write_cache(self, new_states):
        """Append the new keys and values, outputs of this layer's node, to the cache that the caller passed."""
        if new_states:
            append_to(self._cache, *new_states, self._cache_index)

    def _call(self, hidden, leaves, past):
        kwargs = tree_unflatten(leaves, self._structure)
        if self._cache is None:
            return self._branch(self.layer, hidden, kwargs), ()
        view = PastKeysValues(past)
        branch = self._branch(self.layer, hidden, {**kwargs, self._cache_name: view})
        return branch, view.new

    def _check_unmodified(self):
        parameters, modes, hooks = _watched_parts(self.layer)
        if not _same_objects(self._parameters, parameters):
            raise RuntimeError(
                f"the parameters of a {type(self.layer).__name__} are other tensors than in the forward pass. With "
                "functional_call, run backward inside of it too. FullyShardedDataParallel does this with "
                "use_orig_params=True: use fully_shard (FSDP2: fsdp_version=2 in accelerate), or "
                "use_orig_params=False."
            )
        if modes != self._modes or not self._hooks <= hooks:
            raise RuntimeError(
                f"a {type(self.layer).__name__} is not set as it was in the forward pass: train() or eval(), the "
                "active adapters, requires_grad or a hook changed. Run backward before changing it."
            )
        for tensor, version in self._watched:
            if tensor._version != version:
                names = [name for name, p in self.layer.named_parameters() if p is tensor]
                what = f"parameter {names[0]!r}" if names else "an argument (mask, positions or cache)"
                raise RuntimeError(
                    f"{what} of a {type(self.layer).__name__} was modified in place between the forward and the "
                    "backward pass; the layer's input cannot be reconstructed. Run backward before the optimizer "
                    "step (or whatever changed it)."
                )


class ReversibleState:
    """The streams of one forward pass. `level` counts the layers that they have passed.

    position: int32, the shape of the hidden state. velocities: by form, the same; the one of the other form waits.
    flags: int32 [3], see the coupling kernels. start: the first step that autograd can reach (None: none so far); from
    there on side bits are kept, and if `side_bits_on_host`, they wait in host memory.
    """

    def __init__(self, hidden, fraction_bits, recording=None, side_bits_on_host=False):
        self.fraction_bits, self.dtype = fraction_bits, hidden.dtype
        self.flags = coupling.new_flags(hidden.device)
        self.position, velocity, self._entered = coupling.momentum_enter(
            hidden, fraction_bits=fraction_bits, flags=self.flags
        )
        self.velocities = {"momentum": velocity}
        self.level, self.start, self.steps = 0, None, []
        self._form = None  # of the layer below, while running forward
        self._grad_velocities = {}
        self._bits_above = {}
        self._graph_task = None
        self._hidden = None  # while running backward: the dequantised position, one layer below the velocity
        self.side_bits_on_host = side_bits_on_host
        self.recording = recording
        if recording is not None:
            recording.begin(self)

    def input_of_next(self, hidden):
        """The hidden state that the next layer sees: `hidden`, or for the first layer its value on the grid."""
        entered, self._entered = self._entered, None
        return hidden if entered is None else entered

    def begin_step(self, step):
        """Append a step; None for one that autograd cannot reach, which need not be reversible."""
        if step is not None and self.start is None:
            self.start = self.level
        self.steps.append(step)

    def forward(self, branch, update):
        """Apply a branch value: the streams move up one level. Returns the new hidden state."""
        step, form = self.steps[self.level], update.form
        if form not in self.velocities:
            self.velocities[form] = torch.zeros_like(self.position)
        opens = step is not None and (self.level == self.start or form != self._form)
        hidden, kept = _FORMS[form].forward(
            self.position,
            self.velocities[form],
            branch,
            bits=update.bits,
            fraction_bits=self.fraction_bits,
            flags=self.flags,
            dtype=self.dtype,
            keep=step is not None,
            sum_streams=opens,
        )
        if step is not None:
            if self.side_bits_on_host:
                kept = kept._replace(side=offload.HostCopy(kept.side))
            step.update, step.kept, step.opens = update, kept, opens
        self._form = form
        self.level += 1
        if self.recording is not None:
            self.recording.append(self)
        return hidden

    def to_host(self):
        """Let the streams wait in host memory for the backward pass."""
        self.position = offload.HostCopy(self.position)
        self.velocities = {form: offload.HostCopy(velocity) for form, velocity in self.velocities.items()}

    def input_of(self, index):
        """Run the streams backward to the input of step `index` and return it as a hidden state, a fresh tensor."""
        if index >= self.level:
            raise RuntimeError(
                "this reversible graph has already been run backward, which consumes its streams: backward through "
                "it a second time (retain_graph=True) is not supported. Run the forward pass again, or add the "
                "losses before one backward()."
            )
        if isinstance(self.position, offload.HostCopy):
            self.position = self.position.back()
            self.velocities = {form: velocity.back() for form, velocity in self.velocities.items()}
        while self.level > index + 1:  # layers above whose output has no part in the loss
            above = self.level - 1
            step = self.steps[above]
            if step is None:
                raise RuntimeError(
                    f"layer {above} ran without gradients after layers that had them; what it added cannot be undone"
                )
            self.finish(above, step.value_again(self.input_of(above)), None, None)
        if self._hidden is None:
            form = self.steps[index].update.form
            self._hidden = _FORMS[form].rewind(
                self.position, self.velocities[form], fraction_bits=self.fraction_bits, dtype=self.dtype
            )
        hidden, self._hidden = self._hidden, None
        return hidden

    def begin_backward(self):
        """Whether this is the first node of its call of backward(), which starts with no gradient of its own."""
        graph_task = torch._C._current_graph_task_id()
        if graph_task == self._graph_task:
            return False
        self._graph_task, self._grad_velocities, self._bits_above = graph_task, {}, {}
        return True

    def branch_gradient(self, grad_output, index, branch):
        """`g_f` of step `index` from the gradient of its output; NaN and a flag where `branch` is not what it was."""
        step = self.steps[index]
        form, bits = step.update
        gradient, self._grad_velocities[form] = _FORMS[form].gradient(
            grad_output,
            self._grad_velocities.get(form),
            branch,
            step.kept,
            bits=bits,
            bits_above=self._bits_above.get(form),
            flags=self.flags,
            dtype=branch.dtype,
        )
        self._bits_above[form] = bits
        return gradient

    def finish(self, index, branch, grad_output, grad_branch):
        """Undo step `index`, whose input is known; returns the gradient of its input.

        Where the step opens, the streams are compared with what they were there in the forward pass.
        """
        step, self.steps[index] = self.steps[index], None
        form, bits = step.update
        self._hidden, gradient = _FORMS[form].backward(
            self.position,
            self.velocities[form],
            branch,
            step.kept._replace(side=offload.back(step.kept.side)),
            grad_output,
            grad_branch,
            bits=bits,
            fraction_bits=self.fraction_bits,
            flags=self.flags,
            dtype=self.dtype,
            last=step.opens,
        )
        self.level = index
        return gradient

    def release(self):
        """Let the streams go."""
        self.position = self.velocities = self._grad_velocities = None


class LayerNode(torch.autograd.Function):
    """One reversible layer: `(hidden, *step.inputs()) -> (hidden', *new keys and values)`."""

    @staticmethod
    def forward(ctx, stack, state, step, update, hidden, *inputs):
        ctx.set_materialize_grads(False)
        ctx.stack, ctx.state, ctx.index = stack, state, state.level
        state.begin_step(step)
        branch, new_states = step.evaluate(state.input_of_next(hidden))
        return (state.forward(branch, update), *new_states)

    @staticmethod
    def backward(ctx, grad_output, *grad_states):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a reversible layer has no second derivative (create_graph=True); call restore(model) first"
            )
        stack, state, index = ctx.stack, ctx.state, ctx.index
        if state.begin_backward():
            # At its end, wherever that is: a pass may stop above the lowest layer.
            torch.autograd.Variable._execution_engine.queue_callback(lambda: stack.report(state))
        hidden = state.input_of(index)
        branch, new_states, leaves = state.steps[index].evaluate_again(hidden)
        if grad_output is None:  # only the keys and values have a part in the loss
            grad_output = torch.zeros_like(hidden)
        grad_branch = state.branch_gradient(grad_output, index, branch.detach())
        stack.report_if_known(state, f"layer {index} ({type(state.steps[index].layer).__name__}): ")
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
            grad_hidden = state.finish(index, branch.detach(), grad_output, grad_branch)
        else:
            grad_hidden, grad_inputs = None, list(gradients)
            state.finish(index, branch.detach(), None, None)
        if index == state.start:
            state.release()
            stack.report_if_known(state)
            grad_hidden = poisoned(grad_hidden, state.flags)
            grad_inputs = [poisoned(gradient, state.flags) for gradient in grad_inputs]
        return (None, None, None, None, grad_hidden, *grad_inputs)


class StoredValue(torch.autograd.Function):
    """`value` in the forward pass, the gradient of `surrogate` in the backward pass."""

    @staticmethod
    def forward(ctx, surrogate, value):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def poisoned(tensor, flags):
    """`tensor`, or NaN throughout if any flag is set, and its gradient likewise; without synchronising."""
    if tensor is None:
        return None
    return tensor * torch.where((flags != 0).any(), torch.nan, 1.0)


def _same_objects(left, right):
    return len(left) == len(right) and all(map(operator.is_, left, right))


def _watched_parts(layer):
    """What a layer's second evaluation depends on: its parameters, modes and hooks, in one walk of its modules.

    Hooks that came after the first evaluation are no matter (transformers adds some to capture outputs), nor are those
    of the layer itself, which run around the branch.
    """
    # Walking takes a good part of the time that a small layer takes; `parameters()` would walk again.
    modules = list(layer.modules())
    parameters = list(dict.fromkeys(p for m in modules for p in m._parameters.values() if p is not None))
    modes = [(m.training, tuple(m.active_adapters) if "lora_A" in m._modules else None) for m in modules]
    trainable = [p.requires_grad for p in parameters]
    inside = (m for m in modules if m is not layer)
    hooks = {(id(m), key) for m in inside for own in (m._forward_hooks, m._forward_pre_hooks) for key in own}
    return parameters, (modes, trainable), hooks


def refuse_outside_tensors(where, outputs, known):
    """Raise ValueError if a tensor that wants a gradient entered a layer or a segment by no argument and no parameter.

    outputs: of the first evaluation. known: the tensors that gradients are delivered to.
    """
    leaves = {id(tensor) for tensor in known}
    # Behind an argument that is no leaf lies somebody else's graph.
    seen = {tensor.grad_fn for tensor in known if tensor.grad_fn is not None}
    waiting = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in leaves:
            raise ValueError(
                f"a tensor {list(leaf.shape)} that requires a gradient enters {where} from outside (by a hook, say) "
                "and would get none. Register it as a parameter, or pass it as an argument."
            )
        waiting += [function for function, _ in node.next_functions if function is not None]


def _nothing_saved():
    return saved_tensors_hooks(lambda tensor: None, _refuse_capture)


def _refuse_capture(_):
    raise RuntimeError(
        "a tensor captured inside a reversible layer (by a hook, say) has a part in the loss, and carries no gradient "
        "there. Use output_hidden_states, compute that loss inside the layer, or call restore(model)."
    )


@contextlib.contextmanager
def hooks_paused(leaves):
    """Keep hooks on parameters for the outer backward pass: the inner one only computes, it does not deliver."""
    hooked = [leaf._backward_hooks for leaf in leaves if leaf._backward_hooks]
    saved = [dict(hooks) for hooks in hooked]
    for hooks in hooked:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in zip(hooked, saved, strict=True):
            hooks.update(before)
