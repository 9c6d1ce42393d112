"""Hides how the supported versions of transformers differ; nothing else in this package asks for a version.

The supported versions are those that setup.py allows; `.ci/versions` runs the tests at both ends of that range.
"""

import contextlib
import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils.output_capturing import _active_collector

from .scoped import temporarily

# Names of the parameter by which layers, decoders and models take a key-value cache, newest first: `cache` since 5.24,
# `past_key_values` before it, and in some layers one of the others.
_CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
# Kinds of layers, as configurations name them, that carry a state along a text: a recurrence's, or a convolution's.
_RECURRENT = ("linear_attention", "conv", "mamba", "recurrent", "hybrid", "hybrid_sliding")
# Layers of a `DynamicCache` that hold states of recurrences or convolutions, some of them keys and values, too, and
# those that hold nothing. Not every version has all of them.
_DYNAMIC_RECURRENT = (
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
)
DYNAMIC_RECURRENT_LAYERS = tuple(
    getattr(cache_utils, name) for name in _DYNAMIC_RECURRENT if hasattr(cache_utils, name)
)
# Name of the mapping in which layers leave keys and values for layers above them.
SHARED_STATES = "shared_kv_states"


def cache_name(arguments: dict[str, Any]) -> str | None:
    """Find the key-value cache among keyword arguments.

    A cache is recognised by its type, whatever its name, and anything else by the names that are known.

    Args:
        arguments: Keyword arguments of a layer or a model.

    Returns:
        The cache's name; None if there is no cache.
    """
    by_type = (name for name, value in arguments.items() if isinstance(value, Cache))
    by_name = (name for name in _CACHE_NAMES if arguments.get(name) is not None)
    return next(itertools.chain(by_type, by_name), None)


def cache_argument(model: torch.nn.Module, cache: Any) -> dict[str, Any]:
    """Make the keyword argument that gives a key-value cache to a model.

    Args:
        model: A decoder or a causal language model.
        cache: The cache.

    Returns:
        A keyword argument for the model's `forward` or `generate`.

    Raises:
        ValueError: The model takes no cache by a known name.
    """
    return {_cache_parameter(type(model).forward): cache}


def without_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """Leave key-value caches out of keyword arguments.

    Args:
        arguments: Keyword arguments of a decoder.

    Returns:
        The other arguments.
    """
    left = {name: value for name, value in arguments.items() if name not in _CACHE_NAMES}
    return {name: value for name, value in left.items() if not isinstance(value, Cache)}


