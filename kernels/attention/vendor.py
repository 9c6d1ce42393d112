"""Attention by the vendor's kernel: its pass over the segment, a pass over the memory alone, and their merge.

The segment's part is plain causal attention, for which PyTorch brings its vendors' best kernels: its own on a CPU,
cuDNN's on Hopper and newer GPUs, flash attention 2 on others. The softmax over the memory is merged into it
(`reference.merge`). Backward, the vendor's kernel is given the merged output and lse in place of its own. All that it
takes from them is `p_ij = exp(z_ij - lse_i)` and `delta_i = g^o_i · o_i`, so its gradients become those of the common
softmax.
"""

from types import ModuleType

import torch

from ..common.compat import capability_of
from . import folded, reference
from .arguments import AttentionInputs, AttentionSettings

_aten = torch.ops.aten
# Head_dims up to which every version of cuDNN computes both passes.
_MAX_HEAD_DIM_OF_CUDNN = 128


def why_not(inputs: AttentionInputs, settings: AttentionSettings) -> str | None:
    """Say why the vendor's kernel cannot take a segment.

    Args:
        inputs: Tensors of the attention.
        settings: Its settings; `query_offset` must be an int.

    Returns:
        The reason in a few words, or None if the kernel can take it.
    """
    query, key = inputs.query, inputs.key
    if query.device.type not in ("cpu", "cuda"):
        return f"no vendor's kernel is called on the device type {query.device.type!r}"
    if query.device.type == "cuda" and (query.dtype.itemsize != 2 or query.shape[-1] % 8):
        return "flash attention takes bfloat16 and float16, and a head_dim that 8 divides"
    reasons = {
        "a memory alone": key is None,
        "sequences of different lengths": inputs.cu_seqlens is not None,
        "queries behind others": settings.query_offset != 0,
        "left padding": inputs.segment_starts is not None,
        "a window": settings.window is not None and key is not None and settings.window < key.shape[2],
        "a softcap": settings.softcap is not None,
        "sinks without a memory": inputs.sinks is not None and _is_empty(inputs.memory_key),
        "nothing": query.numel() == 0,
    }
    return next((f"not for {name}" for name, found in reasons.items() if found), None)


def choose_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str:
    """Choose the kernel for a segment that `why_not` has nothing against.

    Args:
        query: `[B, Hq, T, D]`.
        key: `[B, Hkv, T, D]`.
        value: As `key`.

    Returns:
        `cpu`; `cudnn` on GPUs of compute capability 9.0 and newer, if PyTorch can call it; or `flash`.
    """
    if query.device.type == "cpu":
        return "cpu"
    if capability_of(query.device) >= (9, 0) and query.shape[-1] <= _MAX_HEAD_DIM_OF_CUDNN:
        # PyTorch knows its version's limits, its switches, and that cuDNN is not deterministic.
        asked = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, query.shape[1] != key.shape[1])
        if torch.backends.cuda.can_use_cudnn_attention(asked):
            return "cudnn"
    return "flash"


