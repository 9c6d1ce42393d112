"""Memory-token attention as `torch.library` operators `torch.ops.r3mem.*`, differentiable, with fake implementations.

An operator returns tensors only: what is absent is an empty tensor there. `window` is 0 and `softcap` 0.0 where the
API says None. With cu_seqlens, tensors are `[total, H, D]`, and query_offset is the length of the longest sequence.
"""

import functools

import torch

from . import dispatch, reference, vendor
from .outputs import new_lse, new_output

_library = torch.library.Library("r3mem", "FRAGMENT")

_INPUTS = (
    "Tensor query, Tensor? key, Tensor? value, Tensor? memory_key, Tensor? memory_value, Tensor? memory_lengths, "
    "Tensor? segment_starts, Tensor? cu_seqlens, Tensor? sinks"
)
_SETTINGS = "float scale, SymInt window, float softcap, SymInt query_offset"


def _implements(name):
    """The operator's implementation on every device; autocast does not reach into it."""

    def define(function):
        @functools.wraps(function)
        def run(first, *others):
            with torch.autocast(first.device.type, enabled=False):
                return function(first, *others)

        _library.impl(name, run, "CompositeExplicitAutograd")

    return define


def _triton():
    from . import triton

    return triton


def _settings(scale, window, softcap):
    return {"scale": scale, "window": window or None, "softcap": softcap or None}