def without_new_cache(decoder: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Ask a decoder that can make a key-value cache to make none.

    Args:
        decoder: The decoder.
        args: Positional arguments of a call.
        kwargs: Keyword arguments of the call.

    Returns:
        Arguments and keyword arguments to use in their place.
    """
    names = list(signature_of(decoder).parameters)
    if "use_cache" not in names:
        return args, kwargs
    place = names.index("use_cache")
    if place < len(args):
        return (*args[:place], False, *args[place + 1 :]), kwargs
    return args, {**kwargs, "use_cache": False}


def signature_of(module: torch.nn.Module) -> inspect.Signature:
    """Return the signature of a module's forward pass, without `self`. That of a class is looked at once."""
    own = vars(module).get("forward")  # set on the instance
    return inspect.signature(own) if own is not None else _signature_of_method(type(module).forward)


def arguments_by_name(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Give the arguments of a call of a module's forward pass their names.

    Args:
        module: The module.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    signature = signature_of(module)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    return arguments


@functools.cache
def _signature_of_method(forward: Callable) -> inspect.Signature:
    signature = inspect.signature(forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


@functools.cache
def _cache_parameter(forward: Callable) -> str:
    """Return the name of the parameter for a key-value cache."""
    parameters = inspect.signature(forward).parameters
    found = next((name for name in _CACHE_NAMES if name in parameters), None)
    if found is None:
        raise ValueError(
            f"{forward.__qualname__} takes no key-value cache by a name known here ({', '.join(_CACHE_NAMES)}), so no "
            f"memory can be read by it; transformers is {transformers.__version__}"
        )
    return found


def setting_of(config: Any, name: str, default: Any = None) -> Any:
    """Read a setting of a model, whether or not some layers have one of their own beside it.

    Args:
        config: The configuration of the model's decoder.
        name: Name of the setting.
        default: What to return if there is none of that name.
    """
    # Since 5.23 a configuration refuses to be asked for what differs between layers.
    return vars(config)[name] if name in vars(config) else getattr(config, name, default)


def inputs_of_layers(decoder: Any, ids: torch.Tensor | None, embeddings: torch.Tensor) -> dict[str, Any]:
    """Make what some decoders give their layers of each token, beside the embeddings (Gemma 3n and 4).

    Without it they take it for zero, or look for the token of each embedding among all.

    Args:
        decoder: The decoder.
        ids: Token ids of the first embeddings, int64 `[batch, n]`; None: of none.
        embeddings: `[batch, tokens, width]`. Those without an id get what padding has, as those of images do.

    Returns:
        A keyword argument for the decoder; none for most.

    Raises:
        ValueError: The layers need the token ids themselves (DeepSeek V4).
    """
    config = decoder.config
    if "hash_moe" in (getattr(config, "mlp_layer_types", None) or ()):
        raise ValueError(
            f"a {type(decoder).__name__} has layers that choose experts by token ids, which are not known behind a "
            "memory, where embeddings are read; memories need another model"
        )
    if not (getattr(config, "hidden_size_per_layer_input", None) and hasattr(decoder, "get_per_layer_inputs")):
        return {}
    rows, tokens = embeddings.shape[:2]
    known = torch.full((rows, tokens), config.pad_token_id or 0, device=embeddings.device)
    if ids is not None:
        known[:, : ids.shape[1]] = ids.to(embeddings.device)
    others = len(inspect.signature(decoder.get_per_layer_inputs).parameters) - 1
    return {"per_layer_inputs": decoder.get_per_layer_inputs(known, *[None] * others)}


def as_of_tokens(decoder: Any, embeddings: torch.Tensor) -> torch.Tensor:
    """Embeddings as a decoder would take them if it were given token ids: Falcon-H1 scales those of token ids alone.

    Args:
        decoder: The decoder.
        embeddings: `[batch, tokens, width]`, of its own table.
    """
    return embeddings * decoder.embedding_multiplier if type(decoder).__name__ == "FalconH1Model" else embeddings


def inputs_of_composite(model: Any, decoder: Any, embeddings: torch.Tensor) -> dict[str, Any]:
    """Make what a model of several would else look for the token of each embedding for (Gemma 4 with its encoders).

    Args:
        model: The model around the decoder.
        decoder: The decoder.
        embeddings: What the model is given, `[batch, tokens, width]`.

    Returns:
        A keyword argument for the model; none for most.
    """
    if model.config.get_text_config() is model.config:
        return {}
    return inputs_of_layers(decoder, None, embeddings)


def key_sources(config: Any, layers: Sequence[torch.nn.Module]) -> tuple[int, ...]:
    """Find the layers whose keys and values each layer reads: most read their own (but see Gemma 3n and 4).

    Args:
        config: Configuration of the decoder.
        layers: Its layers, in any order.

    Returns:
        For each layer, by its index in the cache, the index of that layer: its own or a lower one.
    """
    if not getattr(config, "num_kv_shared_layers", None):
        return tuple(range(len(layers)))
    attentions: Any = [next(m for m in layer.modules() if hasattr(m, "is_kv_shared_layer")) for layer in layers]
    attentions.sort(key=lambda attention: attention.layer_idx)
    found: list[int] = []
    last: dict[str, int] = {}
    for index, attention in enumerate(attentions):
        if not attention.is_kv_shared_layer:
            last[attention.layer_type] = index
        found.append(last[attention.layer_type] if attention.is_kv_shared_layer else index)
    return tuple(found)


def decoder_output(hidden: torch.Tensor) -> BaseModelOutputWithPastAndCrossAttentions:
    """Make the output of a decoder, in which a causal language model finds all that it looks for.

    Args:
        hidden: The last hidden states, `[batch, tokens, hidden_size]`.
    """
    output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)
    output.router_logits = None  # of mixtures of experts
    output.shared_kv_states = None  # of Gemma 4
    return output


def captured_outputs() -> dict[str, Any]:
    """Return what transformers records of the layers while the model runs, for `output_hidden_states` and the like."""
    return _active_collector.get() or {}


def gguf_options() -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that give a GGUF file's weights dequantised."""
    # Before 5.17 there was no such setting: weights were always dequantised.
    kind = getattr(transformers, "GgufConfig", None)
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def bars_of_gguf_on_terminals_only() -> contextlib.AbstractContextManager:
    """Let transformers show its bar of a GGUF file on terminals only, while this lasts: a log would drown in it."""
    # The bar is not one of those that transformers' logging settings turn off.
    module = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    return temporarily(module, tqdm=functools.partial(tqdm, disable=None))


def checkpointing_switches(model: torch.nn.Module) -> tuple[Callable, Callable]:
    """Find the methods that turn activation checkpointing on and off.

    Args:
        model: A model of transformers.

    Returns:
        `(enable, disable)`; `enable` takes a dictionary of keyword arguments for `torch.utils.checkpoint.checkpoint`.
    """
    # It was called gradient checkpointing before 5.23.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    enable, disable = (getattr(model, f"{kind}_checkpointing_{verb}") for verb in ("enable", "disable"))
    return enable, disable


def is_recurrent(layer: Any) -> bool:
    """Whether a layer of a cache holds the state of a recurrence or a convolution."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def idle_layers(config: Any) -> list[int]:
    """Return the indices of the layers that look at each token alone, and so keep nothing of a text.

    Args:
        config: Configuration of the decoder.
    """
    kinds = getattr(config, "layer_types", None) or ()
    return [index for index, kind in enumerate(kinds) if kind in ("moe", "mlp")]


def layers_with_keys(cache: Cache) -> list[int]:
    """Return the indices of the layers of a cache that hold keys and values."""
    return [index for index, layer in enumerate(cache.layers) if isinstance(layer, CacheLayerMixin)]


def recurrent_layers(cache: Cache) -> list[int]:
    """Return the indices of the layers of a cache that hold the state of a recurrence or a convolution."""
    return [index for index, layer in enumerate(cache.layers) if is_recurrent(layer)]


def has_recurrent_layers(config: Any) -> bool:
    """Whether a decoder has layers that carry a state along a text, in a cache of transformers or elsewhere.

    Args:
        config: Configuration of the decoder.
    """
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    # RWKV's configuration does not name the kinds of its layers.
    return any(kind in _RECURRENT for kind in kinds) or getattr(config, "model_type", None) == "rwkv"


def recurrent_states(layer: Any) -> dict[str, torch.Tensor]:
    """Return the states that a recurrent layer of a cache holds, by name: "conv.0", "recurrent.0", "conv.1" and so on.

    They are the layer's own tensors, `[B, ...]`, which it changes in place.
    """
    found = {}
    for kind in ("conv", "recurrent"):
        held = getattr(layer, f"{kind}_states")
        # Earlier versions have one of each.
        of_index = held if isinstance(held, dict) else {0: held}
        seen = layer.has_previous_state
        for index, state in of_index.items():
            if state is not None and (seen[index] if isinstance(seen, dict) else seen):
                found[f"{kind}.{index}"] = state
    return found


def set_recurrent_states(layer: Any, states: Mapping[str, torch.Tensor]) -> None:
    """Let a recurrent layer of a cache hold other states.

    Args:
        layer: The layer.
        states: The states, named as `recurrent_states` does; the layer will change them in place. None: it has read
            nothing.
    """
    several = isinstance(layer.has_previous_state, dict)
    indices = list(layer.has_previous_state) if several else [0]
    for index in indices:
        conv, recurrent = (states.get(f"{kind}.{index}") for kind in ("conv", "recurrent"))
        values = {
            "conv_states": conv,
            "recurrent_states": recurrent,
            "is_conv_states_initialized": conv is not None,
            "is_recurrent_states_initialized": recurrent is not None,
            "has_previous_state": conv is not None or recurrent is not None,
            "conv_kernel_size": None if conv is None else conv.shape[-1],
        }
        for name, value in values.items():
            if several:
                getattr(layer, name)[index] = value
            else:
                setattr(layer, name, value)
    if states:
        first = next(iter(states.values()))
        layer.dtype, layer.device = first.dtype, first.device
        if not several:
            layer.max_batch_size = len(first)
