"""The reversible stack of one model: carries the streams from layer to layer through the model's own loop."""

import collections
import contextlib
import copy
import inspect
import math
import threading
import warnings
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from r3mem_fast.kernels import coupling

from ..integrations.compat import cache_name, captured_outputs, without_cache
from .node import IntegrityError, LayerNode, ReversibleState, Step, StoredValue, Update, poisoned
from .past import MemoryNotReadError, layer_index, memory_cache, past_of, viewed

# One bit for a velocity larger than every position that was seen, one for a longer or stranger text.
_HEADROOM_BITS = 2


class Route(NamedTuple):
    """The order in which the layers run, and, by layer, how each one's branch joins the streams."""

    order: tuple[int, ...]
    updates: tuple[Update, ...]


class ReversibleStack:
    """Settings and bookkeeping of a model's reversible layers.

    bits: side bits of each layer. route: the order of the layers, first to last unless they are read backward.
    fraction_bits: of the streams, None until chosen from the first input.
    offload_side_bits: they wait for the backward pass in host memory.
    integrity: "auto" (raise at once on the CPU, NaN elsewhere), "raise" or "nan".
    bypassed: run the ordinary network. stored: compute the same network with activations stored by autograd, to
    compare with.
    """

    def __init__(self, branches, bits, fraction_bits, integrity, offload_side_bits=False):
        self.branches, self.bits, self.fraction_bits = branches, bits, fraction_bits
        self.integrity = integrity
        self.route = self.route_through(range(len(bits)))
        self.bypassed = False
        self.stored = False
        self.recording = None
        self.offload_side_bits = offload_side_bits
        self._forgetting = self._on_host = False
        self.checkpointing_refused = False
        self._pending = {}  # flags of passes since they were last asked for, by device
        self._observed = None
        self._awaited = None  # the cache that every pass must read, while one must
        self._passing = _Passing()

    def __deepcopy__(self, memo):
        clone = memo[id(self)] = copy.copy(self)
        clone._passing, clone._pending, clone.recording, clone._awaited = _Passing(), {}, None, None
        clone.hooks = copy.deepcopy(self.hooks, memo)
        return clone

    def route_through(self, order, inverse=(), inverse_bits=None) -> Route:
        """The route through the layers in this order, those in `inverse` in that form, with their own momentum."""
        updates = [
            Update("inverse", inverse_bits) if i in inverse else Update("momentum", b) for i, b in enumerate(self.bits)
        ]
        first = next((index for index in order if updates[index].form == "momentum"), None)
        if first is not None:
            updates[first] = Update("momentum", None)
        return Route(tuple(order), tuple(updates))

    @torch.compiler.disable
    def run(self, layer, index, hidden, kwargs):
        """One layer's forward: called by the layer in place of its own."""
        if self._observed is not None:
            return self._observe(layer, hidden, kwargs)
        cache = memory_cache(kwargs)
        if cache is not None:
            implementation = layer.reversible.decoder.config._attn_implementation
            if "attention_mask" not in kwargs and cache.prefix_length:
                raise MemoryNotReadError(
                    f"a {type(layer).__name__} is given no attention_mask, in which a memory would be let in"
                )
            mask = cache.widened(kwargs.get("attention_mask"), hidden, layer_index(layer), implementation)
            kwargs = {**kwargs, "attention_mask": mask}
        if self.bypassed:
            return self._branch(index, kwargs)(layer, hidden, viewed(kwargs))
        if getattr(layer, "_is_replica", False):
            raise RuntimeError(
                "a reversible model does not run under nn.DataParallel, whose replicas have no parameters of their "
                "own; use DistributedDataParallel (torchrun, accelerate launch), or show the process one GPU"
            )
        if forward_ad._current_level >= 0:
            raise RuntimeError("a reversible layer has no forward-mode derivative; call restore(model) first")
        state = self._state_for(layer, index, hidden)
        if self.stored:
            hidden = self._run_stored(layer, index, hidden, kwargs, state)
        else:
            hidden = self._run_reversible(layer, index, hidden, kwargs, state)
        if index == self.route.order[-1]:
            return self._leave(state, hidden)
        self._passing.hand_on(state, hidden)
        return hidden

    @contextlib.contextmanager
    def must_read(self, cache):
        """While this lasts every pass of the decoder must be given this `PrefixCache`, and at least one must run.

        Raises MemoryNotReadError if the model's own code drops the cache on the way to its decoder, or trades it for
        another.
        """
        before, self._awaited = self._awaited, cache
        passes = cache.passes
        try:
            yield
        finally:
            self._awaited = before
        if cache.passes == passes:
            raise MemoryNotReadError("the model's layers did not run behind the memory that they were to read")

    @contextlib.contextmanager
    def forgetting(self):
        """While this lasts, layers compute exactly what they do in training, and keep nothing to go back by."""
        before, self._forgetting = self._forgetting, True
        try:
            yield
        finally:
            self._forgetting = before

    @contextlib.contextmanager
    def on_host(self):
        """Let what a forward pass leaves for the backward pass wait in host memory while this lasts.

        That is streams, side bits, and what autograd saves of all else.
        """
        before, self._on_host = self._on_host, True
        try:
            with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
                yield
        finally:
            self._on_host = before

    def _branch(self, index, kwargs):
        """A layer's branch; if adapters are to act on some rows alone, one in which they do."""
        branch_of = self._plain if self.bypassed else self.branches[index]
        cache = memory_cache(kwargs)
        if cache is None or cache.adapted_rows is None:
            return branch_of

        def branch_with_rows(layer, hidden, kwargs):
            layer.reversible.adapted_rows = (cache.adapted_rows, hidden.shape[1])
            try:
                return branch_of(layer, hidden, kwargs)
            finally:
                layer.reversible.adapted_rows = None

        return branch_with_rows

    def _run_reversible(self, layer, index, hidden, kwargs, state):
        update = self.route.updates[index]
        branch_of = self._branch(index, kwargs)
        wanted = torch.is_grad_enabled() and (hidden.requires_grad or _any_requires_grad(layer, kwargs))
        if wanted or self.recording is not None:
            step = Step(layer, branch_of, kwargs, hidden.device, evaluated_once=self._forgetting)
            if self._forgetting:
                _refuse_captured_outputs(kwargs)
                state.begin_step(None)
                branch, new_states = step.evaluate(state.input_of_next(hidden))
                step.write_cache(new_states)
                with torch.no_grad():
                    return state.forward(branch, update)
            if wanted:
                _refuse_captured_outputs(kwargs)
                hidden, *new_states = LayerNode.apply(self, state, step, update, hidden, *step.inputs())
                step.write_cache(new_states)
                return hidden
            state.begin_step(step)
            branch, new_states = step.evaluate(state.input_of_next(hidden))
            step.write_cache(new_states)
            return state.forward(branch, update)
        state.begin_step(None)
        branch = branch_of(layer, state.input_of_next(hidden), viewed(kwargs))
        if branch.requires_grad:
            raise ValueError(
                f"a tensor that requires a gradient enters a frozen {type(layer).__name__} from outside (by a hook, "
                "say) and would get none. Register it as a parameter of the layer, or pass it as an argument."
            )
        with _versioned_tensors():
            return state.forward(branch, update)

    def _run_stored(self, layer, index, hidden, kwargs, state):
        """The same values, differentiated by autograd through a float surrogate of the streams."""
        update = self.route.updates[index]
        momentum = 0.0 if update.bits is None else 2.0**-update.bits
        if state.level == 0:
            hidden = StoredValue.apply(hidden, state.input_of_next(hidden))
            state.surrogates = collections.defaultdict(lambda: torch.zeros_like(hidden, dtype=torch.float32))
        # Through an alias and in float32: gradients are then added in the order of the reversible backward pass.
        branch = self._branch(index, kwargs)(layer, hidden.view_as(hidden), viewed(kwargs))
        velocity, addend = state.surrogates[update.form], (1.0 - momentum) * branch.float()
        velocity = (velocity + addend) / momentum if update.form == "inverse" else momentum * velocity + addend
        state.surrogates[update.form] = velocity
        surrogate = hidden + velocity.to(hidden.dtype)
        state.begin_step(None)
        with torch.no_grad():
            value = state.forward(branch.detach(), update)
        return StoredValue.apply(surrogate, value)

    def _state_for(self, layer, index, hidden):
        state = self._passing.take(hidden)
        if state is not None:
            return state
        if index == self.route.order[0]:
            with _versioned_tensors(), torch.no_grad():
                on_host = self.offload_side_bits or self._on_host
                return ReversibleState(hidden.detach(), self.fraction_bits, self.recording, on_host)
        raise RuntimeError(
            f"layer {index} ({type(layer).__name__}) of a reversible model did not receive the output of the layer "
            "before it, unchanged: a hook, a wrapper or the model's own loop replaced it or edited it in place "
            "between the layers. Move that change into a layer, or call restore(model)."
        )

    def _leave(self, state, hidden):
        """The last layer's output. A range or non-finite flag makes it NaN, or raises."""
        if self._on_host and state.start is not None:
            state.to_host()
        if hidden.device.type == "cpu" and not state.flags.any():
            return hidden
        self.report(state)
        return poisoned(hidden, state.flags)

    def report_if_known(self, state, where=""):
        """Report flags now where reading them does not synchronise, or where raising at once was asked for."""
        if (self.integrity == "raise" or state.flags.device.type == "cpu") and state.flags.any():
            self.report(state, where)

    def report(self, state, where=""):
        """Take note of a pass's flags: raise IntegrityError now, where that is wanted, or when next asked."""
        flags = state.flags
        if self.integrity == "raise" or (self.integrity == "auto" and flags.device.type == "cpu"):
            raise_for(flags, self.fraction_bits, where)
        elif flags.device in self._pending:
            # In place, always: a CUDA graph goes on writing where it wrote when it was captured.
            self._pending[flags.device] |= flags
        else:
            with _versioned_tensors():
                self._pending[flags.device] = flags.clone()

    def raise_pending(self):
        """Raise IntegrityError if any pass since the last call set a flag. Synchronises."""
        found = [flags.clone() for flags in self._pending.values()]
        for flags in self._pending.values():
            flags.zero_()
        for flags in found:
            raise_for(flags, self.fraction_bits)

    @torch.compiler.disable
    def conclude(self, decoder, args, kwargs, output):
        """Forward hook of the decoder, called also if it raised: nothing stays behind, no flag goes unseen."""
        state, cache = self._passing.drop(), memory_cache(kwargs)
        if output is None:
            if cache is not None:
                cache.abandon_pass()
            return
        if state is not None:  # the last layer was skipped
            self.report(state)
        if cache is not None:
            cache.end_pass()

    @torch.compiler.disable
    def prepare(self, decoder, args, kwargs):
        """Forward pre-hook of the decoder: settle the cache and, in the first pass, the fraction bits."""
        if self._observed is not None:
            return None
        cache = memory_cache(kwargs)
        if self._awaited is not None and cache is not self._awaited:
            raise MemoryNotReadError(
                f"a {type(decoder).__name__} was to read a memory, and is given "
                f"{'no cache' if cache is None else 'the cache of another one'} by the model around it"
            )
        if cache is not None:
            # Not among all modules: asked for in every pass, that would take as long as some layers.
            lists = (child for child in decoder.children() if isinstance(child, nn.ModuleList))
            layers = [layer for child in lists for layer in child if hasattr(layer, "reversible")]
            args, kwargs = (), cache.begin_pass(decoder, layers, self.route.order, args, kwargs)
        if self.bypassed:
            return args, kwargs
        self._passing.drop()
        if self.fraction_bits is None:
            self._choose_fraction_bits(decoder, args, kwargs)
        if decoder.training and torch.is_grad_enabled() and cache_name(kwargs) is None:
            # A cache that nobody passed would keep every layer's keys and values beyond the backward pass.
            if kwargs.get("use_cache"):
                warnings.warn(
                    "use_cache=True while training a reversible model: no cache is made. Pass one if you want it "
                    "filled.",
                    stacklevel=2,
                )
            if "use_cache" in inspect.signature(decoder.forward).parameters:
                kwargs["use_cache"] = False
        return args, kwargs

    def _choose_fraction_bits(self, decoder, args, kwargs):
        if any(hasattr(p, "full_tensor") for p in decoder.parameters()):
            raise ValueError(
                "fraction_bits='auto' needs the whole model on one device: run one forward pass before sharding it, "
                "or pass a number"
            )
        self._observed = torch.zeros(())
        try:
            with torch.random.fork_rng(), torch.no_grad():
                decoder.forward(*args, **_without_past(args, kwargs))
            largest = self._observed.item()
        finally:
            self._observed = None
        if not math.isfinite(largest):
            raise IntegrityError("fraction_bits='auto': the plain network's hidden states are not finite")
        magnitude = math.ceil(math.log2(max(largest, 1.0)))
        fraction_bits = min(31 - _HEADROOM_BITS - magnitude, coupling.MAX_FRACTION_BITS)
        if fraction_bits < 0:
            raise IntegrityError(
                f"fraction_bits='auto': hidden states of {largest:.3g} leave no room in 32-bit streams"
            )
        self.fraction_bits = fraction_bits

    def _plain(self, layer, hidden, kwargs):
        output = type(layer).unreversed.forward(layer, hidden, **kwargs)
        layer.reversible.returns_tuple = isinstance(output, tuple)
        return output[0] if layer.reversible.returns_tuple else output

    def _observe(self, layer, hidden, kwargs):
        output = self._plain(layer, hidden, kwargs)
        largest = torch.maximum(hidden.abs().amax(), output.abs().amax()).float()
        self._observed = torch.maximum(self._observed.to(largest.device), largest)
        return output


