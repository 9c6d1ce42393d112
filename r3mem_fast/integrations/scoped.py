"""Changes objects of other libraries for a while: context managers that make a change, and undo it.

This package changes such objects for a while in no other way. A change that lasts longer has its own function to undo
it: `restore` undoes `make_reversible`.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

_MISSING = object()


@contextlib.contextmanager
def temporarily(owner: Any, **values: Any) -> Iterator[None]:
    """Give an object other attributes in the block; those that were not set on the object itself are deleted again.

    Args:
        owner: The object.
        values: Attributes by name.

    Yields:
        Nothing.
    """
    # A configuration may keep an attribute under another name, by a property or by its `attribute_map`: then it is not
    # the owner's own.
    renamed = {name for name in values if isinstance(getattr(type(owner), name, None), property)}
    renamed |= values.keys() & getattr(owner, "attribute_map", {}).keys()
    before = {
        name: getattr(owner, name, _MISSING) if name in renamed else vars(owner).get(name, _MISSING) for name in values
    }
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


def kinds_of_layers(config: Any, kinds: Sequence[str]) -> contextlib.AbstractContextManager[None]:
    """Let a configuration name other kinds of layers (`layer_types`) in the block: a context manager.

    Args:
        config: The configuration.
        kinds: The kinds, one for each layer.
    """
    name = getattr(config, "attribute_map", {}).get("layer_types", "layer_types")
    known = getattr(type(config), name, None)
    if not isinstance(known, property) or known.fset is not None:
        return temporarily(config, layer_types=list(kinds))
    # Computed from other settings (Falcon-H1, Bamba), by a class that other configurations are of, too.
    computed: Any = known.fget
    own = property(lambda some: list(kinds) if some is config else computed(some))
    return temporarily(type(config), **{name: own})


@contextlib.contextmanager
def in_order(holder: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put the modules of a list in another order in the block. The names stay, and belong to other modules then.

    Args:
        holder: A `torch.nn.ModuleList`.
        modules: All its modules, in the other order.

    Yields:
        Nothing.
    """
    before = dict(holder._modules)
    holder._modules.update(zip(before, modules, strict=True))
    try:
        yield
    finally:
        holder._modules.update(before)


def returning(module: nn.Module, result: Any) -> contextlib.AbstractContextManager[None]:
    """Let a module return a result without running, in the block. Its hooks run as usual.

    Args:
        module: The module.
        result: The result.
    """
    return temporarily(module, forward=lambda *args, **kwargs: result)


def compacted(hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states `[..., width]` with the strides of a tensor of their own."""
    # `contiguous` would not do for one row of one token, whose strides it does not look at; flattened, it has others.
    flat = hidden.flatten(0, -2)
    return flat.contiguous().view(hidden.shape)


@contextlib.contextmanager
def hooked(modules: Iterable[nn.Module], hook: Any, **settings: Any) -> Iterator[None]:
    """Give modules a hook before their forward passes, in the block.

    Args:
        modules: The modules.
        hook: The hook, see `torch.nn.Module.register_forward_pre_hook`.
        settings: Further arguments of that method.

    Yields:
        Nothing.
    """
    handles = [module.register_forward_pre_hook(hook, **settings) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def holding(values: Iterable[tuple[nn.Parameter, torch.Tensor]]) -> Iterator[None]:
    """Let parameters hold other values in the block, which may be of another dtype.

    Args:
        values: The parameters, each with its value.

    Yields:
        Nothing.
    """
    values = list(values)
    before = [(parameter, parameter.data) for parameter, _ in values]
    try:
        for parameter, value in values:
            parameter.data = value
        yield
    finally:
        for parameter, value in before:
            parameter.data = value


@contextlib.contextmanager
def compact_head(model: Any) -> Iterator[None]:
    """Give a model's head the hidden states that it computes logits of in a tensor of their own, in the block.

    transformers cuts them out of the pass's, and the cut keeps the strides of the whole. For these, where the head's
    weight is frozen, PyTorch's product copies that weight first, which takes longer than a small model's other layers.

    Args:
        model: A model of transformers.

    Yields:
        Nothing.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return

    def compact(module: nn.Module, inputs: tuple) -> tuple:
        hidden, *others = inputs
        return compacted(hidden), *others

    with hooked([head], compact):
        yield


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode in the block; afterwards every part of it is in its earlier mode.

    Args:
        module: The module.

    Yields:
        Nothing.
    """
    modes = [(part, part.training) for part in module.modules()]
    if any(training for _, training in modes):
        module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            if part.training != training:
                part.training = training


@contextlib.contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Put trainable parameters back to their earlier values if the block fails or is interrupted.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    before = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        raise


@contextlib.contextmanager
def gradients_aside(module: nn.Module) -> Iterator[None]:
    """Let the parameters of a module have no gradients in the block, in which none may be added.

    Args:
        module: The module.

    Yields:
        Nothing.
    """
    before = [(parameter, parameter.grad) for parameter in module.parameters() if parameter.grad is not None]
    try:
        for parameter, _ in before:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


@contextlib.contextmanager
def without_hooks(module: nn.Module, handles: Iterable[Any]) -> Iterator[None]:
    """Take some hooks off a module in the block; afterwards all are called in the order in which they were.

    Args:
        module: The module.
        handles: What registering the hooks has returned.

    Yields:
        Nothing.
    """
    registered = (module._forward_pre_hooks, module._forward_hooks)
    before = [dict(hooks) for hooks in registered]
    for handle in handles:
        for hooks in registered:
            hooks.pop(handle.id, None)
    try:
        yield
    finally:
        for hooks, earlier in zip(registered, before, strict=True):
            added = {number: hook for number, hook in hooks.items() if number not in earlier}
            hooks.clear()
            hooks.update(earlier | added)


@contextlib.contextmanager
def hooks_paused(leaves: Iterable[torch.Tensor]) -> Iterator[None]:
    """Take the hooks off tensors in the block.

    Hooks are for the outer backward pass, which delivers gradients; an inner one only computes them.

    Args:
        leaves: The tensors.

    Yields:
        Nothing.
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
