"""Changes to objects of other libraries, each for a while: a context manager makes it, and undoes it.

This is the only way in which this package changes such objects for a while. What lasts longer is undone by a function
of its own: `restore` for what `make_reversible` does.
"""

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

_MISSING = object()


@contextlib.contextmanager
def temporarily(owner: Any, **values):
    """Give an object other attributes while this lasts. Those that it had not itself are deleted again.

    Args:
        owner: The object.
        values: Attributes by name.
    """
    before = {name: vars(owner).get(name, _MISSING) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            if value is not _MISSING:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)


@contextlib.contextmanager
def in_order(holder: nn.Module, modules: Sequence[nn.Module]):
    """Let a list of modules iterate over its modules in another order while this lasts; their names go by place.

    Args:
        holder: A `torch.nn.ModuleList`.
        modules: Its modules, in that order.
    """
    before = dict(holder._modules)
    holder._modules.update(zip(before, modules, strict=True))
    try:
        yield
    finally:
        holder._modules.update(before)


def returning(module: nn.Module, result: Any):
    """Let a module return `result` in place of running, while this lasts. Its hooks run as always."""
    return temporarily(module, forward=lambda *args, **kwargs: result)


@contextlib.contextmanager
def evaluating(module: nn.Module):
    """Put a module into evaluation mode while this lasts; then every part is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextlib.contextmanager
def unchanged_on_failure(model: nn.Module):
    """Put trainable parameters back to what they were if what is done meanwhile fails, or is interrupted."""
    before = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        raise


@contextlib.contextmanager
def requiring_gradients_as_before(model: nn.Module):
    """Let parameters want a gradient afterwards if they do now, whatever is done meanwhile."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


@contextlib.contextmanager
def hooks_paused(leaves: Iterable[torch.Tensor]):
    """Take the hooks off tensors while this lasts.

    They are for the outer backward pass, which delivers gradients; an inner one only computes them.
    """
    hooked = [leaf._backward_hooks for leaf in leaves if leaf._backward_hooks]
    saved = [dict(hooks) for hooks in hooked]
    for hooks in hooked:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in zip(hooked, saved, strict=True):
            hooks.update(before)
