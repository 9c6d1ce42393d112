"""`make_reversible` and `restore`: a Hugging Face model's decoder layers become reversible, in place."""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..integrations.scoped import without_hooks
from .adapter import ADAPTER, BottleneckAdapter
from .branches import branch_of, generic_branch
from .coupling import Coupling, MomentumCoupling
from .experts import order_experts
from .reference import ReferenceCheck
from .stack import Mode, ReversibleStack
from .untraced import untraced

_INTEGRITY = ("auto", "raise", "nan")


def make_reversible(
    model: Any, coupling: Coupling | None = None, *, integrity: str = "auto", offload_side_bits: bool = False
) -> Any:
    """Make the decoder layers of a causal language model reversible, in place.

    A backward pass then reconstructs each layer's input from its output instead of storing it: between the passes a
    layer keeps `bits / 8` bytes an element, and the gradients are those of the same network with stored activations.
    The network computed is the coupling's, by default the momentum network (see `MomentumCoupling`), in training and
    in inference alike.

    Args:
        model: A `transformers` causal language model, or a PEFT model of one. Adapters may be put on before or after;
            before, where the coupling has adapters of its own, which PEFT would freeze.
        coupling: Settings of the coupling; None: `MomentumCoupling()`, which keeps 4 side bits.
        integrity: What happens when values leave the range of the streams, are not finite, or are not reconstructed
            exactly. "auto": on the CPU, IntegrityError is raised at once; on a GPU, outputs or gradients become NaN
            without synchronising, until `check_integrity(model)` raises. "raise": IntegrityError is raised at once on
            every device, which synchronises with a GPU. "nan": every device does what "auto" does on a GPU.
        offload_side_bits: Whether the side bits wait for the backward pass in host memory, so that on a GPU nothing
            grows with the depth. They are copied in the order of the current stream.

    Returns:
        The same model.

    Raises:
        TypeError: It is no such model, or has not one list of layers. It is then as it was.
        ValueError: It is an encoder-decoder, its layers hand on more than their hidden state, it is reversible
            already, the `forward` of one of its layers was replaced on the instance, or a setting does not fit. It is
            then as it was.
    """
    coupling = MomentumCoupling() if coupling is None else coupling
    if not isinstance(coupling, Coupling):
        raise TypeError(f"coupling must be a Coupling, such as MomentumCoupling(), got {type(coupling).__name__}")
    if integrity not in _INTEGRITY:
        raise ValueError(f"integrity must be one of {_INTEGRITY}, got {integrity!r}")
    decoder, layers = check_convertible(model, coupling)
    branches = [branch_of(type(layer)) for layer in layers]
    if generic := {type(layer).__name__ for layer in layers if branch_of(type(layer)) is generic_branch}:
        warnings.warn(
            f"{', '.join(sorted(generic))}: no exact branch is known; using layer(x) - x in float32, which is "
            "reversible too but less precise in bfloat16",
            stacklevel=2,
        )
    fraction_bits = coupling.fraction_bits if isinstance(coupling.fraction_bits, int) else None  # None for "auto"
    bits, updates = coupling.bits_of_layers(len(layers)), coupling.updates(len(layers))
    if coupling.adapter_rank is not None:
        for layer in layers:
            _add_adapter(layer, text_config(model.config).hidden_size, coupling.adapter_rank)
    stack = ReversibleStack(branches, bits, updates, fraction_bits, integrity, offload_side_bits)
    _turn_off_checkpointing(stack, decoder)
    order_experts(model, text_config(model.config))
    for index, layer in enumerate(layers):
        vars(layer).pop("forward", None)
        kind: Any = type(layer)
        layer.__class__ = _reversible_class(kind)
        layer.reversible = LayerLink(stack, index, decoder)
    stack.hooks = [
        decoder.register_forward_pre_hook(stack.prepare, with_kwargs=True),
        decoder.register_forward_pre_hook(ReferenceCheck(stack)),
        decoder.register_forward_hook(stack.conclude, with_kwargs=True, always_call=True),
    ]
    return model


def check_convertible(model: Any, coupling: Coupling) -> tuple[Any, list[Any]]:
    """Check that `make_reversible` can convert a model, and change nothing.

    Args:
        model: The model.
        coupling: Settings of the coupling.

    Returns:
        The decoder and its layers, as from `find_decoder_layers`.

    Raises:
        TypeError: `make_reversible` would raise it.
        ValueError: `make_reversible` would raise it.
    """
    _refuse_architecture(model)
    decoder, layers = find_decoder_layers(model)
    _refuse_layers(layers)
    coupling.bits_of_layers(len(layers))
    return decoder, layers


