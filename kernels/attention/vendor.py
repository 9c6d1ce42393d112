"""The third implementation: the vendor's attention over the segment, a pass over the memory alone, and their merge.

The segment's part is plain causal attention, for which PyTorch brings its vendors' best kernels; the softmax over the
memory is merged into it (`reference.merge`). Backward, the vendor's kernel is handed the merged output and lse in
place of its own, which makes its gradients those of the common softmax: `p_ij = exp(z_ij - lse_i)` and
`delta_i = g^o_i · o_i` are all that it takes from them.
"""

import torch

from . import reference

_aten = torch.ops.aten


def why_not(query, key, memory_key, segment_starts, cu_seqlens, sinks, *, window, softcap, query_offset) -> str | None:
    """Why the vendor's kernel cannot take a segment; None if it can."""
    if query.device.type not in ("cpu", "cuda"):
        return f"no vendor's kernel is called on the device type {query.device.type!r}"
    if query.device.type == "cuda" and (query.dtype.itemsize != 2 or query.shape[-1] % 8):
        return "flash attention takes bfloat16 and float16, and a head_dim that 8 divides"
    reasons = {
        "a memory alone": key is None,
        "sequences of different lengths": cu_seqlens is not None,
        "queries behind others": query_offset != 0,
        "left padding": segment_starts is not None,
        "a window": window is not None and key is not None and window < key.shape[2],
        "a softcap": softcap is not None,
        "sinks without a memory": sinks is not None and _is_empty(memory_key),
        "nothing": query.numel() == 0,
    }
    return next((f"not for {name}" for name, found in reasons.items() if found), None)


def memory_attention(
    query, key, value, memory_key, memory_value, memory_lengths, sinks, *, scale
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(o, lse)`, as of `reference.memory_attention`, of what `why_not` has nothing against."""
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    if query.device.type == "cpu":
        output, lse = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scale)
    else:
        output, lse, *_ = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scale)
    if _is_empty(memory_key):
        return output, lse
    tensors = (query, None, None, memory_key, memory_value, memory_lengths)
    return reference.merge(output, lse, *_over_memory("memory_attention", tensors, (sinks,), scale))


def memory_attention_backward(
    grad_output,
    query,
    key,
    value,
    memory_key,
    memory_value,
    memory_lengths,
    sinks,
    output,
    lse,
    *,
    scale,
    frozen_memory=False,
):
    """Gradients in the order of `reference.memory_attention_backward`; that of lse cannot be given.

    frozen_memory: leave out the memory's gradients, where Triton runs.
    """
    arguments = (grad_output, query, key, value, output, lse)
    if query.device.type == "cpu":
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*arguments, 0.0, True, scale=scale)
    else:
        unused = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the random state of no dropout
        tokens = query.shape[2]
        grads = _aten._scaled_dot_product_flash_attention_backward(
            *arguments, None, None, tokens, tokens, 0.0, True, unused, unused, scale=scale
        )
    if _is_empty(memory_key):
        # Gradients of an empty memory are as empty.
        return (*grads, *(None if t is None else torch.zeros_like(t) for t in (memory_key, memory_value)), None)
    tensors = (grad_output, None, query, None, None, memory_key, memory_value, memory_lengths)
    others, only = (sinks, output, lse), {"frozen_memory": frozen_memory}
    of_query, _, _, *of_memory = _over_memory("memory_attention_backward", tensors, others, scale, only)
    return (grads[0] + of_query, *grads[1:], *of_memory)


def _is_empty(memory):
    return memory is None or not memory.shape[2]


def _over_memory(name, tensors, others, scale, only_triton=()):
    """An operation with the memory's keys alone."""
    settings = {"scale": scale, "window": None, "softcap": None, "offsets": 0}
    if tensors[0].device.type == "cpu":
        return getattr(reference, name)(*tensors, None, *others, **settings)
    from . import triton

    return getattr(triton, name)(*tensors, None, None, *others, **settings, **dict(only_triton))
