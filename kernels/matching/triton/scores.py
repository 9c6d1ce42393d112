"""Scores of keys, in two kernels and without a matrix of queries by keys.

matching_forward_kernel   lse and y: one program for each block of lines, over the keys; for the values of kept keys
                            also what y lacks to a target
matching_scores_kernel      scores: one program for each block of keys and part of the lines, whose weights it makes
                            anew from lse; parts are then added in order
"""

import torch
import triton
import triton.language as tl

from ...attention.triton.common import LOG2_E, Configuration, resolve_target, select_configuration
from ...common.launch import Launch
from ..arguments import MatchingInputs, MatchingSettings
from .common import (
    LENGTHS,
    launch_planner,
    load_keys,
    load_lines,
    load_lse,
    load_sinks,
    load_wanted,
    locate_keys,
    locate_lines,
    masked_logits,
    splits_of,
)

_LOG2_E = tl.constexpr(LOG2_E)

# Chosen by what the compiler makes of them (registers, shared memory; no spills), not yet by a measurement on a GPU.
_FORWARD_CONFIGURATIONS = {
    "cuda:80": {2: {64: (128, 64, 256, 2), 128: (128, 32, 256, 2), 256: (64, 32, 256, 2)},
               4: {64: (64, 32, 256, 2), 128: (32, 16, 256, 2), 256: (32, 16, 256, 2)}},
    "cuda:90": {2: {64: (128, 128, 256, 2), 128: (128, 64, 256, 2), 256: (128, 32, 256, 2)},
               4: {64: (64, 32, 256, 2), 128: (32, 16, 256, 2), 256: (32, 16, 256, 2)}},
    "cuda:100": {2: {64: (128, 64, 256, 2), 128: (128, 64, 256, 2), 256: (128, 32, 256, 2)},
                4: {64: (64, 32, 256, 2), 128: (16, 32, 256, 2), 256: (16, 16, 256, 2)}},
    "hip:gfx942": {2: {64: (128, 64, 256, 1), 128: (128, 64, 256, 1), 256: (64, 32, 256, 1)},
                  4: {64: (32, 32, 256, 1), 128: (32, 16, 256, 1), 256: (16, 16, 256, 1)}},
}  # fmt: skip
_SCORES_CONFIGURATIONS = {
    "cuda:80": {2: {64: (64, 128, 256, 2), 128: (64, 64, 256, 2), 256: (32, 64, 256, 2)},
               4: {64: (32, 32, 256, 2), 128: (16, 32, 256, 2), 256: (16, 16, 256, 2)}},
    "cuda:90": {2: {64: (64, 128, 256, 2), 128: (64, 128, 256, 2), 256: (64, 64, 256, 2)},
               4: {64: (32, 32, 256, 2), 128: (32, 32, 256, 2), 256: (16, 16, 256, 2)}},
    "cuda:100": {2: {64: (64, 128, 256, 2), 128: (64, 128, 256, 2), 256: (64, 64, 256, 2)},
                4: {64: (32, 32, 256, 2), 128: (16, 32, 256, 2), 256: (16, 16, 256, 2)}},
    "hip:gfx942": {2: {64: (64, 64, 256, 1), 128: (64, 64, 256, 1), 256: (32, 32, 256, 1)},
                  4: {64: (32, 32, 256, 1), 128: (32, 16, 256, 1), 256: (16, 16, 256, 1)}},
}  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def matching_forward_kernel(
    query,
    key,
    value,
    wanted,  # float32, as output; None: y itself
    query_positions,
    key_positions,
    sinks,
    output,  # float32 [rows, heads, queries, D], contiguous; so is lse
    lse,
    query_strides,
    key_strides,
    value_strides,
    queries,
    keys,
    window,
    blocks,  # of lines
    key_heads,
    group,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOWED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute lse and y of a block of lines, or what is wanted minus y, by a running softmax (Dao et al. 2022)."""
    program = tl.program_id(0)
    block = program % blocks
    pair = (program // blocks).to(tl.int64)
    row, shared = pair // key_heads, pair % key_heads
    lines = locate_lines(query_positions, pair, key_heads, block * BLOCK_M, queries, group, BLOCK_M)
    own = load_lines(query, query_strides, row, lines, D, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for first in range(0, keys, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        positions = locate_keys(key_positions, pair, columns, keys)
        tile = load_keys(key, key_strides, row, shared, columns, positions, D, BLOCK_D)
        logits = masked_logits(own, tile, lines.position, positions, window, SCALE, SOFTCAP, WINDOWED)
        new = tl.maximum(largest, tl.max(logits, axis=1))
        # Where nothing has been seen yet, exp2(-inf - -inf) would be NaN.
        base = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(logits - base[:, None])
        carried = tl.exp2(largest - base)
        total = total * carried + tl.sum(weights, axis=1)
        values = load_keys(value, value_strides, row, shared, columns, positions, D, BLOCK_D)
        acc = tl.dot(weights.to(values.dtype), values, acc * carried[:, None], input_precision="ieee")
        largest = new
    blind = largest == float("-inf")
    if sinks is not None:
        sink = load_sinks(sinks, lines)
        new = tl.maximum(largest, sink)
        base = tl.where(new == float("-inf"), 0.0, new)
        carried = tl.exp2(largest - base)
        acc, total, largest = acc * carried[:, None], total * carried + tl.exp2(sink - base), new
    found = acc / tl.where(blind, 1.0, total)[:, None]
    if wanted is not None:
        found = load_wanted(wanted, lines, D, BLOCK_D) - found
    inside = block * BLOCK_M + tl.arange(0, BLOCK_M) < group * queries
    dims = tl.arange(0, BLOCK_D)
    tl.store(output + lines.index[:, None] * D + dims[None, :], found, mask=inside[:, None] & (dims < D)[None, :])
    found_lse = tl.where(blind, float("-inf"), (largest + tl.log2(total)) / _LOG2_E)
    tl.store(lse + lines.index, found_lse, mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def matching_scores_kernel(
    query,
    key,
    query_positions,
    key_positions,
    lse,
    scores,  # float32 [splits, rows, key heads, keys], contiguous
    query_strides,
    key_strides,
    queries,
    keys,
    window,
    blocks,  # of keys
    rows,
    key_heads,
    group,
    splits,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOWED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute the sums of squared weights of a block of keys, over one part of the lines."""
    program = tl.program_id(0)
    block = program % blocks
    pair = (program // blocks % (rows * key_heads)).to(tl.int64)
    split = program // blocks // (rows * key_heads)
    row, shared = pair // key_heads, pair % key_heads
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    positions = locate_keys(key_positions, pair, columns, keys)
    tile = load_keys(key, key_strides, row, shared, columns, positions, D, BLOCK_D)
    found = tl.zeros([BLOCK_N], tl.float32)
    steps = tl.cdiv(group * queries, BLOCK_M)
    each = tl.cdiv(steps, splits)
    for step in range(split * each, tl.minimum((split + 1) * each, steps)):
        lines = locate_lines(query_positions, pair, key_heads, step * BLOCK_M, queries, group, BLOCK_M)
        own = load_lines(query, query_strides, row, lines, D, BLOCK_D)
        logits = masked_logits(own, tile, lines.position, positions, window, SCALE, SOFTCAP, WINDOWED)
        weights = tl.exp2(logits - load_lse(lse, lines)[:, None])
        found += tl.sum(weights * weights, axis=0)
    to = (split * (rows * key_heads) + pair) * keys + columns
    tl.store(scores + to, found, mask=columns < keys)


def plan_forward(
    inputs: MatchingInputs,
    settings: MatchingSettings,
    wanted: torch.Tensor | None = None,
    *,
    target: str | None = None,
) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """Plan the launch that computes lse and y, and make its outputs.

    Args:
        inputs: Queries and keys.
        settings: Settings of the attention.
        wanted: Write this, `[B, H, n, D]`, minus y in place of y.
        target: GPU to compile for, as the compile gate names it (cuda:90, hip:gfx942); None for the tensors' device.

    Returns:
        The launch, and lse and y, which it will write.
    """
    query, (rows, key_heads) = inputs.query, inputs.key.shape[:2]
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    output = query.new_empty(query.shape, dtype=torch.float32)
    configuration = _configuration(_FORWARD_CONFIGURATIONS, query, target)
    blocks = triton.cdiv(query.shape[1] // key_heads * query.shape[2], configuration[0])
    plan = launch_planner(inputs, settings, wanted)
    own = {"blocks": blocks, "lse": lse, "output": output}
    return plan(matching_forward_kernel, blocks * rows * key_heads, configuration, **own), lse, output


def plan_attention_scores(
    inputs: MatchingInputs, settings: MatchingSettings, *, target: str | None = None
) -> tuple[list[Launch], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Plan the launches of `attention_scores`, and make its outputs.

    Args:
        inputs: Queries and keys.
        settings: Settings of the attention.
        target: GPU to compile for, as the compile gate names it (cuda:90, hip:gfx942); None for the tensors' device.

    Returns:
        The launches in their order, and `(parts, lse, y)`, which they will write: the scores are the sum of parts
        `[splits, B, KV, S]`.
    """
    query, (rows, key_heads, keys) = inputs.query, inputs.key.shape[:3]
    first, lse, output = plan_forward(inputs, settings, target=target)
    configuration = _configuration(_SCORES_CONFIGURATIONS, query, target)
    blocks = triton.cdiv(keys, configuration[1])
    programs = blocks * rows * key_heads
    splits = splits_of(programs, query.shape[1] // key_heads * query.shape[2], configuration[0])
    parts = query.new_empty((splits, rows, key_heads, keys), dtype=torch.float32)
    plan = launch_planner(inputs, settings)
    own = {"blocks": blocks, "splits": splits, "lse": lse, "scores": parts}
    return [first, plan(matching_scores_kernel, programs * splits, configuration, **own)], (parts, lse, output)


def _configuration(table: dict, query: torch.Tensor, target: str | None) -> Configuration:
    """Select the launch configuration for queries and a target."""
    return select_configuration(table, query.shape[-1], query.dtype, resolve_target(query, target))


def attention_scores(
    inputs: MatchingInputs, settings: MatchingSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute `(scores, lse, y)` as `reference.attention_scores` does.

    Args:
        inputs: Queries and keys.
        settings: Settings of the attention.

    Returns:
        `[B, KV, S]`, `[B, H, n]` and `[B, H, n, D]` in float32.
    """
    launches, (parts, lse, output) = plan_attention_scores(inputs, settings)
    for launch in launches:
        launch.run()
    return parts.sum(0), lse, output
