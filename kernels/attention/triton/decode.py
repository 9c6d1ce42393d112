"""Decoding: a few queries against many keys, split over the keys, and the parts merged.

A program takes the queries of all heads that share a key head, and a share of the key blocks of memory and cache, by
the lengths that a row really has, which are read on the device.
"""

import torch
import triton
import triton.language as tl

from ..outputs import new_lse, new_output
from .common import (
    LENGTHS,
    LOG2_E,
    configuration,
    first_in_memory,
    first_in_segment,
    in_segment,
    planner,
    target_for,
    with_unit_stride,
)
from .forward import attend

_LOG2_E = tl.constexpr(LOG2_E)

# As in forward.py, for up to 16 queries a key head; for more, BLOCK_M is made to fit them, and BLOCK_N smaller.
_CONFIGURATIONS = {
    "cuda:80": {2: {64: (16, 128, 128, 3), 128: (16, 128, 128, 3), 256: (16, 128, 128, 2)},
               4: {64: (16, 64, 128, 2), 128: (16, 16, 128, 2), 256: (16, 16, 128, 2)}},
    "cuda:89": {2: {64: (16, 128, 128, 2), 128: (16, 64, 128, 2), 256: (16, 32, 128, 2)},
                4: {64: (16, 64, 128, 2), 128: (16, 16, 128, 2), 256: (16, 16, 128, 2)}},
    "cuda:90": {2: {64: (16, 128, 128, 3), 128: (16, 128, 128, 3), 256: (16, 128, 128, 2)},
               4: {64: (16, 64, 128, 2), 128: (16, 64, 128, 2), 256: (16, 16, 128, 2)}},
    "cuda:100": {2: {64: (16, 128, 128, 3), 128: (16, 128, 128, 3), 256: (16, 128, 128, 2)},
                4: {64: (16, 64, 128, 2), 128: (16, 16, 128, 2), 256: (16, 16, 128, 2)}},
    "hip:gfx942": {2: {64: (16, 64, 256, 1), 128: (16, 64, 256, 1), 256: (16, 32, 256, 1)},
                  4: {64: (16, 32, 256, 1), 128: (16, 32, 256, 1), 256: (16, 16, 256, 1)}},
}  # fmt: skip
# Programs that the keys are split into, about, so that a large GPU is busy with one row of one key head.
_PROGRAMS = 264
_MOST_SPLITS = 64
_LANES = 8  # of them added up at a time


