"""The forward pass: one program for each block of queries of one head, over the memory's keys, then the segment's.

Keys and values are read once for each block of queries, by their own strides. Of the blocks of keys only those on the
diagonal, at the edge of a window or of padding, and at the end are masked.
"""

import torch
import triton
import triton.language as tl

from ...common.launch import Launch
from ..arguments import AttentionInputs, AttentionSettings
from ..outputs import new_lse, new_output
from .common import (
    LENGTHS,
    LOG2_E,
    Keys,
    advance,
    base_2_logits,
    extent_of,
    first_in_memory,
    first_in_segment,
    launch_planner,
    load_tile,
    locate_sequence,
    rank_and_pair,
    resolve_target,
    segment_visible,
    select_configuration,
    split_key_blocks,
    store_tile,
    visible_range,
)

_LOG2_E = tl.constexpr(LOG2_E)

# Chosen by what the compiler makes of them (registers, shared memory; no spills), not yet by a measurement on a GPU.
_CONFIGURATIONS = {
    "cuda:80": {2: {64: (128, 128, 256, 3), 128: (128, 64, 256, 3), 256: (64, 32, 256, 2)},
               4: {64: (64, 32, 256, 2), 128: (32, 16, 256, 2), 256: (32, 16, 256, 2)}},
    "cuda:90": {2: {64: (128, 128, 256, 3), 128: (128, 128, 256, 3), 256: (128, 32, 256, 2)},
               4: {64: (64, 32, 256, 2), 128: (16, 32, 256, 2), 256: (32, 16, 256, 2)}},
    "cuda:100": {2: {64: (128, 128, 256, 3), 128: (128, 64, 256, 3), 256: (128, 32, 256, 2)},
                4: {64: (64, 32, 256, 2), 128: (16, 32, 256, 2), 256: (16, 16, 256, 2)}},
    "hip:gfx942": {2: {64: (128, 64, 256, 1), 128: (128, 64, 256, 1), 256: (64, 32, 256, 1)},
                  4: {64: (32, 32, 256, 1), 128: (32, 16, 256, 1), 256: (16, 16, 256, 1)}},
}  # fmt: skip


