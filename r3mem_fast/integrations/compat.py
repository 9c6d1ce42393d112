"""How the supported versions of transformers differ: every question about them is asked here and nowhere else.

Supported is what setup.py allows; `.ci/versions` runs the tests at both ends of that range.
"""

import functools
import inspect
import itertools

import transformers
from transformers.cache_utils import Cache
from transformers.utils.output_capturing import _active_collector

# Names that layers, decoders and models have for the key-value cache that they are given, newest first: `cache` since
# 5.24, `past_key_values` before it, and in some layers one of the others.
_CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")


def cache_name(arguments: dict) -> str | None:
    """The name under which a layer's or a model's keyword arguments hold a key-value cache; None if they hold none.

    A cache is recognised by its type, whatever its name, and anything else by the names that are known.
    """
    by_type = (name for name, value in arguments.items() if isinstance(value, Cache))
    by_name = (name for name in _CACHE_NAMES if arguments.get(name) is not None)
    return next(itertools.chain(by_type, by_name), None)


def cache_argument(model, cache) -> dict:
    """Keyword arguments that give a key-value cache to a decoder or a causal language model, or to its `generate`."""
    return {_cache_parameter(type(model).forward): cache}


def without_cache(arguments: dict) -> dict:
    """The arguments of a decoder's call, less any key-value cache."""
    left = {name: value for name, value in arguments.items() if name not in _CACHE_NAMES}
    return {name: value for name, value in left.items() if not isinstance(value, Cache)}


@functools.cache
def _cache_parameter(forward):
    parameters = inspect.signature(forward).parameters
    found = next((name for name in _CACHE_NAMES if name in parameters), None)
    if found is None:
        raise ValueError(
            f"{forward.__qualname__} takes no key-value cache by a name known here ({', '.join(_CACHE_NAMES)}), so no "
            f"memory can be read by it; transformers is {transformers.__version__}"
        )
    return found


def captured_outputs() -> dict:
    """What transformers is recording of the layers while the model runs (`output_hidden_states` and the like)."""
    return _active_collector.get() or {}


def gguf_options() -> dict:
    """Arguments of `from_pretrained` that give a GGUF file's weights dequantised."""
    # Before 5.17 there is no such setting: weights are always dequantised.
    kind = getattr(transformers, "GgufConfig", None)
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def checkpointing_switches(model) -> tuple:
    """A model's methods that turn activation checkpointing on and off."""
    # Called gradient checkpointing before 5.23.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    return tuple(getattr(model, f"{kind}_checkpointing_{verb}") for verb in ("enable", "disable"))
