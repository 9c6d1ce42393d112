"""Decoding: a few queries against many keys, split over the keys, and the parts merged.

A program takes the queries of all heads that share a key head, and a share of the key blocks of memory and cache. It
splits them by the lengths that a row really has, which are read on the device.
"""

import functools

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
    extent_of,
    first_in_memory,
    first_in_segment,
    launch_planner,
    resolve_target,
    segment_visible,
    select_configuration,
)
from .forward import add_sink, attend

_LOG2_E = tl.constexpr(LOG2_E)

# As in forward.py, for up to 16 queries that share a key head; for more, BLOCK_M is made to fit them, and BLOCK_N
# smaller.
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
# Programs that run at a time: one for each multiprocessor of a large GPU, where the blocks of head_dim 128 leave room
# for no second one. A constant, so that the order of additions does not depend on how many the GPU has.
_AT_A_TIME = 132
# Share of the time in which all of these are busy that is enough, where more would take more splits.
_BUSY = 0.9
_MOST_SPLITS = 64
_LANES = 8  # parts that are added up at a time


@triton.jit(do_not_specialize=LENGTHS)
def attention_decode_kernel(
    query,
    key,
    value,
    memory_key,  # None: no memory
    memory_value,
    memory_lengths,
    lengths,
    segment_starts,
    sinks,
    part,  # float32 [splits, rows, heads, tokens, D], contiguous; None: one part, whose result is the output
    part_lse,  # to base 2, float32 [splits, rows, heads, tokens]
    output,
    lse,
    query_strides,
    key_strides,
    value_strides,
    memory_key_strides,
    memory_value_strides,
    output_strides,
    tokens,  # queries
    offset,  # keys of the cache
    memory_tokens,
    window,
    heads,
    group,  # query heads that share a key head
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
    """Compute o and lse of the queries that share a key head, over one part of the keys."""
    program = tl.program_id(0)
    shared = (program % (heads // group)).to(tl.int64)
    row = (program // (heads // group) % rows).to(tl.int64)
    split = program // (heads // group) // rows
    lines = tl.arange(0, BLOCK_M)
    head, token = shared * group + lines // tokens, lines % tokens
    inside = lines < group * tokens
    dims = tl.arange(0, BLOCK_D)
    own = query + row * query_strides.row
    pointers = own + (head * query_strides.head + token * query_strides.token)[:, None] + dims[None, :]
    queries = tl.load(pointers, mask=inside[:, None] & (dims < D)[None, :], other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    softmax = (acc, total, largest)

    count = offset
    if lengths is not None:
        count = tl.minimum(tl.load(lengths + row), offset)
    positions = count - tokens + token
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
        keys = advance(memory_key, memory_key_strides, row, shared, 0)
        values = advance(memory_value, memory_value_strides, row, shared, 0)
        memory = Keys(keys, values, memory_key_strides.token, memory_value_strides.token, hidden, memory_tokens)
        for index in range(begin, tl.minimum(end, of_memory)):
            columns = (in_memory + index) * BLOCK_N + tl.arange(0, BLOCK_N)
            visible = ((columns >= hidden) & (columns < memory_tokens))[None, :]
            softmax = attend(softmax, queries, memory, columns, visible, SCALE, SOFTCAP, D, BLOCK_D)
    keys = advance(key, key_strides, row, shared, 0)
    values = advance(value, value_strides, row, shared, 0)
    cache = Keys(keys, values, key_strides.token, value_strides.token, low, count)
    for index in range(tl.maximum(begin, of_memory) - of_memory, tl.minimum(end - of_memory, of_cache)):
        columns = (in_cache + index) * BLOCK_N + tl.arange(0, BLOCK_N)
        visible = segment_visible(positions[:, None], columns[None, :], low, window, count, WINDOWED)
        softmax = attend(softmax, queries, cache, columns, visible, SCALE, SOFTCAP, D, BLOCK_D)
    if part is None and sinks is not None:
        softmax = add_sink(softmax, tl.load(sinks + head, mask=inside, other=0.0))
    acc, total, largest = softmax
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    of_all = largest + tl.log2(total)
    at = ((split * rows + row) * heads + head) * tokens + token
    if part is None:
        to = output + row * output_strides.row + head * output_strides.head + token * output_strides.token
        found = acc.to(output.dtype.element_ty)
        tl.store(to[:, None] + dims[None, :], found, mask=inside[:, None] & (dims < D)[None, :])
        tl.store(lse + at, of_all / _LOG2_E, mask=inside)
    else:
        tl.store(part + at[:, None] * D + dims[None, :], acc, mask=inside[:, None] & (dims < D)[None, :])
        tl.store(part_lse + at, of_all, mask=inside)


@triton.jit
def load_part_lse(part_lse, parts, rows, row, heads, head, tokens, token, splits):
    """Load the log-sum-exps, to base 2, that these parts have for a query; -inf for parts that do not exist."""
    at = ((parts * rows + row) * heads + head) * tokens + token
    return tl.load(part_lse + at, mask=parts < splits, other=float("-inf"))


@triton.jit(do_not_specialize=LENGTHS)
def attention_combine_kernel(
    part,
    part_lse,
    sinks,
    output,
    lse,
    output_strides,
    tokens,
    heads,
    rows,
    splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Merge the parts of one query, by the formula of `merge` in `../reference.py`, and the sink."""
    program = tl.program_id(0)
    token = (program % tokens).to(tl.int64)
    head = (program // tokens % heads).to(tl.int64)
    row = (program // tokens // heads).to(tl.int64)
    dims, lanes = tl.arange(0, BLOCK_D), tl.arange(0, LANES)
    found = load_part_lse(part_lse, tl.arange(0, MOST_SPLITS), rows, row, heads, head, tokens, token, splits)
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
        weights = tl.exp2(load_part_lse(part_lse, parts, rows, row, heads, head, tokens, token, splits) - base)
        at = ((parts * rows + row) * heads + head) * tokens + token
        mask = (parts < splits)[:, None] & (dims < D)[None, :]
        values = tl.load(part + at[:, None] * D + dims[None, :], mask=mask, other=0.0)
        mixed += tl.sum(values * weights[:, None], axis=0)
    mixed = mixed / tl.where(total == 0.0, 1.0, total)
    to = advance(output, output_strides, row, head, token)
    tl.store(to + dims, mixed.to(output.dtype.element_ty), mask=dims < D)
    tl.store(lse + (row * heads + head) * tokens + token, (largest + tl.log2(total)) / _LOG2_E)


@functools.cache
def choose_splits(pairs: int, most: int) -> int:
    """Choose into how many parts the keys are split: the fewest that keep a large GPU busy, or those that do best.

    Args:
        pairs: Number of key heads of all rows; each takes a program for each part.
        most: Number of parts at most.

    Returns:
        The number of parts, at least 1.
    """
    shares = []
    for splits in range(1, max(1, most) + 1):
        programs = max(1, pairs) * splits
        shares.append(programs / (-(-programs // _AT_A_TIME) * _AT_A_TIME))
        if shares[-1] >= _BUSY:
            return splits
    return 1 + shares.index(max(shares))


def plan_memory_decode(
    inputs: AttentionInputs,
    lengths: torch.Tensor | None,
    settings: AttentionSettings,
    *,
    target: str | None = None,
) -> tuple[tuple[Launch, ...], tuple[torch.Tensor, torch.Tensor]]:
    """Plan the launches of `memory_decode`, and make its outputs.

    Args:
        inputs: Tensors of the attention, without `cu_seqlens`; key and value are the cache.
        lengths: int32 `[B]`, numbers of keys of the cache that are filled; None for all of them.
        settings: Settings of the attention, without `query_offset`: the queries are the last of the filled keys.
        target: GPU to compile for, as the compile gate names it (cuda:90, hip:gfx942); None for the tensors' device.

    Returns:
        The launches in their order, and `(output, lse)`, which they will write.
    """
    query, key = inputs.query, inputs.key
    assert key is not None
    output, lse = new_output(query), new_lse(query)
    extent = extent_of(inputs, key.shape[2])
    rows, heads, tokens, head_dim = query.shape
    target = resolve_target(query, target)
    _, block_n, threads, stages = select_configuration(_CONFIGURATIONS, head_dim, query.dtype, target)
    block_m = max(16, triton.next_power_of_2(extent.group * tokens))
    if block_m > 16 and block_n > 16:  # so that logits and sums still fit into registers, queries into shared memory
        block_n, threads, stages = max(16, block_n * 16 // block_m), 256, min(stages, 2)
    most = triton.cdiv(extent.memory_tokens, block_n) + triton.cdiv(key.shape[2], block_n)
    splits = choose_splits(extent.key_heads * rows, min(most, _MOST_SPLITS))
    part = part_lse = None
    if splits > 1:
        part = query.new_empty(splits, rows, heads, tokens, head_dim, dtype=torch.float32)
        part_lse = query.new_empty(splits, rows, heads, tokens, dtype=torch.float32)
    others = {"lengths": lengths, "part": part, "part_lse": part_lse, "lse": lse, "splits": splits}
    plan = launch_planner(inputs, settings, extent, {"output": output}, others)
    read = plan(attention_decode_kernel, extent.key_heads * rows * splits, (block_m, block_n, threads, stages))
    if splits == 1:
        return (read,), (output, lse)
    lanes = {"MOST_SPLITS": _MOST_SPLITS, "LANES": _LANES}
    combine = plan(attention_combine_kernel, rows * heads * tokens, (0, 0, 64, 1), **lanes)
    return (read, combine), (output, lse)


def memory_decode(
    inputs: AttentionInputs, lengths: torch.Tensor | None, settings: AttentionSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from one query or a few to a memory and a cache.

    Args:
        inputs: Tensors of the attention, without `cu_seqlens`; key and value are the cache.
        lengths: int32 `[B]`, numbers of keys of the cache that are filled; None for all of them.
        settings: Settings of the attention, without `query_offset`: the queries are the last of the filled keys.

    Returns:
        The output and the log-sum-exps.
    """
    launches, outputs = plan_memory_decode(inputs, lengths, settings)
    for launch in launches:
        launch.run()
    return outputs
