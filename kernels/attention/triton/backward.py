"""The backward pass, without atomics: every gradient is summed by one program, in one order.

attention_delta_kernel      g^o · o - g^lse, a number for each query
attention_query_kernel      g^q: one program for each block of queries, over the keys, as forward
attention_key_kernel        g^k, g^v: one program for each block of the segment's keys, over the queries of all heads
                            that share it
attention_memory_kernel     the same for the memory's keys, which all queries see: over a part of the queries of a row,
                            in float32; `_sum_parts` adds the parts up, and the rows where they share a memory
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...common.launch import Launch
from ..arguments import AttentionInputs, AttentionSettings
from ..reference import grad_of_sinks
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

# As in forward.py.
_QUERY_CONFIGURATIONS = {
    "cuda:80": {2: {64: (128, 64, 256, 2), 128: (128, 32, 256, 2), 256: (64, 64, 256, 2)},
               4: {64: (32, 32, 128, 2), 128: (16, 32, 256, 2), 256: (16, 16, 256, 2)}},
    "cuda:89": {2: {64: (128, 64, 256, 2), 128: (128, 32, 256, 2), 256: (32, 32, 256, 1)},
                4: {64: (32, 32, 128, 2), 128: (16, 32, 256, 2), 256: (16, 16, 256, 2)}},
    "cuda:90": {2: {64: (128, 64, 256, 2), 128: (128, 64, 256, 2), 256: (128, 32, 256, 2)},
               4: {64: (32, 32, 128, 2), 128: (32, 32, 256, 2), 256: (32, 32, 256, 2)}},
    "cuda:100": {2: {64: (128, 64, 256, 2), 128: (128, 64, 256, 2), 256: (128, 32, 256, 2)},
                4: {64: (32, 32, 128, 2), 128: (16, 32, 256, 2), 256: (16, 16, 256, 2)}},
    "hip:gfx942": {2: {64: (64, 64, 256, 1), 128: (64, 32, 256, 1), 256: (32, 16, 256, 1)},
                  4: {64: (32, 32, 256, 1), 128: (32, 16, 256, 1), 256: (16, 16, 256, 1)}},
}  # fmt: skip
_KEY_CONFIGURATIONS = {
    "cuda:80": {2: {64: (32, 128, 256, 2), 128: (32, 64, 256, 2), 256: (16, 64, 256, 1)},
               4: {64: (16, 32, 256, 2), 128: (16, 16, 256, 1), 256: (16, 32, 256, 1)}},
    "cuda:90": {2: {64: (64, 128, 256, 2), 128: (32, 128, 256, 2), 256: (32, 64, 256, 1)},
               4: {64: (32, 32, 256, 2), 128: (16, 16, 128, 1), 256: (16, 32, 256, 1)}},
    "cuda:100": {2: {64: (32, 128, 256, 2), 128: (32, 128, 256, 1), 256: (16, 64, 256, 1)},
                4: {64: (16, 32, 256, 2), 128: (16, 16, 128, 1), 256: (16, 32, 256, 1)}},
    "hip:gfx942": {2: {64: (64, 64, 256, 1), 128: (32, 64, 256, 1), 256: (16, 32, 256, 1)},
                  4: {64: (32, 32, 256, 1), 128: (16, 32, 256, 1), 256: (16, 16, 256, 1)}},
}  # fmt: skip
# About how many programs the memory's gradient is split into: some for each multiprocessor of a large GPU. A constant,
# so that the order of additions, and with it the result, does not depend on how many the GPU has.
_PROGRAMS = 264
_DELTA_QUERIES = 32


class QueryTile(NamedTuple):
    """A block of queries with what the backward pass needs of them, loaded.

    Attributes:
        query: `[BLOCK_M, BLOCK_D]`.
        grad_output: `[BLOCK_M, BLOCK_D]`.
        lse: To base 2, float32 `[BLOCK_M]`.
        delta: float32 `[BLOCK_M]`.
    """

    query: Any
    grad_output: Any
    lse: Any
    delta: Any


class Queries(NamedTuple):
    """The queries of one head with what the backward pass needs of them, as pointers.

    Attributes:
        query: Pointer to the first query.
        grad_output: Pointer to the gradient of the first output.
        lse: Pointer to the log-sum-exps of all heads.
        delta: Pointer to the deltas of all heads.
        offset: Position of this head's first log-sum-exp and delta among those of all heads.
        query_token: Distance from a query to the next, in elements.
        grad_output_token: Distance from a gradient to the next, in elements.
        count: Number of queries.
    """

    query: Any
    grad_output: Any
    lse: Any
    delta: Any
    offset: Any
    query_token: Any
    grad_output_token: Any
    count: Any


@triton.jit(do_not_specialize=LENGTHS)
def attention_delta_kernel(
    grad_output,
    output,
    grad_lse,  # None: zeros
    delta,
    grad_output_strides,
    output_strides,
    tokens,
    blocks,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Compute delta of a block of queries of one head."""
    program = tl.program_id(0)
    block = program % blocks
    head = (program // blocks % heads).to(tl.int64)
    row = (program // blocks // heads).to(tl.int64)
    lines = block * BLOCK_M + tl.arange(0, BLOCK_M)
    of_grad = advance(grad_output, grad_output_strides, row, head, 0)
    grads = load_tile(of_grad, lines, grad_output_strides.token, 0, tokens, True, D, BLOCK_D).to(tl.float32)
    of_output = advance(output, output_strides, row, head, 0)
    outputs = load_tile(of_output, lines, output_strides.token, 0, tokens, True, D, BLOCK_D).to(tl.float32)
    found = tl.sum(grads * outputs, axis=1)
    at = (row * heads + head) * tokens + lines
    if grad_lse is not None:
        found -= tl.load(grad_lse + at, mask=lines < tokens, other=0.0)
    tl.store(delta + at, found, mask=lines < tokens)


@triton.jit
def base_2_lse(lse, lines, count):
    """Load log-sum-exps to base 2; 0 for queries outside, and for those that see nothing, whose keys are masked."""
    found = tl.load(lse + lines, mask=(lines >= 0) & (lines < count), other=0.0)
    return tl.where(found == float("-inf"), 0.0, found * _LOG2_E)


@triton.jit
def add_query_gradient(
    acc, tile, keys, columns, visible, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add what one block of keys contributes to the gradient of a block of queries, all but the factor SCALE.

    acc: float32 `[BLOCK_M, BLOCK_D]`. tile: a `QueryTile`. keys: a `Keys`. columns: int32 `[BLOCK_N]`, positions of
    the block. visible: bool `[BLOCK_M, BLOCK_N]`, or `[1, BLOCK_N]`; None: all are seen. Returns the new acc.
    """
    MASKED: tl.constexpr = visible is not None
    key = load_tile(keys.key, columns, keys.key_token, keys.first, keys.end, MASKED, D, BLOCK_D)
    logits, slope = base_2_logits(tl.dot(tile.query, tl.trans(key), input_precision="ieee"), SCALE, SOFTCAP)
    if MASKED:
        logits = tl.where(visible, logits, float("-inf"))
    weights = tl.exp2(logits - tile.lse[:, None])
    value = load_tile(keys.value, columns, keys.value_token, keys.first, keys.end, MASKED, D, BLOCK_D)
    grad_weights = tl.dot(tile.grad_output, tl.trans(value), input_precision="ieee")
    grad_logits = weights * (grad_weights - tile.delta[:, None]) * slope
    return tl.dot(grad_logits.to(key.dtype), key, acc, input_precision="ieee")


@triton.jit(do_not_specialize=LENGTHS)
def attention_query_kernel(
    query,
    key,  # None: the memory alone
    value,
    memory_key,  # None: no memory
    memory_value,
    memory_lengths,
    segment_starts,
    cu_seqlens,
    grad_output,
    lse,
    delta,
    grad_query,
    query_strides,
    key_strides,
    value_strides,
    memory_key_strides,
    memory_value_strides,
    grad_output_strides,
    grad_query_strides,
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
    """Compute g^q of a block of queries of one head."""
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
        own = advance(grad_output, grad_output_strides, stored, head, first)
        grads = load_tile(own, lines, grad_output_strides.token, 0, count, True, D, BLOCK_D)
        of_head = (stored * heads + head) * tokens + first
        lse_2 = base_2_lse(lse + of_head, lines, count)
        deltas = tl.load(delta + of_head + lines, mask=lines < count, other=0.0)
        tile = QueryTile(queries, grads, lse_2, deltas)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
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
                acc = add_query_gradient(acc, tile, memory, columns, None, SCALE, SOFTCAP, D, BLOCK_D)
            for index in range(left + right):
                at = tl.where(index < left, begin + index * MEMORY_N, full_end + (index - left) * MEMORY_N)
                columns = at + tl.arange(0, MEMORY_N)
                visible = ((columns >= low) & (columns < memory_tokens))[None, :]
                acc = add_query_gradient(acc, tile, memory, columns, visible, SCALE, SOFTCAP, D, BLOCK_D)
        if key is not None:
            keys = advance(key, key_strides, stored, shared, first)
            values = advance(value, value_strides, stored, shared, first)
            start = first_in_segment(segment_starts, row)
            low, low_full, high_full, high = visible_range(block, count, offset, start, window, BLOCK_M, WINDOWED)
            segment = Keys(keys, values, key_strides.token, value_strides.token, low, high)
            left, begin, full_begin, full, full_end, right = split_key_blocks(low, low_full, high_full, high, BLOCK_N)
            for index in range(full):
                columns = full_begin + index * BLOCK_N + tl.arange(0, BLOCK_N)
                acc = add_query_gradient(acc, tile, segment, columns, None, SCALE, SOFTCAP, D, BLOCK_D)
            for index in range(left + right):
                at = tl.where(index < left, begin + index * BLOCK_N, full_end + (index - left) * BLOCK_N)
                columns = at + tl.arange(0, BLOCK_N)
                positions = (offset + lines)[:, None]
                visible = segment_visible(positions, columns[None, :], start, window, high, WINDOWED)
                acc = add_query_gradient(acc, tile, segment, columns, visible, SCALE, SOFTCAP, D, BLOCK_D)
        to = advance(grad_query, grad_query_strides, stored, head, first)
        store_tile(to, lines, grad_query_strides.token, count, acc * SCALE, D, BLOCK_D)


@triton.jit
def add_key_gradients(
    grads, key, value, queries, lines, visible, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add what one block of queries contributes to the gradients of a block of keys, g^k all but the factor SCALE.

    grads: `(g^k, g^v)`, float32 `[BLOCK_N, BLOCK_D]`. key, value: `[BLOCK_N, BLOCK_D]`. queries: a `Queries`. lines:
    int32 `[BLOCK_M]`, positions of the block. visible: bool `[BLOCK_N, BLOCK_M]`; None: all are seen. Returns the new
    grads.
    """
    grad_key, grad_value = grads
    lse, delta = queries.lse + queries.offset, queries.delta + queries.offset
    query = load_tile(queries.query, lines, queries.query_token, 0, queries.count, True, D, BLOCK_D)
    logits, slope = base_2_logits(tl.dot(key, tl.trans(query), input_precision="ieee"), SCALE, SOFTCAP)
    if visible is not None:
        logits = tl.where(visible, logits, float("-inf"))
    weights = tl.exp2(logits - base_2_lse(lse, lines, queries.count)[None, :])
    grad_output = load_tile(queries.grad_output, lines, queries.grad_output_token, 0, queries.count, True, D, BLOCK_D)
    grad_value = tl.dot(weights.to(grad_output.dtype), grad_output, grad_value, input_precision="ieee")
    deltas = tl.load(delta + lines, mask=(lines >= 0) & (lines < queries.count), other=0.0)
    grad_weights = tl.dot(value, tl.trans(grad_output), input_precision="ieee")
    grad_logits = weights * (grad_weights - deltas[None, :]) * slope
    grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision="ieee")
    return grad_key, grad_value


@triton.jit(do_not_specialize=LENGTHS)
def attention_key_kernel(
    query,
    key,
    value,
    segment_starts,
    cu_seqlens,
    grad_output,
    lse,
    delta,
    grad_key,
    grad_value,
    query_strides,
    key_strides,
    value_strides,
    grad_output_strides,
    grad_key_strides,
    grad_value_strides,
    tokens,  # of a row, or of all sequences
    offset,
    window,
    blocks,  # of keys
    heads,
    group,  # query heads that share a key head
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOWED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute g^k and g^v of a block of the segment's keys of one key head."""
    block, pair = rank_and_pair(blocks)  # those that are seen by most first
    shared = (pair % (heads // group)).to(tl.int64)
    row = (pair // (heads // group)).to(tl.int64)
    stored, first, count = locate_sequence(cu_seqlens, row, tokens)
    last = offset + count
    if block * BLOCK_N < last:
        columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
        start = first_in_segment(segment_starts, row)
        own = advance(key, key_strides, stored, shared, first)
        keys = load_tile(own, columns, key_strides.token, start, last, True, D, BLOCK_D)
        own = advance(value, value_strides, stored, shared, first)
        values = load_tile(own, columns, value_strides.token, start, last, True, D, BLOCK_D)
        grads = (tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32))
        # Queries that see some of these keys, and those that see all of them.
        low = tl.maximum(block * BLOCK_N - offset, 0)
        low_full = tl.maximum((block + 1) * BLOCK_N - 1 - offset, 0)
        high, high_full = count, count
        if WINDOWED:
            high = tl.maximum(tl.minimum(count, (block + 1) * BLOCK_N - 1 - offset + window), 0)
            high_full = tl.minimum(count, block * BLOCK_N - offset + window)
        if segment_starts is not None:
            high = tl.where((block + 1) * BLOCK_N <= start, low, high)
            high_full = tl.where(block * BLOCK_N < start, low, high_full)
        left, begin, full_begin, full, full_end, right = split_key_blocks(low, low_full, high_full, high, BLOCK_M)
        for index in range(group):
            head = shared * group + index
            of_query = advance(query, query_strides, stored, head, first)
            of_grad = advance(grad_output, grad_output_strides, stored, head, first)
            of_head = (stored * heads + head) * tokens + first
            queries = Queries(
                of_query, of_grad, lse, delta, of_head, query_strides.token, grad_output_strides.token, count
            )
            for step in range(left + right):
                at = tl.where(step < left, begin + step * BLOCK_M, full_end + (step - left) * BLOCK_M)
                lines = at + tl.arange(0, BLOCK_M)
                positions = (offset + lines)[None, :]
                visible = segment_visible(positions, columns[:, None], start, window, last, WINDOWED)
                grads = add_key_gradients(grads, keys, values, queries, lines, visible, SCALE, SOFTCAP, D, BLOCK_D)
            for step in range(full):
                lines = full_begin + step * BLOCK_M + tl.arange(0, BLOCK_M)
                grads = add_key_gradients(grads, keys, values, queries, lines, None, SCALE, SOFTCAP, D, BLOCK_D)
        grad_keys, grad_values = grads
        to = advance(grad_key, grad_key_strides, stored, shared, first)
        store_tile(to, columns, grad_key_strides.token, last, grad_keys * SCALE, D, BLOCK_D)
        to = advance(grad_value, grad_value_strides, stored, shared, first)
        store_tile(to, columns, grad_value_strides.token, last, grad_values, D, BLOCK_D)


@triton.jit(do_not_specialize=LENGTHS)
def attention_memory_kernel(
    query,
    memory_key,
    memory_value,
    memory_lengths,
    cu_seqlens,
    grad_output,
    lse,
    delta,
    grad_key,  # float32 [splits, rows, key heads, memory_tokens, D], contiguous
    grad_value,
    query_strides,
    memory_key_strides,
    memory_value_strides,
    grad_output_strides,
    tokens,  # of a row, or of all sequences
    memory_tokens,
    blocks,  # of memory keys
    heads,
    group,  # query heads that share a key head
    rows,
    splits,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute g^k and g^v of a block of a row's memory keys of one key head, over one part of the queries."""
    program = tl.program_id(0)
    block = program % blocks
    shared = (program // blocks % (heads // group)).to(tl.int64)
    row = (program // blocks // (heads // group) % rows).to(tl.int64)
    split = program // blocks // (heads // group) // rows
    stored, first, count = locate_sequence(cu_seqlens, row, tokens)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    at = advance(memory_key, memory_key_strides, row, shared, 0)
    keys = load_tile(at, columns, memory_key_strides.token, 0, memory_tokens, True, D, BLOCK_D)
    at = advance(memory_value, memory_value_strides, row, shared, 0)
    values = load_tile(at, columns, memory_value_strides.token, 0, memory_tokens, True, D, BLOCK_D)
    grads = (tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32))
    steps = (count + BLOCK_M - 1) // BLOCK_M
    each = (steps + splits - 1) // splits
    for index in range(group):
        head = shared * group + index
        of_query = advance(query, query_strides, stored, head, first)
        of_grad = advance(grad_output, grad_output_strides, stored, head, first)
        of_head = (stored * heads + head) * tokens + first
        queries = Queries(
            of_query, of_grad, lse, delta, of_head, query_strides.token, grad_output_strides.token, count
        )
        for step in range(split * each, tl.minimum((split + 1) * each, steps)):
            lines = step * BLOCK_M + tl.arange(0, BLOCK_M)
            grads = add_key_gradients(grads, keys, values, queries, lines, None, SCALE, SOFTCAP, D, BLOCK_D)
    grad_keys, grad_values = grads
    # No mask above: a key that is not visible affects only its own line of these.
    seen = (columns >= first_in_memory(memory_lengths, row, memory_tokens))[:, None]
    base = ((split * rows + row) * (heads // group) + shared) * memory_tokens * D
    store_tile(grad_key + base, columns, D, memory_tokens, tl.where(seen, grad_keys * SCALE, 0.0), D, BLOCK_D)
    store_tile(grad_value + base, columns, D, memory_tokens, tl.where(seen, grad_values, 0.0), D, BLOCK_D)


def plan_memory_attention_backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    inputs: AttentionInputs,
    output: torch.Tensor,
    lse: torch.Tensor,
    settings: AttentionSettings,
    *,
    frozen_memory: bool = False,
    target: str | None = None,
) -> tuple[list[Launch], Callable[[], tuple[torch.Tensor | None, ...]]]:
    """Plan the launches of `memory_attention_backward`.

    Args:
        grad_output: Gradient of the output, of its shape.
        grad_lse: Gradient of lse, of its shape; None for zeros.
        inputs: Tensors of the attention.
        output: What `memory_attention` returned.
        lse: What `memory_attention` returned.
        settings: Settings of the attention; `query_offset` must be an int.
        frozen_memory: Leave out the memory's gradients, which are then None.
        target: GPU to compile for, as the compile gate names it (cuda:90, hip:gfx942); None for the tensors' device.

    Returns:
        The launches in their order, and a function that makes the gradients of what they have written.
    """
    query, key, value, memory_key = inputs[:4]
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    grads = {
        "grad_query": _empty_contiguous(query),
        "grad_key": _empty_contiguous(key),
        "grad_value": _empty_contiguous(value),
    }
    if inputs.cu_seqlens is not None:  # there may be tokens that belong to no sequence
        for grad in grads.values():
            if grad is not None:
                grad.zero_()
    extent = extent_of(inputs, settings.query_offset, settings.max_seqlen)
    stored, rows, key_heads, longest = extent.stored, extent.rows, extent.key_heads, extent.longest
    head_dim, target = query.shape[-1], resolve_target(query, target)
    for_queries = select_configuration(_QUERY_CONFIGURATIONS, head_dim, query.dtype, target)
    for_keys = select_configuration(_KEY_CONFIGURATIONS, head_dim, query.dtype, target)
    tensors = {"grad_output": grad_output, "output": output, **grads}
    others = {"grad_lse": None if grad_lse is None else grad_lse.contiguous(), "lse": lse, "delta": delta}
    plan = launch_planner(inputs, settings, extent, tensors, others)
    blocks = triton.cdiv(extent.tokens, _DELTA_QUERIES)
    for_delta = (_DELTA_QUERIES, 0, for_queries[2], 1)
    launches = [plan(attention_delta_kernel, blocks * extent.heads * stored, for_delta, blocks=blocks)]
    blocks = triton.cdiv(longest, for_queries[0])
    launches.append(plan(attention_query_kernel, blocks * extent.heads * rows, for_queries, blocks=blocks))
    if key is not None:
        blocks = triton.cdiv(longest + extent.offset, for_keys[1])
        launches.append(plan(attention_key_kernel, blocks * key_heads * rows, for_keys, blocks=blocks))
    parts: tuple[torch.Tensor, ...] = ()
    if memory_key is not None and not frozen_memory:
        blocks = triton.cdiv(extent.memory_tokens, for_keys[1])
        splits = max(1, min(_PROGRAMS // max(1, blocks * key_heads * rows), longest // (4 * for_keys[0])))
        shape = (splits, rows, key_heads, extent.memory_tokens, head_dim)
        parts = tuple(query.new_empty(shape, dtype=torch.float32) for _ in range(2))
        own = {"grad_key": parts[0], "grad_value": parts[1], "blocks": blocks, "splits": splits}
        launches.append(plan(attention_memory_kernel, blocks * key_heads * rows * splits, for_keys, **own))

    def gradients() -> tuple[torch.Tensor | None, ...]:
        memory: tuple[torch.Tensor | None, ...] = (None, None)
        if memory_key is not None and not frozen_memory:
            memory = tuple(_sum_parts(part, memory_key) for part in parts)
        grad_sinks = None
        if inputs.sinks is not None:
            by_row = (stored, extent.heads, extent.tokens)
            grad_sinks = grad_of_sinks(inputs.sinks, lse.view(by_row), delta.view(by_row))
        return (*grads.values(), *memory, grad_sinks)

    return launches, gradients


def _empty_contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Make an unwritten, contiguous tensor of the same shape and dtype; None for None."""
    return None if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _sum_parts(parts: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Sum parts `[splits, rows, key heads, memory_tokens, D]` to the shape and dtype of the memory."""
    dims = (0,) if len(memory) == parts.shape[1] else (0, 1)
    return parts.sum(dims).view(memory.shape).to(memory.dtype)


def memory_attention_backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    inputs: AttentionInputs,
    output: torch.Tensor,
    lse: torch.Tensor,
    settings: AttentionSettings,
    *,
    frozen_memory: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """Compute the gradients as `reference.memory_attention_backward` does.

    Args:
        grad_output: Gradient of the output, of its shape.
        grad_lse: Gradient of lse, of its shape; None for zeros.
        inputs: Tensors of the attention.
        output: What `memory_attention` returned.
        lse: What `memory_attention` returned.
        settings: Settings of the attention; `query_offset` must be an int.
        frozen_memory: Leave out the memory's gradients, which are then None.

    Returns:
        `(g^q, g^k, g^v, g^(k^M), g^(v^M), g^sink)`, each of the shape and dtype of its tensor, or None.
    """
    launches, gradients = plan_memory_attention_backward(
        grad_output, grad_lse, inputs, output, lse, settings, frozen_memory=frozen_memory
    )
    for launch in launches:
        launch.run()
    return gradients()
