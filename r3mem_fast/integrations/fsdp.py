"""Lets FSDP2 (`fully_shard`) run layers again, outside of their own pass."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule


def units_of(model: nn.Module) -> list[Any]:
    """Modules of a model that FSDP2 shards, the model included if it is one of them.

    Args:
        model: The model.

    Returns:
        The modules; none if no process group is initialised.
    """
    if not dist.is_initialized():
        return []
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_sharded_inside(layer: nn.Module) -> bool:
    """Whether a module inside of a layer is sharded by itself."""
    return any(unit is not layer for unit in units_of(layer))


@contextlib.contextmanager
def gathered(layer: nn.Module) -> Iterator[None]:
    """Gather the parameters of a sharded layer for the block: a context manager.

    FSDP2 itself does so only around the layer's own forward and backward pass.

    Args:
        layer: A layer, sharded or not.

    Yields:
        Nothing.
    """
    if not isinstance(layer, FSDPModule):
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()


@contextlib.contextmanager
def freed_after_forward(units: Iterable[Any]) -> Iterator[None]:
    """Free gathered parameters after each forward pass in the block: a context manager.

    FSDP2 itself does so only outside of a backward pass.

    Args:
        units: Modules that FSDP2 shards.

    Yields:
        Nothing.
    """
    hooks = [unit.register_forward_hook(lambda unit, args, output: unit.reshard()) for unit in units]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def forget_backward(units: Iterable[Any]) -> None:
    """Let modules that were run backward run forward again, in the same backward pass, as if for the first time.

    FSDP2 would take such a forward pass for the recomputation of activation checkpointing: it would not reduce the
    gradients, and would leave the parameters gathered.

    Args:
        units: Modules that FSDP2 shards.
    """
    for unit in units:
        state = unit._get_fsdp_state()
        state._training_state = type(state._training_state).IDLE


def largest_of_ranks(model: nn.Module, count: int) -> int:
    """The largest count of all processes if the model is sharded; else the given one.

    Processes that gather parameters together must run the same number of passes.

    Args:
        model: The model.
        count: Count of this process.
    """
    if not units_of(model):
        return count
    counts = torch.tensor(count, device=next(model.parameters()).device)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    return int(counts)
