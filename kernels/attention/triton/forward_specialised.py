"""The forward pass with warps that share out the work: some load keys and values, others multiply them.

A rival of `forward.py` for GPUs that copy whole tiles by themselves (tensor descriptors, TMA), with the same softmax.
Not yet measured on a GPU, and so run only where it is asked for (`../dispatch.py`).

The compiler shares out one loop, and nothing behind an `if` within it. So memory and segment are one loop here, which
changes from the memory's tensor descriptors to the segment's, and all of its blocks are masked. A block may start at
any key: the first one starts at the first key that is read, and only the end has to be masked. What lies behind a
tensor's end is read as zeros.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...common.compat import interpreting, target_of
from ...common.launch import DIVISIBILITY, Launch
from ..arguments import AttentionInputs, AttentionSettings
from ..outputs import new_lse, new_output
from .common import (
    LENGTHS,
    Configuration,
    advance,
    extent_of,
    first_in_memory,
    first_in_segment,
    launch_planner,
    rank_and_pair,
    resolve_target,
    visible_range,
)
from .forward import store_output, weigh

# By target and head_dim, for 16 bits; as in forward.py. On Hopper the compiler adds two groups of four warps to the
# four that are asked for; only with four does it share out the loop.
_CONFIGURATIONS: dict[str, dict[int, Configuration]] = {
    "cuda:90": {64: (128, 128, 128, 2), 128: (128, 128, 128, 2)},
    "cuda:100": {64: (128, 128, 128, 3), 128: (128, 64, 256, 3)},
    "interpreter": {64: (16, 16, 128, 1), 128: (16, 16, 128, 1)},
}
HEAD_DIMS = (64, 128)


@triton.jit(do_not_specialize=LENGTHS)
def attention_specialised_kernel(
    query,
    key,  # a tensor descriptor [rows, key heads, tokens, D], as the three below
    value,
    memory_key,  # None: no memory
    memory_value,
    memory_lengths,
    segment_starts,
    sinks,
    output,
    lse,
    query_strides,
    output_strides,
    tokens,
    offset,
    memory_tokens,
    memory_rows,  # 1: all rows read one memory
    window,
    blocks,
    heads,
    group,  # query heads that share a key head
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOWED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute o and lse of a block of queries of one head."""
    rank, pair = rank_and_pair(blocks)
    block = blocks - 1 - rank  # those that read most first
    head = pair % heads
    row = pair // heads
    shared = head // group
    # Made here and not on the host: the compiler halves the block of queries for its two groups of warps.
    own = advance(query, query_strides, row.to(tl.int64), head.to(tl.int64), 0)
    described = tl.make_tensor_descriptor(own, [tokens, D], [query_strides.token, 1], [BLOCK_M, D])
    queries = described.load([block * BLOCK_M, 0])
    lines = block * BLOCK_M + tl.arange(0, BLOCK_M)
    positions = offset + lines
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    softmax = (acc, total, largest)
    start = first_in_segment(segment_starts, row)
    low, _, _, high = visible_range(block, tokens, offset, start, window, BLOCK_M, WINDOWED)
    memory_low = memory_tokens * 0
    of_memory = memory_tokens * 0
    if memory_key is not None:
        memory_low = first_in_memory(memory_lengths, row, memory_tokens)
        of_memory = (memory_tokens - memory_low + BLOCK_N - 1) // BLOCK_N
    of_segment = tl.maximum(high - low + BLOCK_N - 1, 0) // BLOCK_N
    for index in tl.range(0, of_memory + of_segment, warp_specialize=True):
        at = low + (index - of_memory) * BLOCK_N
        stored = row
        keys = key
        values = value
        last = positions
        if memory_key is not None:
            in_memory = index < of_memory
            at = tl.where(in_memory, memory_low + index * BLOCK_N, at)
            stored = tl.where(in_memory, tl.minimum(row, memory_rows - 1), row)
            last = tl.where(in_memory, memory_tokens - 1, positions)
            if in_memory:
                keys = memory_key
                values = memory_value
        columns = tl.arange(0, BLOCK_N)[None, :]
        limit = (last - at)[:, None]
        visible = columns <= limit
        if WINDOWED:
            reach = window
            if memory_key is not None:
                reach = tl.where(index < of_memory, memory_tokens, window)
            visible = visible & (columns > limit - reach)
        block_of_keys = keys.load([stored, shared, at, 0]).reshape([BLOCK_N, D])
        weights, carried, total, largest = weigh(softmax, queries, block_of_keys, visible, SCALE, SOFTCAP)
        block_of_values = values.load([stored, shared, at, 0]).reshape([BLOCK_N, D])
        acc = tl.dot(
            weights.to(block_of_values.dtype), block_of_values, softmax[0] * carried[:, None], input_precision="ieee"
        )
        softmax = (acc, total, largest)
    to = advance(output, output_strides, row.to(tl.int64), head.to(tl.int64), 0)
    of_head = lse + (row * heads + head).to(tl.int64) * tokens
    store_output(softmax, sinks, to, of_head, head, lines, output_strides.token, tokens, D, D)


