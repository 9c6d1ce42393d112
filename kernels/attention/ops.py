"""Memory-token attention as `torch.library` operators `torch.ops.r3mem.*`, differentiable, with fake implementations.

An operator takes and returns plain values: `window` is 0 and `softcap` 0.0 where the functions of `__init__.py` take
None, and a gradient that does not exist is an empty tensor. With `cu_seqlens`, `query_offset` is the length of the
longest sequence.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from . import dispatch, folded, reference, vendor
from .arguments import AttentionInputs, AttentionSettings
from .outputs import new_lse, new_output

_library = torch.library.Library("r3mem", "FRAGMENT")

# The fields of AttentionInputs, in their order.
_INPUTS = (
    "Tensor query, Tensor? key, Tensor? value, Tensor? memory_key, Tensor? memory_value, Tensor? memory_lengths, "
    "Tensor? segment_starts, Tensor? cu_seqlens, Tensor? sinks"
)
_SETTINGS = "float scale, SymInt window, float softcap, SymInt query_offset"


def _implements(name: str) -> Callable[[Callable], None]:
    """Register the decorated function as the operator's implementation on every device, out of autocast's reach."""

    def register(function: Callable) -> None:
        @functools.wraps(function)
        def run(first: torch.Tensor, *others: Any) -> Any:
            with torch.autocast(first.device.type, enabled=False):
                return function(first, *others)

        _library.impl(name, run, "CompositeExplicitAutograd")

    return register


def _triton() -> ModuleType:
    """Import the Triton kernels, which a machine without Triton must not do."""
    from . import triton

    return triton


def _bundle(arguments: Any) -> tuple[AttentionInputs, AttentionSettings]:
    """Bundle the arguments that `_INPUTS` and `_SETTINGS` list, in their order."""
    *tensors, scale, window, softcap, query_offset = arguments
    inputs = AttentionInputs(*tensors)
    if inputs.cu_seqlens is None:
        return inputs, AttentionSettings(scale, window or None, softcap or None, query_offset)
    return inputs, AttentionSettings(scale, window or None, softcap or None, max_seqlen=query_offset)


_library.define(f"memory_attention({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))


@_implements("memory_attention")
def _run_memory_attention(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, settings = _bundle(arguments)
    chosen = dispatch.choose_forward(inputs, settings).implementation
    if chosen == "triton":
        return _triton().memory_attention(inputs, settings)
    if chosen == "specialised":
        return _triton().forward_specialised.memory_attention(inputs, settings)
    implementation = reference if chosen == "reference" else folded if inputs.key is None else vendor
    output, lse = implementation.memory_attention(inputs, settings)
    return new_output(inputs.query).copy_(output), lse.contiguous()


@torch.library.register_fake("r3mem::memory_attention", lib=_library)
def _fake_memory_attention(query: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return new_output(query), new_lse(query)


def _inputs_with_gradient(inputs: AttentionInputs, frozen_memory: bool) -> tuple[torch.Tensor | None, ...]:
    """List the inputs in the order of their gradients, with None where there is no gradient."""
    memory = (None, None) if frozen_memory else (inputs.memory_key, inputs.memory_value)
    return inputs.query, inputs.key, inputs.value, *memory, inputs.sinks


_library.define(
    f"memory_attention_backward(Tensor grad_output, Tensor? grad_lse, {_INPUTS}, Tensor output, Tensor lse, "
    f"{_SETTINGS}, bool frozen_memory) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@_implements("memory_attention_backward")
def _run_memory_attention_backward(
    grad_output: torch.Tensor, grad_lse: torch.Tensor | None, *arguments: Any
) -> tuple[torch.Tensor, ...]:
    *tensors, output, lse, scale, window, softcap, query_offset, frozen_memory = arguments
    inputs, settings = _bundle((*tensors, scale, window, softcap, query_offset))
    query = inputs.query
    chosen = dispatch.choose(inputs, settings).implementation
    # The vendors' kernels take no gradient of lse, and no memory alone.
    if chosen == "vendor" and (grad_lse is not None or inputs.key is None):
        chosen = dispatch.choose_without_vendor(query).implementation
    if chosen == "triton":
        grads = _triton().memory_attention_backward(
            grad_output, grad_lse, inputs, output, lse, settings, frozen_memory=frozen_memory
        )
    elif chosen == "vendor":
        grads = vendor.memory_attention_backward(
            grad_output, inputs, output, lse, settings, frozen_memory=frozen_memory
        )
    else:
        grads = reference.memory_attention_backward(grad_output, grad_lse, inputs, output, lse, settings)
    # Laid out as the fake implementation says.
    return tuple(
        query.new_empty(0) if tensor is None else grad.contiguous()
        for grad, tensor in zip(grads, _inputs_with_gradient(inputs, frozen_memory), strict=True)
    )


@torch.library.register_fake("r3mem::memory_attention_backward", lib=_library)
def _fake_memory_attention_backward(
    grad_output: torch.Tensor, grad_lse: torch.Tensor | None, *arguments: Any
) -> tuple[torch.Tensor, ...]:
    inputs = AttentionInputs(*arguments[: len(AttentionInputs._fields)])
    frozen_memory = arguments[-1]
    return tuple(
        inputs.query.new_empty(0)
        if tensor is None
        else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in _inputs_with_gradient(inputs, frozen_memory)
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, scale, window, softcap, query_offset = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.settings = (scale, window, softcap, query_offset)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple:
    *tensors, output, lse = ctx.saved_tensors
    if grad_output is None and grad_lse is None:
        return (None,) * (len(tensors) + len(ctx.settings))
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    wanted = AttentionInputs(*ctx.needs_input_grad[: len(tensors)])
    frozen_memory = not (wanted.memory_key or wanted.memory_value)
    grads = torch.ops.r3mem.memory_attention_backward(
        grad_output, grad_lse, *tensors, output, lse, *ctx.settings, frozen_memory
    )
    query, key, value, memory_key, memory_value, sinks = (
        grad if is_wanted else None for grad, is_wanted in zip(grads, (*wanted[:5], wanted.sinks), strict=True)
    )
    # In the order of the inputs: lengths, starts and ends have no gradient.
    return (query, key, value, memory_key, memory_value, None, None, None, sinks, *(None,) * len(ctx.settings))


torch.library.register_autograd("r3mem::memory_attention", _backward, setup_context=_setup_context, lib=_library)


def _refuse_gradients(name: str, what: str) -> None:
    """Make an operator's derivative an error; without this, it would exist for some implementations only."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{what} has no derivative")

    torch.library.register_autograd(f"r3mem::{name}", backward, lib=_library)