@triton.jit
def weigh(softmax, query, key, visible, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Weigh one more block of keys for the running softmax (Dao et al. 2022, algorithm 1).

    softmax, query, visible: as `attend` takes them. key: `[BLOCK_N, BLOCK_D]`. Returns `(weights, carried, total,
    largest)`: the weights of the block, float32 `[BLOCK_M, BLOCK_N]`, the factor of what was summed before, and the
    sum of all weights and the largest logit so far, float32 `[BLOCK_M]`.
    """
    _, total, largest = softmax
    logits, factor = tl.dot(query, tl.trans(key), input_precision="ieee"), SCALE * _LOG2_E
    if SOFTCAP != 0.0 or SCALE <= 0.0:
        logits, _ = base_2_logits(logits, SCALE, SOFTCAP)
        factor = 1.0
    MASKED: tl.constexpr = visible is not None
    if MASKED:
        logits = tl.where(visible, logits, float("-inf"))
    # The largest is multiplied, and not all: product and difference are then one instruction.
    new = tl.maximum(largest, tl.max(logits, axis=1) * factor)
    # Where nothing has been seen yet, exp2(-inf - -inf) would be NaN.
    base = tl.where(new == float("-inf"), 0.0, new) if MASKED else new
    weights = tl.exp2(logits * factor - base[:, None])
    carried = tl.exp2(largest - base)
    return weights, carried, total * carried + tl.sum(weights, axis=1), new


@triton.jit
def attend(
    softmax, query, keys, columns, visible, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Take one more block of keys into the running softmax.

    softmax: `(acc, total, largest)`: weighted sum of the values, float32 `[BLOCK_M, BLOCK_D]`, sum of the weights and
    largest logit to base 2, float32 `[BLOCK_M]`. query: `[BLOCK_M, BLOCK_D]`. keys: a `Keys`. columns: int32
    `[BLOCK_N]`, positions of the block. visible: bool `[BLOCK_M, BLOCK_N]`, or `[1, BLOCK_N]`; None: all are seen.
    Returns the new softmax.
    """
    MASKED: tl.constexpr = visible is not None
    key = load_tile(keys.key, columns, keys.key_token, keys.first, keys.end, MASKED, D, BLOCK_D)
    weights, carried, total, largest = weigh(softmax, query, key, visible, SCALE, SOFTCAP)
    value = load_tile(keys.value, columns, keys.value_token, keys.first, keys.end, MASKED, D, BLOCK_D)
    acc = tl.dot(weights.to(value.dtype), value, softmax[0] * carried[:, None], input_precision="ieee")
    return acc, total, largest


@triton.jit
def store_output(softmax, sinks, output, lse, head, lines, token, count, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store o and lse of a block of queries of one head, from a softmax of `attend`.

    sinks: pointer to those of all heads, or None. output, lse: pointers to the first of this head and row. lines:
    int32 `[BLOCK_M]`, positions of the queries. token: distance from an output to the next. count: number of queries.
    """
    acc, total, largest = softmax
    if sinks is not None:
        acc, total, largest = add_sink(softmax, tl.load(sinks + head))
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    store_tile(output, lines, token, count, acc, D, BLOCK_D)
    tl.store(lse + lines, (largest + tl.log2(total)) / _LOG2_E, mask=lines < count)


@triton.jit
def add_sink(softmax, sink):
    """Take a sink, a logit without a value, into a softmax of `attend`: one for all queries, or `[BLOCK_M]`."""
    acc, total, largest = softmax
    sink = sink.to(tl.float32) * _LOG2_E
    new = tl.maximum(largest, sink)
    base = tl.where(new == float("-inf"), 0.0, new)
    carried = tl.exp2(largest - base)
    return acc * carried[:, None], total * carried + tl.exp2(sink - base), new


@triton.jit(do_not_specialize=LENGTHS)
def attention_forward_kernel(
    query,
    key,  # None: the memory alone
    value,
    memory_key,  # None: no memory
    memory_value,
    memory_lengths,
    segment_starts,
    cu_seqlens,
    sinks,
    output,
    lse,
    query_strides,
    key_strides,
    value_strides,
    memory_key_strides,
    memory_value_strides,
    output_strides,
    tokens,  # of a row, or of all sequences
    offset,
    memory_tokens,
    window,
    blocks,
    heads,
    group,  # query heads that share a key head
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOWED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MEMORY_N: tl.constexpr,  # BLOCK_N of the memory
):
    """Compute o and lse of a block of queries of one head."""
    rank, pair = rank_and_pair(blocks)
    block = blocks - 1 - rank  # those that read most first
    head = (pair % heads).to(tl.int64)
    row = (pair // heads).to(tl.int64)
    shared = head // group
    stored, first, count = locate_sequence(cu_seqlens, row, tokens)
    if block * BLOCK_M < count:
        lines = block * BLOCK_M + tl.arange(0, BLOCK_M)
        own = advance(query, query_strides, stored, head, first)
        queries = load_tile(own, lines, query_strides.token, 0, count, True, D, BLOCK_D)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        softmax = (acc, total, largest)
        if memory_key is not None:
            keys = advance(memory_key, memory_key_strides, row, shared, 0)
            values = advance(memory_value, memory_value_strides, row, shared, 0)
            low = first_in_memory(memory_lengths, row, memory_tokens)
            memory = Keys(keys, values, memory_key_strides.token, memory_value_strides.token, low, memory_tokens)
            left, begin, full_begin, full, full_end, right = split_key_blocks(
                low, low, memory_tokens, memory_tokens, MEMORY_N
            )
            for index in range(full):
                columns = full_begin + index * MEMORY_N + tl.arange(0, MEMORY_N)
                softmax = attend(softmax, queries, memory, columns, None, SCALE, SOFTCAP, D, BLOCK_D)
            for index in range(left + right):
                at = tl.where(index < left, begin + index * MEMORY_N, full_end + (index - left) * MEMORY_N)
                columns = at + tl.arange(0, MEMORY_N)
                visible = ((columns >= low) & (columns < memory_tokens))[None, :]
                softmax = attend(softmax, queries, memory, columns, visible, SCALE, SOFTCAP, D, BLOCK_D)
        if key is not None:
            keys = advance(key, key_strides, stored, shared, first)
            values = advance(value, value_strides, stored, shared, first)
            start = first_in_segment(segment_starts, row)
            low, low_full, high_full, high = visible_range(block, count, offset, start, window, BLOCK_M, WINDOWED)
            segment = Keys(keys, values, key_strides.token, value_strides.token, low, high)
            left, begin, full_begin, full, full_end, right = split_key_blocks(low, low_full, high_full, high, BLOCK_N)
            for index in range(full):
                columns = full_begin + index * BLOCK_N + tl.arange(0, BLOCK_N)
                softmax = attend(softmax, queries, segment, columns, None, SCALE, SOFTCAP, D, BLOCK_D)
            for index in range(left + right):
                at = tl.where(index < left, begin + index * BLOCK_N, full_end + (index - left) * BLOCK_N)
                columns = at + tl.arange(0, BLOCK_N)
                positions = (offset + lines)[:, None]
                visible = segment_visible(positions, columns[None, :], start, window, high, WINDOWED)
                softmax = attend(softmax, queries, segment, columns, visible, SCALE, SOFTCAP, D, BLOCK_D)
        to = advance(output, output_strides, stored, head, first)
        of_head = lse + (stored * heads + head) * tokens + first
        store_output(softmax, sinks, to, of_head, head, lines, output_strides.token, count, D, BLOCK_D)


def plan_memory_attention(
    inputs: AttentionInputs, settings: AttentionSettings, *, target: str | None = None
) -> tuple[Launch, tuple[torch.Tensor, torch.Tensor]]:
    """Plan the launch of `memory_attention`, and make its outputs.

    Args:
        inputs: Tensors of the attention.
        settings: Its settings; `query_offset` must be an int.
        target: GPU to compile for, as the compile gate names it (cuda:90, hip:gfx942); None for the tensors' device.

    Returns:
        The launch, and `(output, lse)`, which it will write.
    """
    output, lse = new_output(inputs.query), new_lse(inputs.query)
    if inputs.cu_seqlens is not None:  # there may be tokens that belong to no sequence
        output.zero_()
        lse.zero_()
    extent = extent_of(inputs, settings.query_offset, settings.max_seqlen)
    plan = launch_planner(inputs, settings, extent, {"output": output}, {"lse": lse})
    head_dim, target = inputs.query.shape[-1], resolve_target(inputs.query, target)
    configuration = select_configuration(_CONFIGURATIONS, head_dim, inputs.query.dtype, target)
    blocks = triton.cdiv(extent.longest, configuration[0])
    programs = blocks * extent.heads * extent.rows
    return plan(attention_forward_kernel, programs, configuration, blocks=blocks), (output, lse)


def memory_attention(inputs: AttentionInputs, settings: AttentionSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `(o, lse)` as `reference.memory_attention` does.

    Args:
        inputs: Tensors of the attention.
        settings: Its settings; `query_offset` must be an int.

    Returns:
        The output and the log-sum-exps.
    """
    launch, outputs = plan_memory_attention(inputs, settings)
    launch.run()
    return outputs