def why_not_on(query: torch.Tensor) -> str | None:
    """Say why the kernel cannot run on a device at all, or for a dtype.

    Args:
        query: A tensor on the device, on which Triton can run.

    Returns:
        The reason in a few words, or None if it can.
    """
    if query.dtype.itemsize != 2:
        return "it takes bfloat16 and float16"
    if not interpreting() and target_of(query.device) not in _CONFIGURATIONS:
        return f"it runs on {' and '.join(list(_CONFIGURATIONS)[:2])}, and this is {target_of(query.device)}"
    return None


def why_not(inputs: AttentionInputs, settings: AttentionSettings) -> str | None:
    """Say why the kernel does not take a call, on a device on which it can run.

    Args:
        inputs: Tensors of the attention.
        settings: Its settings.

    Returns:
        The reason in a few words, or None if it takes the call.
    """
    query, key = inputs.query, inputs.key
    if key is None:
        return "not for a memory alone"
    if inputs.cu_seqlens is not None:
        return "not for sequences one after the other"
    if settings.softcap is not None:
        return "not for a softcap"
    if query.shape[-1] not in HEAD_DIMS:
        return f"not for head_dim {query.shape[-1]}"
    if not query.numel():
        return "not for nothing"
    described = (query, key, inputs.value, inputs.memory_key, inputs.memory_value)
    if not all(_can_be_described(tensor) for tensor in described if tensor is not None):
        return f"tensor descriptors need contiguous heads, and strides and addresses that {DIVISIBILITY} bytes divide"
    return None


def _can_be_described(tensor: torch.Tensor) -> bool:
    """Return whether a tensor descriptor can have a tensor's strides and address."""
    size = tensor.element_size()
    strides = [stride for count, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if count > 1]
    aligned = tensor.device.type == "meta" or tensor.data_ptr() % DIVISIBILITY == 0
    return aligned and tensor.stride(-1) == 1 and all(s and s * size % DIVISIBILITY == 0 for s in strides)


def _describe(tensor: torch.Tensor | None, block: int) -> TensorDescriptor | None:
    """Describe `[rows, heads, tokens, D]` for copies of `block` tokens of a head; None for None and for no tokens."""
    if tensor is None or not tensor.numel():
        return None
    # The stride of a dimension of one element may be anything, and means nothing.
    strides = [
        tensor.shape[-1] if count == 1 else stride
        for count, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    ]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, block, tensor.shape[-1]])


def plan_memory_attention(
    inputs: AttentionInputs, settings: AttentionSettings, *, target: str | None = None
) -> tuple[Launch, tuple[torch.Tensor, torch.Tensor]]:
    """Plan the launch of `memory_attention`, and make its outputs.

    Args:
        inputs: Tensors of the attention, for which `why_not` must return None.
        settings: Its settings; `query_offset` must be an int.
        target: GPU to compile for, as the compile gate names it (cuda:90, cuda:100); None for the tensors' device.

    Returns:
        The launch, and `(output, lse)`, which it will write.
    """
    query, memory_key = inputs.query, inputs.memory_key
    output, lse = new_output(query), new_lse(query)
    extent = extent_of(inputs, settings.query_offset)
    configuration = _CONFIGURATIONS[resolve_target(query, target)][query.shape[-1]]
    block_m, block_n, _, _ = configuration
    memory_rows = 0 if memory_key is None else len(memory_key)
    plan = launch_planner(inputs, settings, extent, {"output": output}, {"lse": lse, "memory_rows": memory_rows})
    names = ("key", "value", "memory_key", "memory_value")
    described: dict[str, Any] = {name: _describe(getattr(inputs, name), block_n) for name in names}
    blocks = triton.cdiv(extent.longest, block_m)
    programs = blocks * extent.heads * extent.rows
    launch = plan(attention_specialised_kernel, programs, configuration, blocks=blocks, **described)
    return launch, (output, lse)


def memory_attention(inputs: AttentionInputs, settings: AttentionSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `(o, lse)` as `reference.memory_attention` does.

    Args:
        inputs: Tensors of the attention, for which `why_not` must return None.
        settings: Its settings; `query_offset` must be an int.

    Returns:
        The output and the log-sum-exps.
    """
    launch, outputs = plan_memory_attention(inputs, settings)
    launch.run()
    return outputs