def restore(model: Any) -> Any:
    """Undo `make_reversible`, in place.

    Adapters that the coupling gave to layers are taken off, with a warning: the plain network has no place for them.
    What `make_reversible` has warned of stays: gradient checkpointing is off, experts add in a fixed order.

    Args:
        model: A reversible model.

    Returns:
        The same model.

    Raises:
        ValueError: It is not reversible, or its layers were wrapped after `make_reversible`.
    """
    stack, layers = reversible_layers(model)
    if wrapped := _wrapped(layers):
        raise ValueError(f"{wrapped[0]} was wrapped after make_reversible (by fully_shard?), which cannot be undone")
    for layer in layers:
        layer.__class__ = type(layer).unreversed
        del layer.reversible
    if adapted := [layer for layer in layers if hasattr(layer, ADAPTER)]:
        for layer in adapted:
            delattr(layer, ADAPTER)
        warnings.warn("the adapters of the coupling are taken off, with what they have learned", stacklevel=2)
    for hook in stack.hooks:
        hook.remove()
    return model


@contextlib.contextmanager
def unconverted(stack: ReversibleStack, layers: Sequence[Any]) -> Iterator[None]:
    """Let the layers be what they were before `make_reversible` in the block: a context manager.

    What runs is transformers' own code alone, which can be compiled and captured as a graph; adapters stay. Layers
    that were wrapped after `make_reversible` (by fully_shard) stay as they are, and act as `Mode.PLAIN` says.

    Args:
        stack: The stack of a reversible model.
        layers: Its layers.

    Yields:
        Nothing.
    """
    kinds = [type(layer) for layer in layers]
    with stack.in_mode(Mode.PLAIN):
        if _wrapped(layers):
            yield
            return
        with without_hooks(layers[0].reversible.decoder, stack.hooks):
            try:
                for layer, kind in zip(layers, kinds, strict=True):
                    layer.__class__ = kind.unreversed
                yield
            finally:
                for layer, kind in zip(layers, kinds, strict=True):
                    layer.__class__ = kind


def _wrapped(layers):
    """Names of the classes of layers that were wrapped after `make_reversible`."""
    return [type(layer).__name__ for layer in layers if "unreversed" not in vars(type(layer))]


def stack_of(model: Any) -> ReversibleStack:
    """The stack of a reversible model. Raises ValueError if the model is not reversible."""
    return reversible_layers(model)[0]


def reversible_layers(model: Any) -> tuple[ReversibleStack, list[Any]]:
    """The stack and the layers of a reversible model. Raises ValueError if the model is not reversible."""
    layers = [module for module in model.modules() if isinstance(vars(module).get("reversible"), LayerLink)]
    if not layers:
        raise ValueError("the model is not reversible; call make_reversible(model) first")
    return layers[0].reversible.stack, layers


def check_integrity(model: Any) -> None:
    """Raise IntegrityError if any pass since the last call cannot be trusted. Synchronises with the device.

    Call it in each step, where the step synchronises anyway (where the loss is logged, for example).

    Args:
        model: A reversible model.

    Raises:
        IntegrityError: A value left the range of the streams, was not finite, or was not reconstructed exactly.
        ValueError: The model is not reversible.
    """
    stack = stack_of(model)
    stack.integrity.raise_pending(stack.fraction_bits)


def find_decoder_layers(model: Any) -> tuple[Any, list[Any]]:
    """Find the decoder layers of a causal language model.

    Args:
        model: A `transformers` causal language model, or a PEFT model of one.

    Returns:
        The module that owns the layers, called the decoder, and the layers, in order.

    Raises:
        TypeError: The model does not have exactly one list of layers as deep as its configuration says. Of a model
            made of several, its decoder counts (`get_decoder`).
    """
    config = text_config(getattr(model, "config", None))
    depths = [getattr(config, name, None) for name in ("num_hidden_layers", "num_layers")]
    lists = [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList)
    ]
    # Some configurations count what the cache has of a layer, and their layers by the other name.
    fitting = next((found for depth in depths if (found := [one for one in lists if len(one[2]) == depth])), [])
    if len(fitting) > 1 and hasattr(model, "get_decoder"):
        decoder = model.get_decoder()
        inside = {id(module) for module in decoder.modules()}
        own = [one for one in fitting if one[0] is decoder]
        fitting = own or [one for one in fitting if id(one[0]) in inside] or fitting
    if len(fitting) != 1:
        raise TypeError(
            f"a {type(model).__name__} has {_in_its_place(fitting, lists)}; make_reversible takes a transformers "
            f"causal language model, or another one with one list of config.num_hidden_layers ({depths[0]}) layers"
        )
    owner, _, layers = fitting[0]
    return owner, list(layers)


def _in_its_place(fitting, lists):
    """What a model has in place of one list of layers, and what follows from that."""
    if not fitting:
        sizes = ", ".join(f"{name} of {len(child)}" for _, name, child in lists)
        return f"lists of others ({sizes}) and does not run once through one of them" if lists else "no list of layers"
    if len({id(owner) for owner, _, _ in fitting}) == 1:
        names = ", ".join(name for _, name, _ in fitting)
        return f"{len(fitting)} lists of parts of layers ({names}), where a reversible layer is one module"
    names = ", ".join(type(owner).__name__ for owner, _, _ in fitting)
    return f"{len(fitting)} lists of layers (in {names}): it is several models, each to be converted by itself"


