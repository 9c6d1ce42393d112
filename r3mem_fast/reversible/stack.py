"""The reversible stack of one model: runs the layers that the model's own loop calls, and carries the streams."""

import contextlib
import copy
import enum
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..integrations.capture import implementation_of
from ..integrations.compat import cache_name, without_new_cache
from ..integrations.peft import disabled
from . import stored
from .adapter import ADAPTER
from .branches import hidden_of
from .forms import Update
from .fraction_bits import Observer, fraction_bits_for, run_to_observe
from .inference import versioned_tensors
from .integrity import Integrity, poisoned
from .node import LayerNode
from .past import (
    MemoryNotReadError,
    PassCache,
    goes_without_cache,
    layer_index,
    memory_cache,
    viewed,
)
from .refusals import refuse_captured_outputs, refuse_evaluated_bdia, refuse_surroundings
from .relay import Relay
from .route import Route
from .step import Step
from .streams import Streams
from .trainable import idle_parameters, is_differentiated
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
        updates: How each layer's branch joins the streams.
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
        updates: Sequence[Update],
        fraction_bits: int | None,
        integrity: str,
        offload_side_bits: bool = False,
    ):
        self.branches, self.bits, self.fraction_bits = branches, bits, fraction_bits
        self.integrity = Integrity(integrity)
        self.mode = Mode.REVERSIBLE
        self.route = Route(tuple(range(len(updates))), tuple(updates))
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
        if cache is not None or self.mode is not Mode.PLAIN:
            kwargs.pop("logits_to_keep", None)  # for which Gemma 4 leaves tokens out between its layers
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
        if torch.is_grad_enabled() and cache_name(kwargs) is None and goes_without_cache(decoder, args, kwargs):
            if kwargs.get("use_cache"):
                doing = "training" if decoder.training else "differentiating"
                warnings.warn(
                    f"use_cache=True while {doing} a reversible model: no cache is made. Pass one if you want it "
                    "filled.",
                    stacklevel=2,
                )
            args, kwargs = without_new_cache(decoder, args, kwargs)
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
        refuse_surroundings(layer)
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
        update, branch_of = self._update(layer, index, hidden), self._branch(index, kwargs)
        idle = idle_parameters(layer, kwargs)
        differentiated = is_differentiated(layer, hidden, kwargs, idle)
        if not differentiated and self.recording is None:
            return _run_inference(layer, branch_of, update, hidden, kwargs, streams)
        if differentiated:
            refuse_captured_outputs(kwargs)
            refuse_evaluated_bdia(layer, update)
        forgets = self.mode is Mode.FORGETTING
        step = Step(layer, branch_of, kwargs, hidden.device, idle=idle, evaluated_once=forgets)
        if differentiated and not forgets:
            hidden, *new_states = LayerNode.apply(self.integrity, streams, step, update, hidden, *step.inputs())
        else:
            branch, new_states = step.evaluate(streams.input_of_next(hidden))
            with torch.no_grad():
                hidden = streams.forward(branch, update, None if forgets else step)
        step.write_states(new_states)
        return hidden

    def _run_stored(self, layer, index, hidden, kwargs, streams):
        """Run a layer with the same values; autograd differentiates it through a float surrogate of the streams."""
        update = self._update(layer, index, hidden)
        if streams.level == 0:
            hidden = stored.enter(streams, hidden)
        # Through an alias: gradients are then added in the order of the reversible backward pass.
        branch = self._branch(index, kwargs)(layer, hidden.view_as(hidden), viewed(kwargs))
        return stored.joined(streams, update, hidden, branch)

    def _update(self, layer, index, hidden):
        """How a layer's branch joins the streams now. BDIA draws a sign for each row, as dropout does masks."""
        update = self.route.updates[index]
        if (adapter := layer._modules.get(ADAPTER)) is not None:  # the layer's own, also where the model is a copy
            return update._replace(adapter=adapter)
        if update.form != "bdia":
            return update
        signs = torch.zeros(len(hidden), dtype=torch.int32, device=hidden.device)
        return update._replace(signs=signs.random_(0, 2).mul_(2).sub_(1) if layer.training else signs)

    def _branch(self, index, kwargs):
        """The branch function of a layer. If adapters are to act on some tokens alone, they do so in it."""
        branch_of = plain_output if self.mode is Mode.PLAIN else self.branches[index]
        cache = memory_cache(kwargs)
        adapted = None if cache is None else cache.adapted_tokens  # of this pass, also when it is evaluated again
        if adapted is None:
            return branch_of

        def branch_with_some_tokens_adapted(layer, hidden, kwargs):
            if not adapted:  # and nothing is computed to be left out
                with disabled(layer.reversible.adapters):
                    return branch_of(layer, hidden, kwargs)
            layer.reversible.adapted_tokens = (adapted, hidden.shape[-2])
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
                first_form = self.route.updates[index].form
                return Streams(hidden.detach(), bits, self.recording, on_host, first_form)
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
    return hidden_of(layer, type(layer).unreversed.forward(layer, hidden, **kwargs), kwargs)


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