def memory_attention(inputs: AttentionInputs, settings: AttentionSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `(o, lse)` as `reference.memory_attention` does.

    Args:
        inputs: Tensors of the attention.
        settings: Its settings, for which `why_not` must return None.

    Returns:
        The output, `[B, Hq, T, D]`, and the log-sum-exps, `[B, Hq, T]`.
    """
    query, key, value = _with_unit_strides(inputs)
    scale = settings.scale
    kernel = choose_kernel(query, key, value)
    if kernel == "cpu":
        output, lse = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scale)
    elif kernel == "cudnn":
        found = _aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, True, scale=scale)
        output, lse = found[0], found[1].squeeze(-1)  # its log-sum-exps are [B, Hq, T, 1]
    else:
        output, lse, *_ = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scale)
    if _is_empty(inputs.memory_key):
        return output, lse
    memory_alone = _memory_alone(inputs._replace(query=query))
    read = folded if query.device.type == "cpu" else _implementation_for_memory(query)
    of_memory = read.memory_attention(memory_alone, AttentionSettings(scale))
    return reference.merge(output, lse, *of_memory)


def memory_attention_backward(
    grad_output: torch.Tensor,
    inputs: AttentionInputs,
    output: torch.Tensor,
    lse: torch.Tensor,
    settings: AttentionSettings,
    *,
    frozen_memory: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """Compute the gradients of `memory_attention`. A gradient of lse cannot be given.

    Args:
        grad_output: Gradient of the output, `[B, Hq, T, D]`.
        inputs: Tensors of the attention.
        output: What `memory_attention` returned, `[B, Hq, T, D]`.
        lse: What `memory_attention` returned, `[B, Hq, T]`.
        settings: Settings of the attention, for which `why_not` must return None.
        frozen_memory: Leave out the memory's gradients, where Triton runs the pass over the memory.

    Returns:
        Gradients in the order of `reference.memory_attention_backward`.
    """
    query, key, value = _with_unit_strides(inputs)
    scale, tokens = settings.scale, query.shape[2]
    arguments = (grad_output, query, key, value, output, lse)
    kernel = choose_kernel(query, key, value)
    if kernel == "cpu":
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*arguments, 0.0, True, scale=scale)
    elif kernel == "cudnn":
        # PyTorch builds a graph for the layouts of the query, key and value, and takes it again for any layout of the
        # others. So these are laid out as its own forward pass leaves them: like the query.
        own = [_laid_out_as(query, tensor) for tensor in (grad_output, output)]
        unused = torch.zeros((), dtype=torch.int64, device=query.device)  # the random state of no dropout
        grads = _aten._scaled_dot_product_cudnn_attention_backward(
            own[0], query, key, value, own[1], lse.contiguous().unsqueeze(-1), unused, unused, None, None, None,
            tokens, tokens, 0.0, True, scale=scale,
        )  # fmt: skip
    else:
        unused = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the random state of no dropout
        grads = _aten._scaled_dot_product_flash_attention_backward(
            *arguments, None, None, tokens, tokens, 0.0, True, unused, unused, scale=scale
        )
    memory = (inputs.memory_key, inputs.memory_value)
    if _is_empty(inputs.memory_key):
        # The gradients of an empty memory are just as empty.
        return (*grads, *(None if tensor is None else torch.zeros_like(tensor) for tensor in memory), None)
    implementation = _implementation_for_memory(query)
    # Only Triton's function can leave out the memory's gradients.
    only_triton = {} if implementation is reference else {"frozen_memory": frozen_memory}
    grad_query, _, _, *others = implementation.memory_attention_backward(
        grad_output, None, _memory_alone(inputs), output, lse, AttentionSettings(scale), **only_triton
    )
    return (grads[0] + grad_query, *grads[1:], *others)


def _with_unit_strides(inputs: AttentionInputs) -> list[torch.Tensor]:
    """Return query, key and value with contiguous head_dim, as the vendors' kernels need them."""
    own = (inputs.query, inputs.key, inputs.value)
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in own if tensor is not None]


def _laid_out_as(query: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the query's shape with the strides that a new tensor like the query has."""
    if tensor.stride() == (like := torch.empty_like(query)).stride():
        return tensor
    return like.copy_(tensor)


def _is_empty(memory: torch.Tensor | None) -> bool:
    return memory is None or not memory.shape[2]


def _memory_alone(inputs: AttentionInputs) -> AttentionInputs:
    """Leave out the segment: queries that read the memory alone."""
    return inputs._replace(key=None, value=None, segment_starts=None)


def _implementation_for_memory(query: torch.Tensor) -> ModuleType:
    """Return the module that runs the pass over the memory: the reference on a CPU, Triton elsewhere."""
    if query.device.type == "cpu":
        return reference
    from . import triton

    return triton
