"""Notes what attention asks that is none of transformers' interchangeable functions, but a method of its module."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .scoped import hooked, temporarily

# Names of what such modules divide products of queries and keys by (GPT-J and CodeGen; GPT-NeoX Japanese).
_DIVISORS = ("scale_attn", "norm_factor")
# Classes that call PyTorch's attention themselves, where attn_implementation is "sdpa".
_CALL_PYTORCH = ("FalconAttention",)

# Is told of a module, its queries `[B, heads, T, head_dim]`, and the factor of their products with keys.
Note = Callable[[Any, torch.Tensor, float], None]


def calls_pytorch(decoder: torch.nn.Module) -> bool:
    """Whether a decoder's attention calls that of PyTorch itself, where attn_implementation is "sdpa"."""
    return any(type(module).__name__ in _CALL_PYTORCH for module in decoder.modules())


@contextlib.contextmanager
def own_attention_noted(decoder: torch.nn.Module, note: Note) -> Iterator[None]:
    """Tell of the queries of such attention in the block; it computes as always.

    Args:
        decoder: The decoder.
        note: Is told of each call.

    Yields:
        Nothing.
    """
    modules: list[Any] = [module for module in decoder.modules() if isinstance(vars(module).get("layer_idx"), int)]
    with contextlib.ExitStack() as changes:
        for module in modules:
            divisor = next((getattr(module, name) for name in _DIVISORS if hasattr(module, name)), None)
            if hasattr(module, "_attn") and divisor is not None:
                told = functools.partial(_told, module, 1 / float(divisor), note)
                changes.enter_context(temporarily(module, _attn=told))
        calling = [module for module in modules if type(module).__name__ in _CALL_PYTORCH]
        if calling:
            mode = _PyTorchAttention(note)
            changes.enter_context(hooked(calling, mode.enter))
            changes.enter_context(mode)
        yield


def _told(module, scale, note, query, key, value, *args, **kwargs):
    note(module, query.to(value.dtype), scale)
    return type(module)._attn(module, query, key, value, *args, **kwargs)


class _PyTorchAttention(TorchFunctionMode):
    """Tells of the queries of PyTorch's attention, with the module that was entered last."""

    def __init__(self, note: Note):
        super().__init__()
        self._note, self._module = note, None

    def enter(self, module: Any, args: Any) -> None:
        self._module = module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and self._module is not None:
            self._note(self._module, args[0], args[0].shape[-1] ** -0.5)
        return func(*args, **kwargs)