def _without_past(args, kwargs):
    """The arguments of a pass over the new tokens alone: no cache, and no mask of what it holds."""
    kwargs = {**without_cache(kwargs), "use_cache": False}
    tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    tokens = args[0] if tokens is None and args else tokens
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and tokens is not None:
        kwargs["attention_mask"] = mask[..., -tokens.shape[1] :]
    return kwargs


class _Passing(threading.local):
    """The state on its way from one layer to the next, recognised by the very tensor that carries it."""

    def __init__(self):
        self.drop()

    def drop(self):
        """Forget the state, and return it if there was one."""
        state = getattr(self, "_state", None)
        self._state = self._carrier = self._version = None
        return state

    def __reduce__(self):
        raise TypeError("a reversible model cannot be pickled; call restore(model), or save its state_dict")

    def hand_on(self, state, hidden):
        # An alias: it keeps the memory from being reused, and shares the version counter.
        self._state, self._carrier = state, hidden.detach()
        self._version, self._differentiable = hidden._version, hidden.requires_grad

    def take(self, hidden):
        """The state that `hidden` carries, or None if it is not, unchanged, what was handed on."""
        carrier, version = self._carrier, self._version
        state = self.drop()
        if (
            state is None
            or not isinstance(hidden, torch.Tensor)
            or hidden.data_ptr() != carrier.data_ptr()
            or hidden.shape != carrier.shape
            or hidden.dtype != carrier.dtype
            or hidden._version != version
            or (self._differentiable and torch.is_grad_enabled() and not hidden.requires_grad)
        ):
            return None
        return state


