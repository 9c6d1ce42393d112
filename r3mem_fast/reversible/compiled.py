"""`compile_layers`: the branches of a reversible model's layers run as graphs of torch.compile.

Only branches are compiled, and all layers share a graph: the streams, the autograd node and the model's own loop run
as before. A branch is evaluated twice, and must give the same bits both times, so the choice of its graph must not
depend on what was compiled in between: each shape has one of its own (`dynamic=False`). A graph that serves many
shapes, made after the first evaluation, could take the place of the first one's graph in the second.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..integrations.compat import cache_name
from ..integrations.scoped import gradients_aside
from .branches import generic_branch
from .convert import reversible_layers


def compile_layers(model: Any, *, backend: str | Callable = "inductor", **options: Any) -> Any:
    """Let the branches of a reversible model's layers run as graphs of torch.compile, in place.

    This holds where gradients are on and no key-value cache is passed, thus in training; elsewhere (inference, passes
    behind memories) layers run uncompiled, which rounds differently. A branch runs the same graph in the forward pass
    and when it is evaluated again, so the inverse stays exact, which is checked as always. There is one graph for each
    shape of the input, about eight at most (`torch._dynamo.config.recompile_limit`), beyond which new shapes run
    uncompiled: pad batches to a few lengths. Add adapters, and hooks inside of layers, before the first pass. Under a
    `TorchDispatchMode` that counts operations, torch.compile gives a function up for good.

    Args:
        model: A model that `make_reversible` has changed, or an `R3MemModel`.
        backend: Backend of `torch.compile`.
        options: More keyword arguments of `torch.compile`, such as `mode`.

    Returns:
        The same model.

    Raises:
        ValueError: The model is not reversible, its layers are compiled already, or they have no exact branch. Or an
            option would give several shapes one graph, or a branch several graphs.
    """
    if wrong := sorted({"dynamic", "fullgraph", "disable"} & options.keys()):
        raise ValueError(f"{wrong[0]} is not for compile_layers: each shape has one graph of its own")
    stack, layers = reversible_layers(model)
    if any(isinstance(branch, CompiledBranch) for branch in stack.branches):
        raise ValueError("the layers are compiled already; call uncompile_layers(model) first")
    if generic_branch in stack.branches:
        kinds = sorted({type(layer).__name__ for layer in layers})
        raise ValueError(f"{', '.join(kinds)}: only layers with an exact branch can be compiled")
    compiled = {
        branch: CompiledBranch(branch, torch.compile(branch, backend=backend, dynamic=False, **options))
        for branch in set(stack.branches)
    }
    stack.branches = [compiled[branch] for branch in stack.branches]
    return model


def uncompile_layers(model: Any) -> Any:
    """Undo `compile_layers`, in place. `restore` does so, too.

    Args:
        model: A reversible model.

    Returns:
        The same model.

    Raises:
        ValueError: The model is not reversible.
    """
    stack, _ = reversible_layers(model)
    stack.branches = [getattr(branch, "uncompiled", branch) for branch in stack.branches]
    return model


class CompiledBranch:
    """A branch function that runs compiled where it is pure, and as it is elsewhere.

    Args:
        uncompiled: The branch function, see `branches`.
        compiled: The same, compiled.

    Attributes:
        uncompiled: The branch function.
    """

    def __init__(self, uncompiled: Callable, compiled: Callable):
        self.uncompiled, self._compiled = uncompiled, compiled
        self._seen: set[tuple] = set()

    def __call__(self, layer: Any, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Compute the branch of a layer.

        Args:
            layer: The decoder layer.
            hidden: Its input, `[B, T, width]`.
            kwargs: Keyword arguments of the layer.

        Returns:
            The branch, in the shape of the input.
        """
        # Caches are written to, and a graph would be of one layer's cache alone.
        if not torch.is_grad_enabled() or cache_name(kwargs) is not None:
            return self.uncompiled(layer, hidden, kwargs)
        if not hidden.requires_grad and any(parameter.requires_grad for parameter in layer.parameters()):
            # The first layer with stored activations, to compare with. A layer that learns always runs one graph.
            hidden = hidden.detach().requires_grad_()
        kind = (hidden.shape, hidden.dtype, hidden.requires_grad, layer.training)
        if kind in self._seen:
            return self._compiled(layer, hidden, kwargs)
        # Dynamo would break the graph at each parameter whose gradient has another dtype (`MasterAdamW`).
        with gradients_aside(layer):
            branch = self._compiled(layer, hidden, kwargs)
        self._seen.add(kind)
        return branch