_library.define(f"memory_attention({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))


@_implements("memory_attention")
def _(
    query, key, value, memory_key, memory_value, memory_lengths, segment_starts, cu_seqlens, sinks,
    scale, window, softcap, query_offset,
):  # fmt: skip
    settings = _settings(scale, window, softcap)
    tensors = (query, key, value, memory_key, memory_value, memory_lengths)
    chosen = dispatch.choose(
        query, key, memory_key, segment_starts, cu_seqlens, sinks, window=settings["window"],
        softcap=settings["softcap"], query_offset=query_offset,
    ).implementation  # fmt: skip
    if chosen == "triton":
        return _triton().memory_attention(
            *tensors, segment_starts, cu_seqlens, sinks, offsets=query_offset, **settings
        )
    if chosen == "vendor":
        output, lse = vendor.memory_attention(*tensors, sinks, scale=scale)
    elif cu_seqlens is None:
        output, lse = reference.memory_attention(*tensors, segment_starts, sinks, offsets=query_offset, **settings)
    else:
        rows = (reference.padded(tensor, cu_seqlens, query_offset) for tensor in (query, key, value))
        output, lse = reference.memory_attention(*rows, *tensors[3:], None, sinks, offsets=0, **settings)
        output, lse = (reference.packed(t, cu_seqlens, len(query)) for t in (output, lse))
        lse = lse.transpose(0, 1)
    return new_output(query).copy_(output), lse.contiguous()


@torch.library.register_fake("r3mem::memory_attention", lib=_library)
def _(query, *others):
    return new_output(query), new_lse(query)


def _with_gradient(query, key, value, memory_key, memory_value, sinks, frozen_memory):
    """The inputs that have one, None where there is none."""
    memory = (None, None) if frozen_memory else (memory_key, memory_value)
    return query, key, value, *memory, sinks


_library.define(
    f"memory_attention_backward(Tensor grad_output, Tensor? grad_lse, {_INPUTS}, Tensor output, Tensor lse, "
    f"{_SETTINGS}, bool frozen_memory) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@_implements("memory_attention_backward")
def _(
    grad_output, grad_lse, query, key, value, memory_key, memory_value, memory_lengths, segment_starts, cu_seqlens,
    sinks, output, lse, scale, window, softcap, query_offset, frozen_memory,
):  # fmt: skip
    settings = _settings(scale, window, softcap)
    memory = (memory_key, memory_value, memory_lengths)
    tensors = (grad_output, grad_lse, query, key, value, *memory)
    chosen = dispatch.choose(
        query, key, memory_key, segment_starts, cu_seqlens, sinks, window=settings["window"],
        softcap=settings["softcap"], query_offset=query_offset,
    ).implementation  # fmt: skip
    if chosen == "vendor" and grad_lse is not None:  # which the vendors' kernels do not take
        chosen = "triton" if query.device.type == "cuda" else "reference"
    if chosen == "triton":
        grads = _triton().memory_attention_backward(
            *tensors, segment_starts, cu_seqlens, sinks, output, lse, offsets=query_offset,
            frozen_memory=frozen_memory, **settings,
        )  # fmt: skip
    elif chosen == "vendor":
        grads = vendor.memory_attention_backward(
            grad_output, *tensors[2:], sinks, output, lse, scale=scale, frozen_memory=frozen_memory
        )
    elif cu_seqlens is None:
        grads = reference.memory_attention_backward(
            *tensors, segment_starts, sinks, output, lse, offsets=query_offset, **settings
        )
    else:

        def rows(tensor):
            return reference.padded(tensor, cu_seqlens, query_offset)

        def turned(tensor):
            return None if tensor is None else rows(tensor.transpose(0, 1))

        grads = reference.memory_attention_backward(
            rows(grad_output), turned(grad_lse), rows(query), rows(key), rows(value), *memory, None, sinks,
            rows(output), turned(lse), offsets=0, **settings,
        )  # fmt: skip
        own = (reference.packed(grad, cu_seqlens, len(query)) for grad in grads[:3])
        grads = (*own, *grads[3:])
    inputs = _with_gradient(query, key, value, memory_key, memory_value, sinks, frozen_memory)
    # What is absent is empty; the others are laid out as the fake implementation says.
    return tuple(
        query.new_empty(0) if like is None else grad.contiguous() for grad, like in zip(grads, inputs, strict=True)
    )


@torch.library.register_fake("r3mem::memory_attention_backward", lib=_library)
def _(
    grad_output, grad_lse, query, key, value, memory_key, memory_value, memory_lengths, segment_starts, cu_seqlens,
    sinks, output, lse, scale, window, softcap, query_offset, frozen_memory,
):  # fmt: skip
    inputs = _with_gradient(query, key, value, memory_key, memory_value, sinks, frozen_memory)
    return tuple(
        query.new_empty(0) if like is None else torch.empty_like(like, memory_format=torch.contiguous_format)
        for like in inputs
    )


def _setup_context(ctx, inputs, output):
    *tensors, scale, window, softcap, query_offset = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.settings = (scale, window, softcap, query_offset)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_lse):
    saved = ctx.saved_tensors
    tensors, (output, lse) = saved[:-2], saved[-2:]
    if grad_output is None and grad_lse is None:
        return (None,) * (len(tensors) + len(ctx.settings))
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    frozen_memory = not any(ctx.needs_input_grad[3:5])
    grads = torch.ops.r3mem.memory_attention_backward(
        grad_output, grad_lse, *tensors, output, lse, *ctx.settings, frozen_memory
    )
    # Of tensors, in their order: lengths, starts and ends have none.
    query, key, value, memory_key, memory_value, sinks = (
        grad if wanted else None
        for grad, wanted in zip(grads, (*ctx.needs_input_grad[:5], ctx.needs_input_grad[8]), strict=True)
    )
    return (query, key, value, memory_key, memory_value, None, None, None, sinks, *(None,) * len(ctx.settings))


torch.library.register_autograd("r3mem::memory_attention", _backward, setup_context=_setup_context, lib=_library)


def _refuse_gradients(name, what):
    """Make an operator's derivative an error: it would be there or missing by implementation."""

    def backward(ctx, *grads):
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
def _(
    query, key, value, memory_key, memory_value, memory_lengths, lengths, segment_starts, sinks, scale, window, softcap
):
    settings = _settings(scale, window, softcap)
    tensors = (query, key, value, memory_key, memory_value, memory_lengths)
    if dispatch.choose_for_decoding(query).implementation == "triton":
        return _triton().memory_decode(*tensors, lengths, segment_starts, sinks, **settings)
    lengths = key.shape[2] if lengths is None else lengths
    output, lse = reference.memory_attention(
        *tensors, segment_starts, sinks, offsets=lengths - query.shape[2], **settings
    )
    return new_output(query).copy_(output), lse


@torch.library.register_fake("r3mem::memory_decode", lib=_library)
def _(query, *others):
    return new_output(query), new_lse(query)


_refuse_gradients("memory_decode", "memory_decode")

memory_attention = torch.ops.r3mem.memory_attention.default
memory_attention_backward = torch.ops.r3mem.memory_attention_backward.default
memory_decode = torch.ops.r3mem.memory_decode.default