def _any_requires_grad(layer, kwargs):
    if any(p.requires_grad for p in layer.parameters()):
        return True
    memory = memory_cache(kwargs)
    cached = kwargs.get(cache_name(kwargs))
    past = [t for c in getattr(cached, "layers", ()) for t in (c.keys, c.values)]
    past += [] if memory is None else past_of(memory, layer_index(layer))
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in [*tree_leaves(kwargs), *past])


@contextlib.contextmanager
def _versioned_tensors():
    """Make ordinary tensors also in inference mode, whose own have no version to tell an in-place edit by."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def raise_for(flags, fraction_bits, where=""):
    """Raise IntegrityError for the flags that are set, if any."""
    non_finite, out_of_range, checksum_mismatch = flags.tolist()
    if non_finite:
        raise IntegrityError(
            "a reversible layer computed a NaN or an infinity; look for non-finite weights or inputs, or an overflow "
            "in float16"
        )
    if out_of_range:
        raise IntegrityError(
            f"the residual stream left the range of ±{2 ** (31 - fraction_bits)} that fraction_bits="
            f"{fraction_bits} gives; pass MomentumCoupling(fraction_bits='auto'), or a smaller number"
        )
    if checksum_mismatch:
        raise IntegrityError(
            f"{where}the backward pass did not find again what the forward pass computed, so its gradients would be "
            "wrong. Likely causes: a branch that is not deterministic (atomics, a random source of its own), "
            "parameters or buffers changed through .data between the passes, global settings changed in between. "
            "check_inverse(model, input_ids=..., per_layer=True) names the first layer that differs."
        )


def _refuse_captured_outputs(kwargs):
    wrong = [key for key in captured_outputs() if key != "hidden_states" and not key.startswith("_")]
    if wrong or kwargs.get("output_attentions"):
        name = wrong[0] if wrong else "attentions"
        raise ValueError(
            f"output_{name}=True while gradients are on: a reversible layer discards the graph of its first "
            "evaluation, so these tensors would carry no gradient. Use torch.no_grad(), or restore(model)."
        )
