"""The backward pass, without atomics: every gradient is summed by one program, in one order.

attention_delta_kernel      g^o · o - g^lse, a number a query
attention_query_kernel      g^q: one program a block of queries, over the keys, as forward
attention_key_kernel        g^k, g^v: one program a block of the segment's keys, over the queries of all heads that
                            share it
attention_memory_kernel     the same for the memory's keys, which all queries see: over a part of the queries of a
                            row, in float32; `_sum` adds the parts up, and the rows where they share a memory
"""

import torch
import triton
import triton.language as tl

from ..reference import grad_of_sinks
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

# As in forward.py: BLOCK_M of queries, BLOCK_N of keys, threads, stages.
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
# Programs that the memory's gradient is split into, about: some for each multiprocessor of a large GPU. A constant, so
# that the order of additions, and with it the result, does not depend on how many the GPU has.
_PROGRAMS = 264
_DELTA_QUERIES = 32


@triton.jit(do_not_specialize=LENGTHS)
def attention_delta_kernel(
    grad_output,
    output,
    grad_lse,
    delta,
    grad_output_row,
    grad_output_head,
    grad_output_token,
    output_row,
    output_head,
    output_token,
    tokens,
    blocks,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    program = tl.program_id(0)
    block = program % blocks
    head = (program // blocks % heads).to(tl.int64)
    row = (program // blocks // heads).to(tl.int64)
    lines = block * BLOCK_M + tl.arange(0, BLOCK_M)
    of_grad = grad_output + row * grad_output_row + head * grad_output_head
    grads = load_tile(of_grad, lines, grad_output_token, 0, tokens, True, D, BLOCK_D).to(tl.float32)
    of_output = output + row * output_row + head * output_head
    found = tl.sum(
        grads * load_tile(of_output, lines, output_token, 0, tokens, True, D, BLOCK_D).to(tl.float32), axis=1
    )
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
def query_step(
    acc,
    query,
    grads,
    lse,
    delta,
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
    keys = load_tile(key, columns, key_token, low, count, MASKED, D, BLOCK_D)
    logits, slope = base_2_logits(tl.dot(query, tl.trans(keys), input_precision="ieee"), SCALE, SOFTCAP)
    if MASKED:
        logits = tl.where(visible, logits, float("-inf"))
    weights = tl.exp2(logits - lse[:, None])
    values = load_tile(value, columns, value_token, low, count, MASKED, D, BLOCK_D)
    grad_logits = weights * (tl.dot(grads, tl.trans(values), input_precision="ieee") - delta[:, None]) * slope
    return tl.dot(grad_logits.to(keys.dtype), keys, acc, input_precision="ieee")


@triton.jit(do_not_specialize=LENGTHS)
def attention_query_kernel(
    query,
    key,
    value,
    memory_key,
    memory_value,
    memory_lengths,
    segment_starts,
    cu_seqlens,
    grad_output,
    lse,
    delta,
    grad_query,
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
    grad_output_row,
    grad_output_head,
    grad_output_token,
    grad_query_row,
    grad_query_head,
    grad_query_token,
    tokens,
    offset,
    memory_tokens,
    window,
    blocks,
    heads,
    group,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOWED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0)
    block = blocks - 1 - program % blocks
    head = (program // blocks % heads).to(tl.int64)
    row = (program // blocks // heads).to(tl.int64)
    shared = head // group
    stored, first, count = sequence(cu_seqlens, row, tokens)
    if block * BLOCK_M < count:
        lines = block * BLOCK_M + tl.arange(0, BLOCK_M)
        own = query + stored * query_row + head * query_head + first * query_token
        queries = load_tile(own, lines, query_token, 0, count, True, D, BLOCK_D)
        own = grad_output + stored * grad_output_row + head * grad_output_head + first * grad_output_token
        grads = load_tile(own, lines, grad_output_token, 0, count, True, D, BLOCK_D)
        of_head = (stored * heads + head) * tokens + first
        lse_2 = base_2_lse(lse + of_head, lines, count)
        deltas = tl.load(delta + of_head + lines, mask=lines < count, other=0.0)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if memory_key is not None:
            keys = memory_key + row * memory_key_row + shared * memory_key_head
            values = memory_value + row * memory_value_row + shared * memory_value_head
            low = first_in_memory(memory_lengths, row, memory_tokens)
            left, begin, full_begin, full, full_end, right = key_blocks(
                low, low, memory_tokens, memory_tokens, BLOCK_N
            )
            for index in range(full):
                columns = full_begin + index * BLOCK_N + tl.arange(0, BLOCK_N)
                acc = query_step(
                    acc, queries, grads, lse_2, deltas, keys, values, columns, low, memory_tokens, memory_key_token,
                    memory_value_token, None, SCALE, SOFTCAP, False, D, BLOCK_D,
                )  # fmt: skip
            for index in range(left + right):
                at = tl.where(index < left, begin + index * BLOCK_N, full_end + (index - left) * BLOCK_N)
                columns = at + tl.arange(0, BLOCK_N)
                visible = ((columns >= low) & (columns < memory_tokens))[None, :]
                acc = query_step(
                    acc, queries, grads, lse_2, deltas, keys, values, columns, low, memory_tokens, memory_key_token,
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
                acc = query_step(
                    acc, queries, grads, lse_2, deltas, keys, values, columns, low, high, key_token, value_token, None,
                    SCALE, SOFTCAP, False, D, BLOCK_D,
                )  # fmt: skip
            for index in range(left + right):
                at = tl.where(index < left, begin + index * BLOCK_N, full_end + (index - left) * BLOCK_N)
                columns = at + tl.arange(0, BLOCK_N)
                visible = in_segment((offset + lines)[:, None], columns[None, :], start, window, high, WINDOWED)
                acc = query_step(
                    acc, queries, grads, lse_2, deltas, keys, values, columns, low, high, key_token, value_token,
                    visible, SCALE, SOFTCAP, True, D, BLOCK_D,
                )  # fmt: skip
        to = grad_query + stored * grad_query_row + head * grad_query_head + first * grad_query_token
        store_tile(to, lines, grad_query_token, count, acc * SCALE, D, BLOCK_D)


@triton.jit
def key_step(
    grad_keys,
    grad_values,
    keys,
    values,
    query,
    grad_output,
    lse,
    delta,
    lines,
    count,
    query_token,
    grad_output_token,
    visible,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What one block of queries adds to the gradients of a block of keys. visible: `[BLOCK_N, BLOCK_M]`."""
    queries = load_tile(query, lines, query_token, 0, count, True, D, BLOCK_D)
    logits, slope = base_2_logits(tl.dot(keys, tl.trans(queries), input_precision="ieee"), SCALE, SOFTCAP)
    if MASKED:
        logits = tl.where(visible, logits, float("-inf"))
    weights = tl.exp2(logits - base_2_lse(lse, lines, count)[None, :])
    grads = load_tile(grad_output, lines, grad_output_token, 0, count, True, D, BLOCK_D)
    grad_values = tl.dot(weights.to(grads.dtype), grads, grad_values, input_precision="ieee")
    deltas = tl.load(delta + lines, mask=(lines >= 0) & (lines < count), other=0.0)
    grad_logits = weights * (tl.dot(values, tl.trans(grads), input_precision="ieee") - deltas[None, :]) * slope
    grad_keys = tl.dot(grad_logits.to(queries.dtype), queries, grad_keys, input_precision="ieee")
    return grad_keys, grad_values


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
    query_row,
    query_head,
    query_token,
    key_row,
    key_head,
    key_token,
    value_row,
    value_head,
    value_token,
    grad_output_row,
    grad_output_head,
    grad_output_token,
    grad_key_row,
    grad_key_head,
    grad_key_token,
    grad_value_row,
    grad_value_head,
    grad_value_token,
    tokens,
    offset,
    window,
    blocks,  # of keys
    heads,
    group,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOWED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0)
    # In this order those that are seen by most come first.
    block = program % blocks
    shared = (program // blocks % (heads // group)).to(tl.int64)
    row = (program // blocks // (heads // group)).to(tl.int64)
    stored, first, count = sequence(cu_seqlens, row, tokens)
    last = offset + count
    if block * BLOCK_N < last:
        columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
        start = first_in_segment(segment_starts, row)
        own = key + stored * key_row + shared * key_head + first * key_token
        keys = load_tile(own, columns, key_token, start, last, True, D, BLOCK_D)
        own = value + stored * value_row + shared * value_head + first * value_token
        values = load_tile(own, columns, value_token, start, last, True, D, BLOCK_D)
        grad_keys = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        grad_values = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
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
        left, begin, full_begin, full, full_end, right = key_blocks(low, low_full, high_full, high, BLOCK_M)
        for index in range(group):
            head = shared * group + index
            queries = query + stored * query_row + head * query_head + first * query_token
            grads = grad_output + stored * grad_output_row + head * grad_output_head + first * grad_output_token
            of_head = (stored * heads + head) * tokens + first
            for step in range(left + right):
                at = tl.where(step < left, begin + step * BLOCK_M, full_end + (step - left) * BLOCK_M)
                lines = at + tl.arange(0, BLOCK_M)
                visible = in_segment((offset + lines)[None, :], columns[:, None], start, window, last, WINDOWED)
                grad_keys, grad_values = key_step(
                    grad_keys, grad_values, keys, values, queries, grads, lse + of_head, delta + of_head, lines, count,
                    query_token, grad_output_token, visible, SCALE, SOFTCAP, True, D, BLOCK_D,
                )  # fmt: skip
            for step in range(full):
                lines = full_begin + step * BLOCK_M + tl.arange(0, BLOCK_M)
                grad_keys, grad_values = key_step(
                    grad_keys, grad_values, keys, values, queries, grads, lse + of_head, delta + of_head, lines, count,
                    query_token, grad_output_token, None, SCALE, SOFTCAP, False, D, BLOCK_D,
                )  # fmt: skip
        to = grad_key + stored * grad_key_row + shared * grad_key_head + first * grad_key_token
        store_tile(to, columns, grad_key_token, last, grad_keys * SCALE, D, BLOCK_D)
        to = grad_value + stored * grad_value_row + shared * grad_value_head + first * grad_value_token
        store_tile(to, columns, grad_value_token, last, grad_values, D, BLOCK_D)


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
    grad_key,  # float32 [splits, rows, shared, memory_tokens, D], contiguous
    grad_value,
    query_row,
    query_head,
    query_token,
    memory_key_row,
    memory_key_head,
    memory_key_token,
    memory_value_row,
    memory_value_head,
    memory_value_token,
    grad_output_row,
    grad_output_head,
    grad_output_token,
    tokens,
    memory_tokens,
    blocks,  # of memory keys
    heads,
    group,
    rows,
    splits,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0)
    block = program % blocks
    shared = (program // blocks % (heads // group)).to(tl.int64)
    row = (program // blocks // (heads // group) % rows).to(tl.int64)
    split = program // blocks // (heads // group) // rows
    stored, first, count = sequence(cu_seqlens, row, tokens)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    at = memory_key + row * memory_key_row + shared * memory_key_head
    keys = load_tile(at, columns, memory_key_token, 0, memory_tokens, True, D, BLOCK_D)
    at = memory_value + row * memory_value_row + shared * memory_value_head
    values = load_tile(at, columns, memory_value_token, 0, memory_tokens, True, D, BLOCK_D)
    grad_keys = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_values = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    steps = (count + BLOCK_M - 1) // BLOCK_M
    each = (steps + splits - 1) // splits
    for index in range(group):
        head = shared * group + index
        queries = query + stored * query_row + head * query_head + first * query_token
        grads = grad_output + stored * grad_output_row + head * grad_output_head + first * grad_output_token
        of_head = (stored * heads + head) * tokens + first
        for step in range(split * each, tl.minimum((split + 1) * each, steps)):
            lines = step * BLOCK_M + tl.arange(0, BLOCK_M)
            grad_keys, grad_values = key_step(
                grad_keys, grad_values, keys, values, queries, grads, lse + of_head, delta + of_head, lines, count,
                query_token, grad_output_token, None, SCALE, SOFTCAP, False, D, BLOCK_D,
            )  # fmt: skip
    # No mask above: a key that is not visible has only its own row of these.
    seen = (columns >= first_in_memory(memory_lengths, row, memory_tokens))[:, None]
    base = ((split * rows + row) * (heads // group) + shared) * memory_tokens * D
    store_tile(grad_key + base, columns, D, memory_tokens, tl.where(seen, grad_keys * SCALE, 0.0), D, BLOCK_D)
    store_tile(grad_value + base, columns, D, memory_tokens, tl.where(seen, grad_values, 0.0), D, BLOCK_D)


def plan_memory_attention_backward(
    grad_output,
    grad_lse,
    query,
    key,
    value,
    memory_key,
    memory_value,
    memory_lengths,
    segment_starts,
    cu_seqlens,
    sinks,
    output,
    lse,
    *,
    scale,
    window,
    softcap,
    offsets,
    frozen_memory=False,
    target=None,
):
    """Launches of `memory_attention_backward`, in their order, and a function that makes gradients of their output.

    Arguments are those of `plan_memory_attention`, with lse contiguous. frozen_memory: leave out the memory's
    gradients, which are None.
    """
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    grads = {
        "grad_query": torch.empty_like(query, memory_format=torch.contiguous_format),
        "grad_key": None if key is None else torch.empty_like(key, memory_format=torch.contiguous_format),
        "grad_value": None if value is None else torch.empty_like(value, memory_format=torch.contiguous_format),
    }
    if cu_seqlens is not None:  # there may be tokens that are of no sequence
        for grad in grads.values():
            grad.zero_()
    given = {
        "query": query,
        "key": key,
        "value": value,
        "memory_key": memory_key,
        "memory_value": memory_value,
        "grad_output": grad_output,
        "output": output,
    }
    tensors = {name: with_unit_stride(rows_first(tensor)) for name, tensor in given.items()}
    tensors |= {name: rows_first(tensor) for name, tensor in grads.items()}
    query = tensors["query"]
    stored, heads, tokens, head_dim = query.shape
    rows, longest, offset = stored, tokens, offsets
    if cu_seqlens is not None:
        rows, longest, offset = len(cu_seqlens) - 1, offsets, 0
    shared = (key if key is not None else memory_key).shape[1]
    target = target_for(query, target)
    of_query = configuration(_QUERY_CONFIGURATIONS, head_dim, query.dtype, target)
    of_key = configuration(_KEY_CONFIGURATIONS, head_dim, query.dtype, target)
    others = {
        "memory_lengths": memory_lengths,
        "segment_starts": segment_starts,
        "cu_seqlens": cu_seqlens,
        "grad_lse": None if grad_lse is None else grad_lse.contiguous(),
        "lse": lse,
        "delta": delta,
        "tokens": tokens,
        "offset": offset,
        "memory_tokens": 0 if memory_key is None else memory_key.shape[2],
        "heads": heads,
        "group": heads // shared,
        "rows": rows,
    }
    plan = planner(tensors, others, scale=scale, window=window, softcap=softcap)
    blocks = triton.cdiv(tokens, _DELTA_QUERIES)
    launches = [
        plan(attention_delta_kernel, blocks * heads * stored, (_DELTA_QUERIES, 0, of_query[2], 1), blocks=blocks)
    ]
    blocks = triton.cdiv(longest, of_query[0])
    launches.append(plan(attention_query_kernel, blocks * heads * rows, of_query, blocks=blocks))
    if key is not None:
        blocks = triton.cdiv(longest + offset, of_key[1])
        launches.append(plan(attention_key_kernel, blocks * shared * rows, of_key, blocks=blocks))
    parts = ()
    if memory_key is not None and not frozen_memory:
        blocks = triton.cdiv(memory_key.shape[2], of_key[1])
        splits = max(1, min(_PROGRAMS // max(1, blocks * shared * rows), longest // (4 * of_key[0])))
        shape = (splits, rows, shared, memory_key.shape[2], head_dim)
        parts = tuple(query.new_empty(shape, dtype=torch.float32) for _ in range(2))
        own = {"grad_key": parts[0], "grad_value": parts[1], "blocks": blocks, "splits": splits}
        launches.append(plan(attention_memory_kernel, blocks * shared * rows * splits, of_key, **own))

    def gradients():
        memory = tuple(_sum(part, memory_key) for part in parts) or (None, None)
        of_sinks = (
            None
            if sinks is None
            else grad_of_sinks(sinks, lse.view(stored, heads, tokens), delta.view(stored, heads, tokens))
        )
        return (*grads.values(), *memory, of_sinks)

    return launches, gradients


def _sum(parts, memory):
    """Sum parts `[splits, rows, shared, memory_tokens, D]`, in the memory's shape and dtype."""
    dims = (0,) if len(memory) == parts.shape[1] else (0, 1)
    return parts.sum(dims).view(memory.shape).to(memory.dtype)


def memory_attention_backward(*tensors, **settings):
    launches, gradients = plan_memory_attention_backward(*tensors, **settings)
    for launched in launches:
        launched.run()
    return gradients()
