"""The reversible stack of one model: runs the layers that the model's own loop calls, and carries the streams."""

import collections
import contextlib
import copy
import enum
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from ..integrations.capture import implementation_of
from ..integrations.compat import cache_name, captured_outputs
from .fraction_bits import Observer, fraction_bits_for, run_to_observe
from .inference import versioned_tensors
from .integrity import Integrity, poisoned
from .node import LayerNode, StoredValue
from .past import MemoryNotReadError, PassCache, layer_index, memory_cache, past_of, viewed
from .relay import Relay
from .route import route_through
from .step import Step
from .streams import Streams
from .untraced import untraced


class Mode(enum.Enum):
    """What the layers of a reversible model compute, and what they keep for a backward pass."""

    REVERSIBLE = "the coupling; where a gradient is wanted, what leads back is kept"
    FORGETTING = "the coupling, as in training; nothing that leads back is kept"
    STORED = "the coupling, with activations that autograd stores, to compare with"
    PLAIN = "the ordinary network"
    OBSERVED = "the ordinary network, while its hidden states are looked at to choose fraction bits"


class ReversibleStack:
    """Settings and bookkeeping of a model's reversible layers.

    Args:
        branches: Branch function of each layer, `(layer, hidden, kwargs) -> tensor`.
        bits: Side bits of each layer for an element.
        fraction_bits: Binary places of the streams; None: they are chosen in the first pass.
        integrity: "auto" (raise at once on the CPU, NaN elsewhere), "raise" or "nan".
        offload_side_bits: Whether side bits wait for the backward pass in host memory.

    Attributes:
        mode: What the layers compute; changed by `in_mode`.
        route: The order of the layers, first to last unless they are read backward.
        integrity: Acts on the flags of passes.
        recording: Object that is told of every level of the streams; None: there is none.
    """

    def __init__(
        self,
        branches: Sequence[Callable],
        bits: Sequence[int],
        fraction_bits: int | None,
        integrity: str,
        offload_side_bits: bool = False,
    ):
        self.branches, self.bits, self.fraction_bits = branches, bits, fraction_bits
        self.integrity = Integrity(integrity)
        self.mode = Mode.REVERSIBLE
        self.route = route_through(bits, range(len(bits)))
        self.recording: Any = None
        self.offload_side_bits = offload_side_bits
        self.checkpointing_refused = False
        self.hooks: list = []  # on the decoder
        self._on_host = False
        self._observer: Observer | None = None
        self._awaited: PassCache | None = None  # the cache that every pass must read, while one must
        self._relay = Relay()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ReversibleStack":
        clone = memo[id(self)] = copy.copy(self)
        clone._relay, clone.recording, clone._awaited = Relay(), None, None
        clone.integrity = copy.deepcopy(self.integrity, memo)
        clone.hooks = copy.deepcopy(self.hooks, memo)
        return clone

    @contextlib.contextmanager
    def in_mode(self, mode: Mode) -> Iterator[None]:
        """Let the layers run in another mode in the block: a context manager.

        Args:
            mode: The mode.

        Yields:
            Nothing.
        """
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before

    def forgetting(self) -> contextlib.AbstractContextManager[None]:
        """Let the layers keep nothing for a backward pass in the block: a context manager.

        It changes `Mode.REVERSIBLE` to `Mode.FORGETTING`. Other modes stay.
        """
        return self.in_mode(Mode.FORGETTING if self.mode is Mode.REVERSIBLE else self.mode)

    @contextlib.contextmanager
    def on_host(self) -> Iterator[None]:
        """Let forward passes in the block keep in host memory what their backward passes need: a context manager.

        That is streams, side bits, and what autograd saves for operations outside of the layers.

        Yields:
            Nothing.
        """
        before, self._on_host = self._on_host, True
        try:
            with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
                yield
        finally:
            self._on_host = before

    @contextlib.contextmanager
    def must_read(self, cache: PassCache) -> Iterator[None]:
        """Check that a pass of the decoder runs in the block, and that each is given this cache: a context manager.

        Args:
            cache: A cache that holds a memory.

        Yields:
            Nothing.

        Raises:
            MemoryNotReadError: The model's own code drops the cache on the way to its decoder, or replaces it by
                another one, or the decoder does not run.
        """
        before, self._awaited = self._awaited, cache
        passes = cache.passes
        try:
            yield
        finally:
            self._awaited = before
        if cache.passes == passes:
            raise MemoryNotReadError("the model's layers did not run behind the memory that they were to read")

    @untraced
    def prepare(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Prepare the cache and, in the first pass, choose the fraction bits: forward pre-hook of the decoder.

        Args:
            decoder: The decoder.
            args: Arguments that it is called with.
            kwargs: Keyword arguments that it is called with.

        Returns:
            Arguments and keyword arguments to use in their place; None: these.

        Raises:
            MemoryNotReadError: The cache is not the one that must be read.
        """
        if self.mode is Mode.OBSERVED:
            return None
        cache = memory_cache(kwargs)
        if self._awaited is not None and cache is not self._awaited:
            raise MemoryNotReadError(
                f"a {type(decoder).__name__} was to read a memory, and is given "
                f"{'no cache' if cache is None else 'the cache of another one'} by the model around it"
            )
        if cache is not None:
            # Not looked for among all modules: in every pass, that would take as long as some layers do.
            lists = (child for child in decoder.children() if isinstance(child, nn.ModuleList))
            layers = [layer for child in lists for layer in child if hasattr(layer, "reversible")]
            args, kwargs = (), cache.begin_pass(decoder, layers, self.route.order, args, kwargs)
        if self.mode is Mode.PLAIN:
            return args, kwargs
        self._relay.drop()
        if self.fraction_bits is None:
            self.fraction_bits = self._chosen_fraction_bits(decoder, args, kwargs)
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

    @untraced
    def run(self, layer: Any, index: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Run one layer; the layer calls this in place of its own forward pass.

        Args:
            layer: The layer.
            index: Its index.
            hidden: Its input, `[batch, tokens, width]`.
            kwargs: More arguments that the model's loop gives it.

        Returns:
            Its output, `[batch, tokens, width]`.
        """
        if self.mode is Mode.OBSERVED:
            output = plain_output(layer, hidden, kwargs)
            if self._observer is not None:
                self._observer.see(hidden, output)
            return output
        kwargs = _with_memory_in_mask(layer, hidden, kwargs)
        if self.mode is Mode.PLAIN:
            return self._branch(index, kwargs)(layer, hidden, viewed(kwargs))
        _refuse_surroundings(layer)
        streams = self._streams_of(layer, index, hidden)
        if self.mode is Mode.STORED:
            hidden = self._run_stored(layer, index, hidden, kwargs, streams)
        else:
            hidden = self._run_reversible(layer, index, hidden, kwargs, streams)
        if index == self.route.order[-1]:
            return self._leave(streams, hidden)
        self._relay.hand_on(streams, hidden)
        return hidden

    @untraced
    def conclude(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Finish a pass, and report its flags: forward hook of the decoder, called also if the decoder raised.

        Args:
            decoder: The decoder.
            args: Arguments that it was called with.
            kwargs: Keyword arguments that it was called with.
            output: Its output; None if it raised.
        """
        streams, cache = self._relay.drop(), memory_cache(kwargs)
        if output is None:
            if cache is not None:
                cache.abandon_pass()
            return
        if streams is not None:  # the last layer was skipped
            self.integrity.report(streams.flags, streams.fraction_bits)
        if cache is not None:
            cache.end_pass()

    def _run_reversible(self, layer, index, hidden, kwargs, streams):
        update, branch_of = self.route.updates[index], self._branch(index, kwargs)
        differentiated = torch.is_grad_enabled() and (hidden.requires_grad or _any_requires_grad(layer, kwargs))
        if not differentiated and self.recording is None:
            return _run_inference(layer, branch_of, update, hidden, kwargs, streams)
        if differentiated:
            _refuse_captured_outputs(kwargs)
        forgets = self.mode is Mode.FORGETTING
        step = Step(layer, branch_of, kwargs, hidden.device, evaluated_once=forgets)
        if differentiated and not forgets:
            hidden, *new_states = LayerNode.apply(self.integrity, streams, step, update, hidden, *step.inputs())
        else:
            branch, new_states = step.evaluate(streams.input_of_next(hidden))
            with torch.no_grad():
                hidden = streams.forward(branch, update, None if forgets else step)
        step.write_cache(new_states)
        return hidden

    def _run_stored(self, layer, index, hidden, kwargs, streams):
        """Run a layer with the same values; autograd differentiates it through a float surrogate of the streams."""
        update = self.route.updates[index]
        momentum = 0.0 if update.bits is None else 2.0**-update.bits
        if streams.level == 0:
            hidden = StoredValue.apply(hidden, streams.input_of_next(hidden))
            streams.surrogates = collections.defaultdict(lambda: torch.zeros_like(hidden, dtype=torch.float32))
        # Through an alias and in float32: gradients are then added in the order of the reversible backward pass.
        branch = self._branch(index, kwargs)(layer, hidden.view_as(hidden), viewed(kwargs))
        velocity, addend = streams.surrogates[update.form], (1.0 - momentum) * branch.float()
        velocity = (velocity + addend) / momentum if update.form == "inverse" else momentum * velocity + addend
        streams.surrogates[update.form] = velocity
        surrogate = hidden + velocity.to(hidden.dtype)
        with torch.no_grad():
            value = streams.forward(branch.detach(), update)
        return StoredValue.apply(surrogate, value)

    def _branch(self, index, kwargs):
        """The branch function of a layer. If adapters are to act on some tokens alone, they do so in it."""
        branch_of = plain_output if self.mode is Mode.PLAIN else self.branches[index]
        cache = memory_cache(kwargs)
        if cache is None or cache.adapted_tokens is None:
            return branch_of

        def branch_with_some_tokens_adapted(layer, hidden, kwargs):
            layer.reversible.adapted_tokens = (cache.adapted_tokens, hidden.shape[1])
            try:
                return branch_of(layer, hidden, kwargs)
            finally:
                layer.reversible.adapted_tokens = None

        return branch_with_some_tokens_adapted

    def _streams_of(self, layer, index, hidden):
        """The streams that a layer's input carries, or new ones at the first layer."""
        streams = self._relay.take(hidden)
        if streams is not None:
            return streams
        if index == self.route.order[0]:
            with versioned_tensors(), torch.no_grad():
                on_host = self.offload_side_bits or self._on_host
                bits = cast(int, self.fraction_bits)  # `prepare` has chosen them
                return Streams(hidden.detach(), bits, self.recording, on_host)
        raise RuntimeError(
            f"layer {index} ({type(layer).__name__}) of a reversible model did not receive the output of the layer "
            "before it, unchanged: a hook, a wrapper or the model's own loop replaced it or edited it in place "
            "between the layers. Move that change into a layer, or call restore(model)."
        )

    def _leave(self, streams, hidden):
        """The output of the last layer. If a flag is set, it is NaN, or IntegrityError is raised."""
        if self._on_host and streams.start is not None:
            streams.to_host()
        if hidden.device.type == "cpu" and not streams.flags.any():
            return hidden
        self.integrity.report(streams.flags, streams.fraction_bits)
        return poisoned(hidden, streams.flags)

    def _chosen_fraction_bits(self, decoder, args, kwargs):
        self._observer = Observer()
        try:
            with self.in_mode(Mode.OBSERVED):
                run_to_observe(decoder, args, kwargs)
            return fraction_bits_for(self._observer.largest.item())
        finally:
            self._observer = None


def plain_output(layer: Any, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Run a layer as it was before `make_reversible`.

    Args:
        layer: A reversible layer.
        hidden: Its input, `[batch, tokens, width]`.
        kwargs: More arguments that the model's loop gives it.

    Returns:
        Its output, `[batch, tokens, width]`.
    """
    output = type(layer).unreversed.forward(layer, hidden, **kwargs)
    layer.reversible.returns_tuple = isinstance(output, tuple)
    return output[0] if layer.reversible.returns_tuple else output


def _run_inference(layer, branch_of, update, hidden, kwargs, streams):
    branch = branch_of(layer, streams.input_of_next(hidden), viewed(kwargs))
    if branch.requires_grad:
        raise ValueError(
            f"a tensor that requires a gradient enters a frozen {type(layer).__name__} from outside (by a hook, "
            "say) and would get none. Register it as a parameter of the layer, or pass it as an argument."
        )
    with versioned_tensors():
        return streams.forward(branch, update)


def _with_memory_in_mask(layer, hidden, kwargs):
    """The arguments of a layer. If their cache holds a memory, the attention mask lets the layer read it."""
    cache = memory_cache(kwargs)
    if cache is None:
        return kwargs
    if "attention_mask" not in kwargs and cache.prefix_length:
        raise MemoryNotReadError(
            f"a {type(layer).__name__} is given no attention_mask, in which a memory would be let in"
        )
    implementation = implementation_of(layer.reversible.decoder.config)
    mask = cache.widened(kwargs.get("attention_mask"), hidden, layer_index(layer), implementation)
    return {**kwargs, "attention_mask": mask}


def _refuse_surroundings(layer):
    if getattr(layer, "_is_replica", False):
        raise RuntimeError(
            "a reversible model does not run under nn.DataParallel, whose replicas have no parameters of their "
            "own; use DistributedDataParallel (torchrun, accelerate launch), or show the process one GPU"
        )
    if forward_ad._current_level >= 0:
        raise RuntimeError("a reversible layer has no forward-mode derivative; call restore(model) first")


def _any_requires_grad(layer, kwargs):
    if any(p.requires_grad for p in layer.parameters()):
        return True
    memory = memory_cache(kwargs)
    cached = kwargs.get(cache_name(kwargs))
    past = [t for c in getattr(cached, "layers", ()) for t in (c.keys, c.values)]
    past += [] if memory is None else past_of(memory, layer_index(layer))
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in [*tree_leaves(kwargs), *past])


def _refuse_captured_outputs(kwargs):
    wrong = [key for key in captured_outputs() if key != "hidden_states" and not key.startswith("_")]
    if wrong or kwargs.get("output_attentions"):
        name = wrong[0] if wrong else "attentions"
        raise ValueError(
            f"output_{name}=True while gradients are on: a reversible layer discards the graph of its first "
            "evaluation, so these tensors would carry no gradient. Use torch.no_grad(), or restore(model)."
        )
