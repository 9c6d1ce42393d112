"""Arms of `bench.training` whose layers keep things in host memory, and how many bytes these are.

On a GPU host memory is another memory, and its storages are counted by their device. Without one it is the same
memory: what an arm would keep in host memory is then held by `HostCopy` objects, which are counted.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from r3mem_fast.measure import ForwardMemory
from r3mem_fast.reversible.offload import HostCopy


def host_bytes(memory: ForwardMemory, device_type: str) -> int:
    """Count what the layers keep in host memory while the graph of a forward pass is alive.

    Args:
        memory: What the pass has left alive.
        device_type: Type of the device that the layers ran on.

    Returns:
        The bytes. On the CPU: of the storages of all `HostCopy` objects, each once.
    """
    if device_type != "cpu":
        return memory.on("cpu").layers
    copies = [value for value in gc.get_objects() if type(value) is HostCopy]
    return sum({s.data_ptr(): s.nbytes() for s in (copy.back().untyped_storage() for copy in copies)}.values())


def checkpoint_on_host(function: Callable, *args: Any) -> Any:
    """Run a layer with checkpointing, and keep its saved tensors in host memory."""
    if torch.accelerator.is_available():
        hooks: Any = save_on_cpu(pin_memory=True)
    else:
        # A copy, as on a GPU: what something else holds, too, counts in both columns.
        hooks = saved_tensors_hooks(lambda tensor: HostCopy(tensor.clone()), HostCopy.back)
    with hooks:
        return checkpoint(function, *args, use_reentrant=False)


def checkpoint_hidden_on_host(function: Callable, hidden: torch.Tensor, *args: Any) -> Any:
    """Run a layer without a graph, and keep its input alone, in host memory, as Unsloth does."""
    return _HiddenOnHost.apply(lambda given: function(given, *args), hidden)


class _HiddenOnHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable, hidden: torch.Tensor) -> torch.Tensor:
        """Run the layer; autograd records nothing of it here."""
        ctx.function, ctx.hidden = function, HostCopy(hidden.clone() if hidden.device.type == "cpu" else hidden)
        return function(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor | None]:
        """Run the layer again, with a graph."""
        hidden = ctx.hidden.back().detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.function(hidden)
        torch.autograd.backward(output, gradient)
        return None, hidden.grad
