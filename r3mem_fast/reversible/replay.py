"""Back-propagation through segments of which only the states between them are kept: memory replay.

Of S segments that pass a state on, full back-propagation through time keeps all that each of them computed. Here the
forward pass keeps the states and the last segment, where the backward pass begins. From there it takes the segments
last to first, runs each once more, and hands the gradient of its state to the one before.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from r3mem_fast.kernels import coupling

from ..integrations import fsdp
from ..integrations.scoped import hooks_paused
from .convert import stack_of
from .integrity import poisoned
from .step import refuse_outside_tensors
from .surroundings import Surroundings


@torch.compiler.disable
def replay(
    model, step: Callable, segments: Sequence, state, *, bptt_segments: int | None = None, others: Sequence = ()
) -> tuple[list, object]:
    """Run `step` over segments, with gradients, in memory that does not grow with their number but by the states.

    model: a reversible model (`make_reversible`), whose trainable parameters `step` uses. step:
    `(segment, state) -> (output, state)`. For each segment but the last it is called twice and must do the same.
    Outputs (a loss, say) and states are tensors, or nested lists, tuples or dicts of them. state: before the first.
    bptt_segments: no gradient passes from segment n to the one before where n, from 0, is a multiple of this, as if
    the state were detached there; None: it always passes. others: further tensors that require a gradient and are
    used by `step`, neither of the model nor in a state; leaves.

    Returns `(outputs, state)`: an output for each segment, and the last state, all differentiable. Gradients are those
    of a plain loop. Random numbers and autocast are in the second call as in the first. If a segment computes
    something else then, IntegrityError is raised, at once on the CPU, elsewhere by `check_integrity(model)`, and the
    gradients are NaN until then.
    Raises ValueError for a model that is not reversible, others that are no leaves, or `bptt_segments` below 2; in the
    backward pass ValueError for a tensor that requires a gradient and is not known, RuntimeError if a parameter was
    changed in between, or if the pass comes a second time.
    """
    check_bptt_segments(bptt_segments)
    if any(tensor.grad_fn is not None for tensor in others):
        raise ValueError(
            "others must be leaves, such as parameters: the gradient of one that was computed before would pass on to "
            "what it was computed from twice. Make it a part of the state"
        )
    run = _Run(model, step, list(segments), bptt_segments, others)
    leaves, run.structure = tree_flatten(state)
    if not run.segments:
        return [], state
    tensors = _Replay.apply(run, len(leaves), *leaves, *run.inputs)
    outputs = []
    for structure in run.output_structures:
        count = structure.num_leaves
        outputs.append(tree_unflatten(list(tensors[:count]), structure))
        tensors = tensors[count:]
    return outputs, tree_unflatten(list(tensors), run.structure)


def check_bptt_segments(bptt_segments):
    if bptt_segments is not None and (type(bptt_segments) is not int or bptt_segments < 2):
        raise ValueError(
            f"bptt_segments must be an integer of at least 2, or None, got {bptt_segments!r}: with 1 no gradient "
            "would reach what a segment leaves to the next"
        )


class _Run:
    """One chain of segments: what is called, and what its forward pass left."""

    def __init__(self, model, step, segments, bptt_segments, others):
        self.stack, self.step, self.segments, self.bptt_segments = stack_of(model), step, segments, bptt_segments
        self.known = list(dict.fromkeys([*(p for p in model.parameters() if p.requires_grad), *others]))
        # Of a sharded model each layer delivers its gradients itself, to the parameters that it gathers when it runs.
        sharded = fsdp.units_of(model)
        self.sharded = bool(sharded)
        # Those that run in the segments, and not around them.
        self._units = [unit for unit in sharded if unit is not model]
        self.inputs = [torch.zeros((), requires_grad=True)] if self.sharded else self.known
        self._device = next(model.parameters()).device
        self._versions = [
            (name, p, p._version) for name, p in model.named_parameters() if not (self.sharded or p.is_inference())
        ]
        self.output_structures = []
        self.structure: Any = None  # of a state
        self.first_requires_grad: list[bool] = []  # of the leaves of the first
        self._states, self._surroundings, self._digests = [], [], []
        self._kept: Any = None  # the last segment's state and tensors, with its graph

    def first(self, leaves):
        """Every segment once: the tensors of all outputs and of the last state, without a graph."""
        values, last = [], [_compact(leaf.detach()) for leaf in leaves]
        end = len(self.segments) - 1
        for index, segment in enumerate(self.segments):
            self._states.append(last)
            surroundings = Surroundings(self._device)
            self._surroundings.append(surroundings)
            given = self._given(index)
            # With gradients on, as when it is replayed: attention libraries choose their kernels by that.
            kept = index == end and not self.sharded  # whose layers would stay gathered
            forgetting = contextlib.nullcontext() if kept else self.stack.forgetting()
            with surroundings.recorded(), torch.enable_grad(), forgetting:
                output, state = self.step(segment, tree_unflatten(given, self.structure))
            outputs, structure = tree_flatten(output)
            self.output_structures.append(structure)
            last, structure = tree_flatten(state)
            if structure != self.structure:
                raise ValueError(f"step returned a state of {structure}, and was given one of {self.structure}")
            if kept:
                refuse_outside_tensors("a segment", [*outputs, *last], [*self.known, *given])
                self._kept = (given, [*outputs, *last])
            self._digests.append([_digest(tensor) for tensor in (*outputs, *last)])
            values += [tensor.detach() for tensor in outputs]
            # Before the next segment runs, all else goes: graphs too (of a head that learns, say).
            last = [_compact(tensor.detach()) for tensor in last]
            del given, output, outputs, state
        # An input returned as it is would be taken for a view of it.
        return values, [tensor.clone() for tensor in last]

    def backward(self, grad_outputs, grad_state):
        """Gradients of the first state and of `known` (None for all of them where the model is sharded)."""
        if not self._states:
            raise RuntimeError(
                "these segments have already been run backward, which lets their states go: backward through them a "
                "second time (retain_graph=True) is not supported"
            )
        flags = coupling.new_flags(self._device)
        totals = [None] * len(self.known)
        with fsdp.freed_after_forward(self._units):
            grad_state = self._all_backward(grad_outputs, grad_state, totals, flags)
        if flags.device.type != "cpu" or self.stack.integrity.policy == "nan":
            self.stack.integrity.report(flags, self.stack.fraction_bits)
            grad_state = [poisoned(gradient, flags) for gradient in grad_state]
            totals = [poisoned(gradient, flags) for gradient in totals]
        return grad_state, totals

    def _all_backward(self, grad_outputs, grad_state, totals, flags):
        """The gradients of the first state; those of `known` are added to `totals`."""
        while self._states:
            index = len(self._states) - 1
            count = self.output_structures[index].num_leaves
            grads = [*grad_outputs[len(grad_outputs) - count :], *grad_state]
            grad_outputs = grad_outputs[: len(grad_outputs) - count]
            if self._kept is None:
                given = self._given(index)
                tensors = self._again(index, given, flags)
            else:
                (given, tensors), self._kept = self._kept, None
            self._states.pop()
            pairs = [(t, g) for t, g in zip(tensors, grads, strict=True) if g is not None and t.requires_grad]
            wanted = [leaf for leaf in given if leaf.requires_grad]
            found = self._gradients(pairs, wanted, flags)
            of = dict(zip(map(id, wanted), found, strict=False))
            grad_state = [of.get(id(leaf)) for leaf in given]
            for place, gradient in enumerate(found[len(wanted) :]):
                if gradient is None:
                    continue
                if totals[place] is None:
                    # A copy: it is added to, and lies apart from where this segment's temporaries lay, which the next
                    # one's can take as a whole.
                    totals[place] = gradient.clone()
                else:
                    totals[place] += gradient
            del tensors, pairs, given, wanted, found, of
        return grad_state

    def _given(self, index):
        """The state before a segment as leaves, of which those require a gradient that one is passed on from."""
        cut = index > 0 and self.bptt_segments is not None and index % self.bptt_segments == 0
        return [
            leaf.detach().requires_grad_(leaf.is_floating_point() and not cut and self._differentiable(index, place))
            for place, leaf in enumerate(self._states[index])
        ]

    def _differentiable(self, index, place):
        return index > 0 or self.first_requires_grad[place]

    def _again(self, index, given, flags):
        """A segment once more, with a graph: its tensors. `flags` take note if they are others than before."""
        for name, parameter, version in self._versions:
            if parameter._version != version:
                raise RuntimeError(
                    f"parameter {name!r} was modified in place between the forward and the backward pass, so a "
                    "segment cannot be run again as it was. Run backward before the optimizer step (or whatever "
                    "changed it)."
                )
        fsdp.forget_backward(self._units)
        with self._surroundings[index].restored(), torch.enable_grad():
            output, state = self.step(self.segments[index], tree_unflatten(given, self.structure))
        tensors = [*tree_flatten(output)[0], *tree_flatten(state)[0]]
        if not self.sharded:  # whose layers compute with other tensors than its parameters
            refuse_outside_tensors("a segment", tensors, [*self.known, *given])
        same = [
            (_digest(t) == digest).all().to(flags.device)
            for t, digest in zip(tensors, self._digests[index], strict=True)
        ]
        flags[2] |= (~torch.stack(same).all()).to(flags.dtype)
        where = f"segment {index}, run again: "
        self.stack.integrity.report_if_known(flags, self.stack.fraction_bits, where)
        return tensors

    def _gradients(self, pairs, wanted, flags):
        if not pairs:
            return [None] * (len(wanted) + (0 if self.sharded else len(self.known)))
        tensors, grads = zip(*pairs, strict=True)
        if self.sharded:
            torch.autograd.backward(tensors, [poisoned(gradient, flags) for gradient in grads])
            return [leaf.grad for leaf in wanted]
        with hooks_paused(self.known):
            return list(torch.autograd.grad(tensors, [*wanted, *self.known], grads, allow_unused=True))


class _Replay(torch.autograd.Function):
    """A chain of segments: `(*state, *parameters) -> (*outputs, *state)`."""

    @staticmethod
    def forward(ctx, run, count, *tensors):
        ctx.set_materialize_grads(False)
        ctx.run, ctx.count = run, count
        run.first_requires_grad = ctx.needs_input_grad[2 : 2 + count]
        outputs, state = run.first(tensors[:count])
        ctx.num_outputs = len(outputs)
        results = (*outputs, *state)
        ctx.mark_non_differentiable(*(t for t in results if not t.is_floating_point()))
        return results

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError("replayed segments have no second derivative (create_graph=True)")
        grad_state, totals = ctx.run.backward(grads[: ctx.num_outputs], grads[ctx.num_outputs :])
        return (None, None, *grad_state, *([None] if ctx.run.sharded else totals))


def _compact(tensor):
    """The tensor, or a copy where it is a view that would keep more than itself alive."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _digest(tensor):
    """Sum of a tensor's bits as integers, by which two are told apart: an int64 scalar on its device."""
    tensor = tensor.detach().contiguous()
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(-1).view(kinds[tensor.element_size()]).sum(dtype=torch.int64)