_refuse_gradients("memory_attention_backward", "the gradient of memory_attention (create_graph=True)")


_library.define(
    "memory_decode(Tensor query, Tensor key, Tensor value, Tensor? memory_key, Tensor? memory_value, "
    "Tensor? memory_lengths, Tensor? lengths, Tensor? segment_starts, Tensor? sinks, float scale, SymInt window, "
    "float softcap) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@_implements("memory_decode")
def _run_memory_decode(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value, memory_key, memory_value, memory_lengths, lengths, segment_starts, sinks, *numbers = arguments
    inputs = AttentionInputs(query, key, value, memory_key, memory_value, memory_lengths, segment_starts, None, sinks)
    scale, window, softcap = numbers
    settings = AttentionSettings(scale, window or None, softcap or None)
    chosen = dispatch.choose_for_decoding(inputs, settings).implementation
    if chosen == "triton":
        return _triton().memory_decode(inputs, lengths, settings)
    lengths = key.shape[2] if lengths is None else lengths
    implementation = folded if chosen == "vendor" else reference
    output, lse = implementation.memory_attention(inputs, settings._replace(query_offset=lengths - query.shape[2]))
    return new_output(query).copy_(output), lse.contiguous()


@torch.library.register_fake("r3mem::memory_decode", lib=_library)
def _fake_memory_decode(query: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return new_output(query), new_lse(query)


_refuse_gradients("memory_decode", "memory_decode")

memory_attention = torch.ops.r3mem.memory_attention.default
memory_attention_backward = torch.ops.r3mem.memory_attention_backward.default
memory_decode = torch.ops.r3mem.memory_decode.default
