"""The normal equations of the values of kept keys, without a matrix of queries by keys.

matching_system_kernel   a block of gram on the diagonal, and the same block of residual: one program for each block of
                         keys and part of the lines. Where one block holds all kept keys, it computes their softmax
                         itself, and is all there is to do; else `matching_forward_kernel` first writes lse and
                         y - X V
matching_cross_kernel    the blocks of gram below the diagonal, and mirrored above it

Parts are then added in order.
"""

import torch
import triton
import triton.language as tl

from ...attention.triton.common import LOG2_E, resolve_target, select_configuration
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
from .scores import plan_forward

_LOG2_E = tl.constexpr(LOG2_E)

# As in scores.py. For one block of kept keys; for several, those on the diagonal; and those below it, whose BLOCK_N
# must be the diagonal's. One stage on cuda:100: with more, Triton 3.6.0 fails.
_WHOLE_CONFIGURATIONS = {
    "cuda:80": {2: {64: (64, 64, 256, 2), 128: (64, 64, 256, 1), 256: (32, 64, 256, 1)},
               4: {64: (16, 32, 256, 1), 128: (16, 16, 256, 1), 256: (16, 16, 256, 1)}},
    "cuda:90": {2: {64: (64, 64, 256, 2), 128: (32, 64, 256, 2), 256: (32, 64, 256, 1)},
               4: {64: (16, 32, 256, 1), 128: (16, 16, 256, 1), 256: (16, 16, 256, 1)}},
    "cuda:100": {2: {64: (64, 64, 256, 1), 128: (64, 64, 256, 1), 256: (64, 64, 256, 1)},
                4: {64: (16, 32, 256, 1), 128: (16, 16, 256, 1), 256: (16, 16, 256, 1)}},
    "hip:gfx942": {2: {64: (64, 64, 256, 1), 128: (32, 64, 256, 1), 256: (16, 64, 256, 1)},
                  4: {64: (16, 32, 256, 1), 128: (16, 16, 256, 1), 256: (16, 16, 256, 1)}},
}  # fmt: skip
_DIAGONAL_CONFIGURATIONS = {
    "cuda:80": {2: {64: (32, 64, 256, 2), 128: (64, 64, 256, 2), 256: (64, 32, 256, 1)},
               4: {64: (16, 32, 256, 1), 128: (16, 16, 256, 1), 256: (16, 16, 256, 1)}},
    "cuda:90": {2: {64: (64, 64, 256, 2), 128: (64, 64, 256, 2), 256: (64, 64, 256, 1)},
               4: {64: (16, 32, 256, 1), 128: (16, 16, 256, 1), 256: (16, 16, 256, 1)}},
    "cuda:100": {2: {64: (64, 64, 256, 1), 128: (64, 64, 256, 1), 256: (64, 64, 256, 1)},
                4: {64: (16, 32, 256, 1), 128: (16, 16, 256, 1), 256: (16, 16, 256, 1)}},
    "hip:gfx942": {2: {64: (64, 64, 256, 1), 128: (32, 64, 256, 1), 256: (16, 64, 256, 1)},
                  4: {64: (16, 32, 256, 1), 128: (16, 16, 256, 1), 256: (16, 16, 256, 1)}},
}  # fmt: skip
_CROSS_CONFIGURATIONS = {
    "cuda:80": {2: {64: (64, 64, 256, 2), 128: (64, 64, 256, 2), 256: (64, 32, 256, 1)},
               4: {64: (16, 32, 256, 1), 128: (16, 16, 256, 1), 256: (16, 16, 256, 2)}},
    "cuda:90": {2: {64: (64, 64, 256, 2), 128: (64, 64, 256, 2), 256: (32, 64, 256, 1)},
               4: {64: (16, 32, 256, 1), 128: (16, 16, 256, 1), 256: (16, 16, 256, 2)}},
    "cuda:100": {2: {64: (64, 64, 256, 2), 128: (64, 64, 256, 2), 256: (64, 64, 256, 1)},
                4: {64: (16, 32, 256, 1), 128: (16, 16, 256, 1), 256: (16, 16, 256, 2)}},
    "hip:gfx942": {2: {64: (64, 64, 256, 1), 128: (32, 64, 256, 1), 256: (16, 64, 256, 1)},
                  4: {64: (16, 32, 256, 1), 128: (16, 16, 256, 1), 256: (16, 16, 256, 1)}},
}  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def matching_system_kernel(
    query,
    key,
    value,  # read only if WHOLE
    wanted,  # y if WHOLE, else y - X V; float32 [rows, heads, queries, D], contiguous
    query_positions,
    key_positions,
    sinks,  # read only if WHOLE
    lse,  # float32 [rows, heads, queries], contiguous: written if WHOLE, else read
    gram,  # float32 [splits, rows, key heads, keys, keys], contiguous
    residual,  # float32 [splits, rows, key heads, keys, D], contiguous
    query_strides,
    key_strides,
    value_strides,
    queries,
    keys,
    window,
    blocks,  # of keys
    rows,
    key_heads,
    group,
    splits,
    WHOLE: tl.constexpr,  # one block holds all keys
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOWED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute a block of gram on the diagonal, and the same lines of residual, over one part of the lines."""
    program = tl.program_id(0)
    block = program % blocks
    pair = (program // blocks % (rows * key_heads)).to(tl.int64)
    split = program // blocks // (rows * key_heads)
    row, shared = pair // key_heads, pair % key_heads
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    positions = locate_keys(key_positions, pair, columns, keys)
    tile = load_keys(key, key_strides, row, shared, columns, positions, D, BLOCK_D)
    if WHOLE:
        values = load_keys(value, value_strides, row, shared, columns, positions, D, BLOCK_D)
    products = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    found = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    steps = tl.cdiv(group * queries, BLOCK_M)
    each = tl.cdiv(steps, splits)
    for step in range(split * each, tl.minimum((split + 1) * each, steps)):
        lines = locate_lines(query_positions, pair, key_heads, step * BLOCK_M, queries, group, BLOCK_M)
        own = load_lines(query, query_strides, row, lines, D, BLOCK_D)
        logits = masked_logits(own, tile, lines.position, positions, window, SCALE, SOFTCAP, WINDOWED)
        missing = load_wanted(wanted, lines, D, BLOCK_D)
        if WHOLE:
            largest = tl.max(logits, axis=1)
            blind = largest == float("-inf")
            if sinks is not None:
                sink = load_sinks(sinks, lines)
                largest = tl.maximum(largest, sink)
            base = tl.where(largest == float("-inf"), 0.0, largest)
            exponentials = tl.exp2(logits - base[:, None])
            total = tl.sum(exponentials, axis=1)
            if sinks is not None:
                total += tl.exp2(sink - base)
            total = tl.where(total == 0.0, 1.0, total)
            found_lse = tl.where(blind, float("-inf"), (base + tl.log2(total)) / _LOG2_E)
            tl.store(lse + lines.index, found_lse, mask=step * BLOCK_M + tl.arange(0, BLOCK_M) < group * queries)
            weights = (exponentials / total[:, None]).to(tile.dtype)
            missing -= tl.dot(weights, values, input_precision="ieee")
        else:
            lse_2 = load_lse(lse, lines)
            weights = tl.exp2(logits - lse_2[:, None]).to(tile.dtype)
        products = tl.dot(tl.trans(weights), weights, products, input_precision="ieee")
        found = tl.dot(tl.trans(weights), missing.to(tile.dtype), found, input_precision="ieee")
    to = ((split * (rows * key_heads) + pair) * keys + columns)[:, None]
    inside = columns < keys
    tl.store(gram + to * keys + columns[None, :], products, mask=inside[:, None] & inside[None, :])
    dims = tl.arange(0, BLOCK_D)
    tl.store(residual + to * D + dims[None, :], found, mask=inside[:, None] & (dims < D)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def matching_cross_kernel(
    query,
    key,
    query_positions,
    key_positions,
    lse,
    gram,  # float32 [splits, rows, key heads, keys, keys], contiguous
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
    """Compute a block of gram below the diagonal, and its mirror image, over one part of the lines."""
    program = tl.program_id(0)
    below = program % blocks
    left = program // blocks % blocks
    if left < below:
        pair = (program // blocks // blocks % (rows * key_heads)).to(tl.int64)
        split = program // blocks // blocks // (rows * key_heads)
        row, shared = pair // key_heads, pair % key_heads
        columns = below * BLOCK_N + tl.arange(0, BLOCK_N)
        positions = locate_keys(key_positions, pair, columns, keys)
        tile = load_keys(key, key_strides, row, shared, columns, positions, D, BLOCK_D)
        others = left * BLOCK_N + tl.arange(0, BLOCK_N)
        other_positions = locate_keys(key_positions, pair, others, keys)
        other_tile = load_keys(key, key_strides, row, shared, others, other_positions, D, BLOCK_D)
        products = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
        steps = tl.cdiv(group * queries, BLOCK_M)
        each = tl.cdiv(steps, splits)
        for step in range(split * each, tl.minimum((split + 1) * each, steps)):
            lines = locate_lines(query_positions, pair, key_heads, step * BLOCK_M, queries, group, BLOCK_M)
            own = load_lines(query, query_strides, row, lines, D, BLOCK_D)
            lse_2 = load_lse(lse, lines)[:, None]
            logits = masked_logits(own, tile, lines.position, positions, window, SCALE, SOFTCAP, WINDOWED)
            weights = tl.exp2(logits - lse_2).to(tile.dtype)
            logits = masked_logits(own, other_tile, lines.position, other_positions, window, SCALE, SOFTCAP, WINDOWED)
            other_weights = tl.exp2(logits - lse_2).to(tile.dtype)
            products = tl.dot(tl.trans(weights), other_weights, products, input_precision="ieee")
        to = gram + (split * (rows * key_heads) + pair) * keys * keys
        inside = (columns < keys)[:, None] & (others < keys)[None, :]
        tl.store(to + columns[:, None] * keys + others[None, :], products, mask=inside)
        tl.store(to + others[:, None] * keys + columns[None, :], tl.trans(products), mask=tl.trans(inside))


def plan_value_system(
    inputs: MatchingInputs, wanted: torch.Tensor, settings: MatchingSettings, *, target: str | None = None
) -> tuple[list[Launch], tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Plan the launches of `value_system`, and make its outputs.

    Args:
        inputs: Queries and kept keys.
        wanted: y, float32 `[B, H, n, D]`.
        settings: Settings of the attention.
        target: GPU to compile for, as the compile gate names it (cuda:90, hip:gfx942); None for the tensors' device.

    Returns:
        The launches in their order, and what they will write: the parts of gram, `[splits, B, KV, S, S]`, and of
        residual, `[splits, B, KV, S, D]`, that are to be added; and lse.
    """
    query, (rows, key_heads, keys, head_dim) = inputs.query, inputs.key.shape
    resolved = resolve_target(query, target)
    configuration, diagonal, cross = (
        select_configuration(table, head_dim, query.dtype, resolved)
        for table in (_WHOLE_CONFIGURATIONS, _DIAGONAL_CONFIGURATIONS, _CROSS_CONFIGURATIONS)
    )
    whole = keys <= configuration[1]
    if not whole:
        configuration = diagonal
    blocks = triton.cdiv(keys, configuration[1])
    programs = blocks * rows * key_heads
    splits = splits_of(programs, query.shape[1] // key_heads * query.shape[2], configuration[0])
    gram = query.new_empty((splits, rows, key_heads, keys, keys), dtype=torch.float32)
    residual = query.new_empty((splits, rows, key_heads, keys, head_dim), dtype=torch.float32)
    own = {"blocks": blocks, "splits": splits, "gram": gram, "residual": residual, "WHOLE": whole}
    if whole:
        # Filled, for if there is no key nothing is launched.
        lse = query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
        plan = launch_planner(inputs, settings, wanted)
        launch = plan(matching_system_kernel, programs * splits, configuration, lse=lse, **own)
        return [launch], (gram, residual), lse
    first, lse, missing = plan_forward(inputs, settings, wanted, target=target)
    plan = launch_planner(inputs._replace(sinks=None), settings, missing)
    own |= {"lse": lse}
    launches = [first, plan(matching_system_kernel, programs * splits, configuration, **own)]
    launches.append(plan(matching_cross_kernel, blocks * programs * splits, cross, **own))
    return launches, (gram, residual), lse


def value_system(
    inputs: MatchingInputs, target: torch.Tensor, settings: MatchingSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute gram, residual and lse as `reference.value_system` does.

    Args:
        inputs: Queries and kept keys.
        target: y, float32 `[B, H, n, D]`.
        settings: Settings of the attention.

    Returns:
        `[B, KV, S, S]`, `[B, KV, S, D]` and `[B, H, n]` in float32.
    """
    launches, parts, lse = plan_value_system(inputs, target, settings)
    for launch in launches:
        launch.run()
    gram, residual = (part.sum(0) for part in parts)
    return gram, residual, lse