def text_config(config: Any) -> Any:
    """The part of a model's configuration that describes its language model; often all of it."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _add_adapter(layer, width, rank):
    """Give a layer an adapter, in float32 as PEFT's adapters are."""
    device = next(layer.parameters()).device
    adapter = BottleneckAdapter(width, rank, device=device, dtype=torch.float32)
    layer.add_module(ADAPTER, adapter)


def _refuse_architecture(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"make_reversible takes a transformers causal language model, got {type(model).__name__}")
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(
            f"{type(model).__name__} has cross-attention to an encoder; only decoder-only models can be made "
            "reversible"
        )
    if isinstance(getattr(model, "logit_scale", None), nn.Parameter):
        raise ValueError(
            f"a {type(model).__name__} compares the outputs of two encoders; convert one of them by itself "
            "(of CLIP, a CLIPTextModel or a CLIPVisionModel)"
        )


def _refuse_layers(layers):
    if len(set(layers)) < len(layers):
        raise ValueError("the model runs one layer more than once, which is not supported")
    if handed_on := {name: layer for layer in layers for name in _handed_on(layer)}:
        name, layer = next(iter(handed_on.items()))
        raise ValueError(
            f"a {type(layer).__name__} returns `{name}` beside its hidden state, which the next layer needs; "
            "a reversible layer hands on its hidden state alone"
        )
    for index, layer in enumerate(layers):
        if isinstance(vars(layer).get("reversible"), LayerLink):
            raise ValueError("the model is reversible already; call restore(model) first")
        own = vars(layer).get("forward")
        # The class's own method, which accelerate leaves behind where it takes a hook off, changes nothing.
        if own is not None and getattr(own, "__func__", None) is not type(layer).forward:
            raise ValueError(
                f"layer {index} ({type(layer).__name__}) has a forward of its own, set on the instance (by an "
                "accelerate hook, say), which would be bypassed. Call make_reversible before adding such hooks; a "
                'device_map of several devices adds them, so load the model on one: device_map={"": "cuda:0"}.'
            )


def _handed_on(layer):
    """Names of what a layer takes from another one beside its hidden state."""
    _, *further = inspect.signature(inspect.unwrap(type(layer).forward)).parameters
    names = [name for name in further if name.startswith("prev_") or name == "output_g"]
    # In T5 and its kin the first layer alone computes the bias of positions.
    shared = any(hasattr(module, "has_relative_attention_bias") for module in layer.modules())
    return names + ["position_bias"] * shared


def _turn_off_checkpointing(stack, decoder):
    """Turn off gradient checkpointing, with which each branch would be evaluated three times a step.

    Called before the layers change their class, and again whenever somebody turns it on later.
    """
    enabled = [m for m in decoder.modules() if vars(m).get("gradient_checkpointing")]
    for module in enabled:
        vars(module)["gradient_checkpointing"] = False
    if enabled and not stack.checkpointing_refused:
        stack.checkpointing_refused = True
        warnings.warn(
            "gradient checkpointing is turned off: a reversible model stores no activations that it could save",
            stacklevel=4,
        )


class LayerLink:
    """Says which stack a reversible layer belongs to, and where it stands in it.

    Args:
        stack: The stack of the model.
        index: Index of the layer.
        decoder: The module whose loop calls the layer.

    Attributes:
        stack: The stack of the model.
        index: Index of the layer.
        decoder: The module whose loop calls the layer.
        others: What that loop expects beside a layer's hidden state, in a tuple; None: no tuple.
        adapted_tokens: `(n, tokens)` while a branch is evaluated in which adapters change only the last n of so many
            tokens; None: they change all.
        adapters: The layer's adapters, where these may act on some tokens alone.
    """

    def __init__(self, stack: ReversibleStack, index: int, decoder: nn.Module):
        self.stack, self.index, self.decoder = stack, index, decoder
        self.others: tuple[Any, ...] | None = None
        self.adapted_tokens: tuple[int, int] | None = None
        self.adapters: list[Any] = []


@functools.cache
def _reversible_class(base):
    """Make a subclass of a decoder layer class. It has the same name, and its forward pass runs in a stack."""
    signature = inspect.signature(inspect.unwrap(base.forward))
    _, hidden_name, *_ = signature.parameters
    variadic = [n for n, p in signature.parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD]

    # torch.compile of the whole model would make a graph of this for each layer, of which nothing is computed.
    @untraced
    def forward(self, *args, **kwargs):
        arguments = signature.bind(self, *args, **kwargs).arguments
        for name in variadic:
            arguments.update(arguments.pop(name, {}))
        del arguments["self"]
        hidden = arguments.pop(hidden_name)
        link = self.reversible
        output = link.stack.run(self, link.index, hidden, arguments)
        others, link.others = link.others, None
        return output if others is None else (output, *others)

    def set_checkpointing(self, enable):
        if enable:
            _turn_off_checkpointing(self.reversible.stack, self.reversible.decoder)

    attributes = {
        "forward": forward,
        "unreversed": base,
        "gradient_checkpointing": property(lambda self: False, set_checkpointing),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
    }
    return type(base.__name__, (base,), attributes)
