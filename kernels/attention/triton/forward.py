"""The forward pass: one program a block of queries of one head, over the memory's keys, then the segment's.

Keys and values are read once a block of queries, by their own strides; of the blocks of keys only those on the
diagonal, at a window's or padding's edge and at the end are masked.
"""

import torch
import triton
import triton.language as tl

from ..outputs import new_lse, new_output
from .common import (
    LENGTHS,
    LOG2_E,
    base_2_logits,
    configuration,
    first_in_memory,
    first_in_segment,
    in_segment,
    key_blocks,
    load_tile,
    planner,
    rows_first,
    segment_range,
    sequence,
    store_tile,
    target_for,
    with_unit_stride,
)

_LOG2_E = tl.constexpr(LOG2_E)

# BLOCK_M, BLOCK_N, threads, stages; by bytes of an element and head_dim. Chosen by what the compiler makes of them
# (registers, shared memory; no spills), not yet by a measurement on a GPU.
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
def attend(
    acc,
    total,
    largest,
    query,
    key,
    value,
    columns,
    low,
    count,
    key_token,
    value_token,
    visible,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of keys more in the running softmax. visible: bool `[BLOCK_M, BLOCK_N]`, ignored unless MASKED."""
    keys = load_tile(key, columns, key_token, low, count, MASKED, D, BLOCK_D)
    logits, _ = base_2_logits(tl.dot(query, tl.trans(keys), input_precision="ieee"), SCALE, SOFTCAP)
    if MASKED:
        logits = tl.where(visible, logits, float("-inf"))
    new = tl.maximum(largest, tl.max(logits, axis=1))
    # Where nothing has been seen yet, exp2(-inf - -inf) would be no number.
    base = tl.where(new == float("-inf"), 0.0, new) if MASKED else new
    weights = tl.exp2(logits - base[:, None])
    carried = tl.exp2(largest - base)
    total = total * carried + tl.sum(weights, axis=1)
    values = load_tile(value, columns, value_token, low, count, MASKED, D, BLOCK_D)
    acc = tl.dot(weights.to(values.dtype), values, acc * carried[:, None], input_precision="ieee")
    return acc, total, new


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
    query_row,
    query_head,
    query_token,
    key_row,
    key_head,
    key_token,
    value_row,
    value_head,
    value_token,
    memory_key_row,
    memory_key_head,
    memory_key_token,
    memory_value_row,
    memory_value_head,
    memory_value_token,
    output_row,
    output_head,
    output_token,
    tokens,  # of a row, or of all sequences
    offset,
    memory_tokens,
    window,
    blocks,
    heads,
    group,  # query heads a key head
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOWED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0)
    # Those that read most first, so that the last ones to end are short.
    block = blocks - 1 - program % blocks
    head = (program // blocks % heads).to(tl.int64)
    row = (program // blocks // heads).to(tl.int64)
    shared = head // group
    stored, first, count = sequence(cu_seqlens, row, tokens)
    if block * BLOCK_M < count:
        lines = block * BLOCK_M + tl.arange(0, BLOCK_M)
        own = query + stored * query_row + head * query_head + first * query_token
        queries = load_tile(own, lines, query_token, 0, count, True, D, BLOCK_D)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        if memory_key is not None:
            keys = memory_key + row * memory_key_row + shared * memory_key_head
            values = memory_value + row * memory_value_row + shared * memory_value_head
            low = first_in_memory(memory_lengths, row, memory_tokens)
            left, begin, full_begin, full, full_end, right = key_blocks(
                low, low, memory_tokens, memory_tokens, BLOCK_N
            )
            for index in range(full):
                columns = full_begin + index * BLOCK_N + tl.arange(0, BLOCK_N)
                acc, total, largest = attend(
                    acc, total, largest, queries, keys, values, columns, low, memory_tokens, memory_key_token,
                    memory_value_token, None, SCALE, SOFTCAP, False, D, BLOCK_D,
                )  # fmt: skip
            for index in range(left + right):
                at = tl.where(index < left, begin + index * BLOCK_N, full_end + (index - left) * BLOCK_N)
                columns = at + tl.arange(0, BLOCK_N)
                visible = ((columns >= low) & (columns < memory_tokens))[None, :]
                acc, total, largest = attend(
                    acc, total, largest, queries, keys, values, columns, low, memory_tokens, memory_key_token,
                    memory_value_token, visible, SCALE, SOFTCAP, True, D, BLOCK_D,
                )  # fmt: skip
        if key is not None:
            keys = key + stored * key_row + shared * key_head + first * key_token
            values = value + stored * value_row + shared * value_head + first * value_token
            start = first_in_segment(segment_starts, row)
            low, low_full, high_full, high = segment_range(block, count, offset, start, window, BLOCK_M, WINDOWED)
            left, begin, full_begin, full, full_end, right = key_blocks(low, low_full, high_full, high, BLOCK_N)
            for index in range(full):
                columns = full_begin + index * BLOCK_N + tl.arange(0, BLOCK_N)
                acc, total, largest = attend(
                    acc, total, largest, queries, keys, values, columns, low, high, key_token, value_token, None,
                    SCALE, SOFTCAP, False, D, BLOCK_D,
                )  # fmt: skip
            for index in range(left + right):
                at = tl.where(index < left, begin + index * BLOCK_N, full_end + (index - left) * BLOCK_N)
                columns = at + tl.arange(0, BLOCK_N)
                visible = in_segment((offset + lines)[:, None], columns[None, :], start, window, high, WINDOWED)
                acc, total, largest = attend(
                    acc, total, largest, queries, keys, values, columns, low, high, key_token, value_token, visible,
                    SCALE, SOFTCAP, True, D, BLOCK_D,
                )  # fmt: skip
        if sinks is not None:
            sink = tl.load(sinks + head).to(tl.float32) * _LOG2_E
            new = tl.maximum(largest, sink)
            base = tl.where(new == float("-inf"), 0.0, new)
            carried = tl.exp2(largest - base)
            acc, total, largest = acc * carried[:, None], total * carried + tl.exp2(sink - base), new
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        to = output + stored * output_row + head * output_head + first * output_token
        store_tile(to, lines, output_token, count, acc, D, BLOCK_D)
        to = lse + (stored * heads + head) * tokens + first + lines
        tl.store(to, (largest + tl.log2(total)) / _LOG2_E, mask=lines < count)


def plan_memory_attention(
    query,
    key,
    value,
    memory_key,
    memory_value,
    memory_lengths,
    segment_starts,
    cu_seqlens,
    sinks,
    *,
    scale,
    window,
    softcap,
    offsets,
    target=None,
):
    """The launch of `memory_attention`, and its outputs `(output, lse)`, as yet unwritten.

    With cu_seqlens, tensors are `[total, H, D]` and offsets is the longest length. target: as the compile gate names
    it; None: the device's.
    """
    output, lse = new_output(query), new_lse(query)
    if cu_seqlens is not None:  # there may be tokens that are of no sequence
        output.zero_()
        lse.zero_()
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "memory_key": memory_key,
        "memory_value": memory_value,
        "output": output,
    }
    tensors = {name: with_unit_stride(rows_first(tensor)) for name, tensor in tensors.items()}
    query, shared = tensors["query"], key if key is not None else memory_key
    rows, heads, tokens, head_dim = query.shape
    longest = tokens
    if cu_seqlens is not None:
        rows, longest, offsets = len(cu_seqlens) - 1, offsets, 0
    others = {
        "memory_lengths": memory_lengths,
        "segment_starts": segment_starts,
        "cu_seqlens": cu_seqlens,
        "sinks": None if sinks is None else sinks.contiguous(),
        "lse": lse,
        "tokens": tokens,
        "offset": offsets,
        "memory_tokens": 0 if memory_key is None else memory_key.shape[2],
        "heads": heads,
        "group": heads // shared.shape[1],
    }
    plan = planner(tensors, others, scale=scale, window=window, softcap=softcap)
    chosen = configuration(_CONFIGURATIONS, head_dim, query.dtype, target_for(query, target))
    blocks = triton.cdiv(longest, chosen[0])
    return plan(attention_forward_kernel, blocks * heads * rows, chosen, blocks=blocks), (output, lse)


def memory_attention(*tensors, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    planned, outputs = plan_memory_attention(*tensors, **settings)
    planned.run()
    return outputs
