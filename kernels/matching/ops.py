"""Attention Matching as `torch.library` operators `torch.ops.r3mem.matching_*`, with fake implementations.

An operator takes and returns plain values: `window` is 0 and `softcap` 0.0 where the functions of `__init__.py` take
None.
"""

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from ..common import dispatch
from . import reference
from .arguments import MatchingInputs, MatchingSettings

_library = torch.library.Library("r3mem", "FRAGMENT")

_KEYS = "Tensor query, Tensor key, Tensor value"
_OTHERS = "Tensor query_positions, Tensor key_positions, Tensor? sinks, float scale, SymInt window, float softcap"


def _implementation(query: torch.Tensor) -> ModuleType:
    """Return the module whose functions run for these queries; float64 is the reference's, unless it is forced."""
    if query.dtype == torch.float64 and not os.environ.get(dispatch.VARIABLE):
        return reference
    if dispatch.choose(query.device, (query.dtype,), head_dim=query.shape[-1]).implementation == "reference":
        return reference
    from . import triton

    return triton


def _operator(schema: str) -> Callable[[Callable], torch._ops.OpOverload]:
    """Define an operator without a derivative, by its schema; the decorated function runs it, without autocast."""
    name = schema.split("(")[0]

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{name} has no derivative")

    def define(function: Callable) -> torch._ops.OpOverload:
        @functools.wraps(function)
        def run(query: torch.Tensor, *others: Any) -> Any:
            with torch.autocast(query.device.type, enabled=False):
                return function(query, *others)

        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_autograd(f"r3mem::{name}", refuse, lib=_library)
        return getattr(torch.ops.r3mem, name).default

    return define


def _settings(scale: float, window: int, softcap: float) -> MatchingSettings:
    return MatchingSettings(scale, softcap or None, window or None)


@_operator(f"matching_attention_scores({_KEYS}, {_OTHERS}) -> (Tensor, Tensor, Tensor)")
def attention_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run `attention_scores`; see `__init__.py`."""
    inputs = MatchingInputs(query, key, value, query_positions, key_positions, sinks)
    return _implementation(query).attention_scores(inputs, _settings(scale, window, softcap))


@torch.library.register_fake("r3mem::matching_attention_scores", lib=_library)
def _fake_attention_scores(query: torch.Tensor, key: torch.Tensor, *others: Any) -> tuple[torch.Tensor, ...]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    shapes = (key.shape[:3], query.shape[:3], query.shape)
    return tuple(query.new_empty(shape, dtype=dtype) for shape in shapes)


@_operator(f"matching_value_system({_KEYS}, Tensor target, {_OTHERS}) -> (Tensor, Tensor, Tensor)")
def value_system(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    target: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run `value_system`; see `__init__.py`."""
    inputs = MatchingInputs(query, key, value, query_positions, key_positions, sinks)
    return _implementation(query).value_system(inputs, target, _settings(scale, window, softcap))


@torch.library.register_fake("r3mem::matching_value_system", lib=_library)
def _fake_value_system(query: torch.Tensor, key: torch.Tensor, *others: Any) -> tuple[torch.Tensor, ...]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    shapes = ((*key.shape[:3], key.shape[2]), key.shape, query.shape[:3])
    return tuple(query.new_empty(shape, dtype=dtype) for shape in shapes)