@triton.jit(do_not_specialize=LENGTHS)
def attention_decode_kernel(
    query,
    key,
    value,
    memory_key,
    memory_value,
    memory_lengths,
    lengths,
    segment_starts,
    part,  # float32 [splits, rows, heads, tokens, D], contiguous
    part_lse,  # of base 2, float32 [splits, rows, heads, tokens]
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
    tokens,  # queries
    offset,  # keys of the cache
    memory_tokens,
    window,
    heads,
    group,
    rows,
    splits,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOWED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0)
    shared = (program % (heads // group)).to(tl.int64)
    row = (program // (heads // group) % rows).to(tl.int64)
    split = program // (heads // group) // rows
    lines = tl.arange(0, BLOCK_M)
    head, token = shared * group + lines // tokens, lines % tokens
    inside = lines < group * tokens
    dims = tl.arange(0, BLOCK_D)
    pointers = query + row * query_row + (head * query_head + token * query_token)[:, None] + dims[None, :]
    queries = tl.load(pointers, mask=inside[:, None] & (dims < D)[None, :], other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)

    count = offset
    if lengths is not None:
        count = tl.minimum(tl.load(lengths + row), offset)
    places = count - tokens + token
    low = first_in_segment(segment_starts, row)
    if WINDOWED:
        low = tl.maximum(low, count - tokens - window + 1)
    in_cache = low // BLOCK_N
    of_cache = tl.maximum((count + BLOCK_N - 1) // BLOCK_N - in_cache, 0)
    in_memory, of_memory = 0, 0
    if memory_key is not None:
        hidden = first_in_memory(memory_lengths, row, memory_tokens)
        in_memory = hidden // BLOCK_N
        of_memory = (memory_tokens + BLOCK_N - 1) // BLOCK_N - in_memory
    each = (of_memory + of_cache + splits - 1) // splits
    begin, end = split * each, (split + 1) * each
    if memory_key is not None:
        keys = memory_key + row * memory_key_row + shared * memory_key_head
        values = memory_value + row * memory_value_row + shared * memory_value_head
        for index in range(begin, tl.minimum(end, of_memory)):
            columns = (in_memory + index) * BLOCK_N + tl.arange(0, BLOCK_N)
            visible = ((columns >= hidden) & (columns < memory_tokens))[None, :]
            acc, total, largest = attend(
                acc, total, largest, queries, keys, values, columns, hidden, memory_tokens, memory_key_token,
                memory_value_token, visible, SCALE, SOFTCAP, True, D, BLOCK_D,
            )  # fmt: skip
    keys = key + row * key_row + shared * key_head
    values = value + row * value_row + shared * value_head
    for index in range(tl.maximum(begin, of_memory) - of_memory, tl.minimum(end - of_memory, of_cache)):
        columns = (in_cache + index) * BLOCK_N + tl.arange(0, BLOCK_N)
        visible = in_segment(places[:, None], columns[None, :], low, window, count, WINDOWED)
        acc, total, largest = attend(
            acc, total, largest, queries, keys, values, columns, low, count, key_token, value_token, visible, SCALE,
            SOFTCAP, True, D, BLOCK_D,
        )  # fmt: skip
    at = ((split * rows + row) * heads + head) * tokens + token
    tl.store(part_lse + at, largest + tl.log2(total), mask=inside)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(part + at[:, None] * D + dims[None, :], acc, mask=inside[:, None] & (dims < D)[None, :])


@triton.jit
def part_found(part_lse, parts, rows, row, heads, head, tokens, token, splits):
    at = ((parts * rows + row) * heads + head) * tokens + token
    return tl.load(part_lse + at, mask=parts < splits, other=float("-inf"))


@triton.jit(do_not_specialize=LENGTHS)
def attention_combine_kernel(
    part,
    part_lse,
    sinks,
    output,
    lse,
    output_row,
    output_head,
    output_token,
    tokens,
    heads,
    rows,
    splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    LANES: tl.constexpr,
):
    program = tl.program_id(0)
    token = (program % tokens).to(tl.int64)
    head = (program // tokens % heads).to(tl.int64)
    row = (program // tokens // heads).to(tl.int64)
    dims, lanes = tl.arange(0, BLOCK_D), tl.arange(0, LANES)
    found = part_found(part_lse, tl.arange(0, MOST_SPLITS), rows, row, heads, head, tokens, token, splits)
    largest = tl.max(found, axis=0)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * _LOG2_E
        largest = tl.maximum(largest, sink)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp2(found - base), axis=0)
    if sinks is not None:
        total += tl.exp2(sink - base)
    mixed = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, splits, LANES):
        parts = first + lanes
        weights = tl.exp2(part_found(part_lse, parts, rows, row, heads, head, tokens, token, splits) - base)
        at = ((parts * rows + row) * heads + head) * tokens + token
        mask = (parts < splits)[:, None] & (dims < D)[None, :]
        values = tl.load(part + at[:, None] * D + dims[None, :], mask=mask, other=0.0)
        mixed += tl.sum(values * weights[:, None], axis=0)
    mixed = mixed / tl.where(total == 0.0, 1.0, total)
    to = output + row * output_row + head * output_head + token * output_token
    tl.store(to + dims, mixed.to(output.dtype.element_ty), mask=dims < D)
    tl.store(lse + (row * heads + head) * tokens + token, (largest + tl.log2(total)) / _LOG2_E)


def plan_memory_decode(
    query,
    key,
    value,
    memory_key,
    memory_value,
    memory_lengths,
    lengths,
    segment_starts,
    sinks,
    *,
    scale,
    window,
    softcap,
    target=None,
):
    """The launches of `memory_decode`, in their order, and its outputs `(output, lse)`, as yet unwritten."""
    output, lse = new_output(query), new_lse(query)
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "memory_key": memory_key,
        "memory_value": memory_value,
        "output": output,
    }
    tensors = {name: with_unit_stride(tensor) for name, tensor in tensors.items()}
    rows, heads, tokens, head_dim = query.shape
    shared, cached = key.shape[1:3]
    memory_tokens = 0 if memory_key is None else memory_key.shape[2]
    group = heads // shared
    _, block_n, threads, stages = configuration(_CONFIGURATIONS, head_dim, query.dtype, target_for(query, target))
    block_m = max(16, triton.next_power_of_2(group * tokens))
    if block_m > 16 and block_n > 16:  # so that logits and sums still fit into registers, queries into shared memory
        block_n, threads, stages = max(16, block_n * 16 // block_m), 256, min(stages, 2)
    most = triton.cdiv(memory_tokens, block_n) + triton.cdiv(cached, block_n)
    splits = max(1, min(_PROGRAMS // max(1, shared * rows), most, _MOST_SPLITS))
    part = query.new_empty(splits, rows, heads, tokens, head_dim, dtype=torch.float32)
    part_lse = query.new_empty(splits, rows, heads, tokens, dtype=torch.float32)
    others = {
        "memory_lengths": memory_lengths,
        "lengths": lengths,
        "segment_starts": segment_starts,
        "sinks": None if sinks is None else sinks.contiguous(),
        "part": part,
        "part_lse": part_lse,
        "lse": lse,
        "tokens": tokens,
        "offset": cached,
        "memory_tokens": memory_tokens,
        "heads": heads,
        "group": group,
        "rows": rows,
        "splits": splits,
    }
    plan = planner(tensors, others, scale=scale, window=window, softcap=softcap)
    read = plan(attention_decode_kernel, shared * rows * splits, (block_m, block_n, threads, stages))
    lanes = {"MOST_SPLITS": _MOST_SPLITS, "LANES": _LANES}
    combine = plan(attention_combine_kernel, rows * heads * tokens, (0, 0, 64, 1), **lanes)
    return (read, combine), (output, lse)


def memory_decode(*tensors, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    launches, outputs = plan_memory_decode(*tensors, **settings)
    for launched in launches:
        launched.run()
    return outputs
