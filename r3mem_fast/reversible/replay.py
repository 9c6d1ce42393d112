"""Memory replay: back-propagation through segments, where only the states between them are kept.

Each segment passes a state on to the next. Full back-propagation through time keeps everything that each segment
computed. Here the forward pass keeps the states, and everything for the last segment alone. The backward pass takes
the segments last to first, runs each once more, and hands the gradient of its state to the one before.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from r3mem_fast.kernels import coupling

from ..integrations import fsdp
from ..integrations.parametrised import parametrised
from ..integrations.scoped import hooks_paused
from .convert import stack_of
from .integrity import poisoned
from .step import refuse_outside_tensors
from .surroundings import Surroundings


@torch.compiler.disable
def replay(
    model: Any,
    step: Callable[[Any, Any], tuple[Any, Any]],
    segments: Sequence[Any],
    state: Any,
    *,
    bptt_segments: int | None = None,
    others: Sequence[torch.Tensor] = (),
) -> tuple[list[Any], Any]:
    """Run a function over segments, with gradients, in memory that grows only by one state for each segment.

    The gradients are those of a plain loop. Random numbers and autocast are the same in the second call for a segment
    as in the first. If a segment computes something else in the second call, IntegrityError is raised: on the CPU at
    once, on a GPU by `check_integrity(model)`, and until then the gradients are NaN.

    Args:
        model: A reversible model. The function uses its trainable parameters.
        step: The function, `(segment, state) -> (output, state)`. Outputs (a loss, for example) and states are
            tensors, or nested lists, tuples or dicts of tensors. For each segment but the last it is called twice, and
            must do the same both times.
        segments: Segments in the order in which they are run.
        state: State before the first segment.
        bptt_segments: Number of segments that gradients pass through: where the index of a segment (from 0) is a
            multiple of it, the state before that segment is detached; None: gradients pass through all.
        others: More leaf tensors that require a gradient and that the function uses, neither parameters of the model
            nor part of a state.

    Returns:
        The outputs, one for each segment, and the last state, all differentiable.

    Raises:
        ValueError: The model is not reversible, one of `others` is no leaf, or `bptt_segments` is below 2. In the
            backward pass: the function uses a tensor that requires a gradient and is not known here.
        RuntimeError: In the backward pass: a parameter was changed since the forward pass, or the backward pass was
            run before.
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


def check_bptt_segments(bptt_segments: int | None) -> None:
    """Raise ValueError unless a number of segments for gradients is None or an integer of at least 2."""
    if bptt_segments is not None and (type(bptt_segments) is not int or bptt_segments < 2):
        raise ValueError(
            f"bptt_segments must be an integer of at least 2, or None, got {bptt_segments!r}: with 1 no gradient "
            "would reach what a segment leaves to the next"
        )


