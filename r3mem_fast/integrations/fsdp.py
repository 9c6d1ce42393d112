"""FSDP2 (`fully_shard`): layers that are run again, outside of their own pass."""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule


def units_of(model: nn.Module) -> list[Any]:
    """Modules of a model that FSDP2 shards, each for itself; the model too, if it is one."""
    if not dist.is_initialized():
        return []
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_sharded_inside(layer: nn.Module) -> bool:
    """Whether a module inside of a layer is sharded for itself."""
    return any(unit is not layer for unit in units_of(layer))


@contextlib.contextmanager
def gathered(layer: nn.Module):
    """Gather a layer's parameters while this lasts, if it is sharded; FSDP2 does so only around its own passes."""
    if not isinstance(layer, FSDPModule):
        yield
        return
    layer.unshard()
    yield
    layer.reshard()


@contextlib.contextmanager
def freed_after_forward(units: Iterable[Any]):
    """Free what units gathered once they have run, while this lasts, as FSDP2 does outside of a backward pass."""
    hooks = [unit.register_forward_hook(lambda unit, args, output: unit.reshard()) for unit in units]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def forget_backward(units: Iterable[Any]):
    """Let units that were run backward run forward again, in the same backward pass, as if for the first time.

    FSDP2 would take such a forward pass for the recomputation of activation checkpointing: it would not reduce its
    gradients, and would leave the unit gathered.
    """
    for unit in units:
        state = unit._get_fsdp_state()
        state._training_state = type(state._training_state).IDLE


def largest_of_ranks(model: nn.Module, count: int) -> int:
    """The largest of all processes' counts, if FSDP2 has them gather parameters together; else this one's."""
    if not units_of(model):
        return count
    counts = torch.tensor(count, device=next(model.parameters()).device)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    return int(counts)