class _Run:
    """One run over segments: what is called, and what the forward pass keeps for the backward pass."""

    def __init__(
        self,
        model: Any,
        step: Callable[[Any, Any], tuple[Any, Any]],
        segments: list[Any],
        bptt_segments: int | None,
        others: Sequence[torch.Tensor],
    ):
        self.stack, self.step, self.segments, self.bptt_segments = stack_of(model), step, segments, bptt_segments
        self.known = list(dict.fromkeys([*(p for p in model.parameters() if p.requires_grad), *others]))
        # Layers of a sharded model deliver their gradients themselves, to the parameters that they gather.
        sharded = fsdp.units_of(model)
        self.sharded = bool(sharded)
        # Without the model itself, which does not run within a segment.
        self._units = [unit for unit in sharded if unit is not model]
        self.inputs = [torch.zeros((), requires_grad=True)] if self.sharded else self.known
        self._device = next(model.parameters()).device
        unknown = parametrised(model)
        self._versions = [
            (name, p, p._version)
            for name, p in model.named_parameters()
            if not (self.sharded or p.is_inference() or id(p) in unknown)
        ]
        self.output_structures: list[Any] = []
        self.structure: Any = None  # how a state is nested
        self.first_requires_grad: Sequence[bool] = ()  # by tensor of the first state, whether it requires a gradient
        self._states: list[list[torch.Tensor]] = []
        self._surroundings: list[Surroundings] = []
        self._digests: list[list[torch.Tensor]] = []
        self._begun = False  # the backward pass
        self._kept: Any = None  # the last segment's state and tensors, with its graph

    def first(self, leaves):
        """Run every segment once. Returns the tensors of all outputs, and those of the last state, without a graph."""
        values, last = [], [_compact(leaf.detach()) for leaf in leaves]
        end = len(self.segments) - 1
        for index, segment in enumerate(self.segments):
            self._states.append(last)
            surroundings = Surroundings(self._device)
            self._surroundings.append(surroundings)
            given = self._given(index)
            # Gradients are on, as in the second call, because attention libraries choose their kernels by that.
            kept = index == end and not self.sharded  # the layers of a sharded model would stay gathered
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
            self._digests.append([sum_of_bits(tensor) for tensor in (*outputs, *last)])
            values += [tensor.detach() for tensor in outputs]
            # Everything else is freed before the next segment runs, graphs too (that of a trained head, say).
            last = [_compact(tensor.detach()) for tensor in last]
            del given, output, outputs, state
        # Cloned: autograd would take an input that is returned as it is for a view of the input.
        return values, [tensor.clone() for tensor in last]

    def backward(self, grad_outputs, grad_state):
        """Run the backward pass. Returns the gradients of the first state, and those of `known`.

        The latter are all None for a sharded model.
        """
        if self._begun:
            raise RuntimeError(
                "these segments have already been run backward, which lets their states go: backward through them a "
                "second time (retain_graph=True, or after an error) is not supported"
            )
        self._begun = True
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
        """Take the segments last to first. Returns the gradients of the first state; adds the others to `totals`."""
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
                    # A copy, because it is added to; and because the memory of this segment's temporaries is then
                    # free as a whole for those of the next one.
                    totals[place] = gradient.clone()
                else:
                    totals[place] += gradient
            del tensors, pairs, given, wanted, found, of
        return grad_state

    def _given(self, index):
        """The state before a segment, as leaves. They require a gradient where one is passed on from them."""
        cut = index > 0 and self.bptt_segments is not None and index % self.bptt_segments == 0
        return [
            leaf.detach().requires_grad_(leaf.is_floating_point() and not cut and self._differentiable(index, place))
            for place, leaf in enumerate(self._states[index])
        ]

    def _differentiable(self, index, place):
        return index > 0 or self.first_requires_grad[place]

    def _again(self, index, given, flags):
        """Run a segment once more, with a graph. Returns its tensors; sets a flag if their values have changed."""
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
        if not self.sharded:  # layers of a sharded model compute with other tensors than its parameters
            refuse_outside_tensors("a segment", tensors, [*self.known, *given])
        same = [
            (sum_of_bits(t) == digest).all().to(flags.device)
            for t, digest in zip(tensors, self._digests[index], strict=True)
        ]
        flags[2] |= (~torch.stack(same).all()).to(flags.dtype)
        where = f"segment {index}, run again: "
        self.stack.integrity.report_if_known(flags, self.stack.fraction_bits, where)
        return tensors

    def _gradients(self, pairs, wanted, flags):
        """Gradients of the tensors in `wanted`, then those of `known` unless the model is sharded."""
        if not pairs:
            return [None] * (len(wanted) + (0 if self.sharded else len(self.known)))
        tensors, grads = zip(*pairs, strict=True)
        if self.sharded:
            torch.autograd.backward(tensors, [poisoned(gradient, flags) for gradient in grads])
            return [leaf.grad for leaf in wanted]
        with hooks_paused(self.known):
            return list(torch.autograd.grad(tensors, [*wanted, *self.known], grads, allow_unused=True))


class _Replay(torch.autograd.Function):
    """Run over segments as one autograd function: `(*state, *parameters) -> (*outputs, *state)`."""

    @staticmethod
    def forward(ctx, run, count, *tensors):
        """Run every segment once."""
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
        """Run the segments again, last to first, and return the gradients of all inputs."""
        if torch.is_grad_enabled():
            raise RuntimeError("replayed segments have no second derivative (create_graph=True)")
        grad_state, totals = ctx.run.backward(grads[: ctx.num_outputs], grads[ctx.num_outputs :])
        return (None, None, *grad_state, *([None] if ctx.run.sharded else totals))


def _compact(tensor):
    """The tensor; a copy of it if it is a view into a larger storage, which it would keep alive."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def sum_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Checksum of a tensor: the sum of its elements' bits as integers, an int64 scalar on its device.

    Args:
        tensor: The tensor, of any dtype whose elements have 1, 2, 4 or 8 bytes.
    """
    tensor = tensor.detach().contiguous()
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(-1).view(kinds[tensor.element_size()]).sum(dtype=torch.int64)
