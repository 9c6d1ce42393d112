"""What the matching kernels share: lines of queries, who sees whom, and the planning of launches.

The queries of all heads that share a key head are *lines*, head by head: line l is query `l % queries` of the head
`l // queries` of the group. So keys are read once for a block of lines, whichever heads they are of.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...attention.triton.common import (
    LOG2_E,
    Configuration,
    base_2_logits,
    ensure_unit_stride,
    pad_to_tile,
    strides_of,
)
from ...common.launch import Launch
from ..arguments import MatchingInputs, MatchingSettings

_LOG2_E = tl.constexpr(LOG2_E)
# A position that no query has reached: that of keys that do not exist.
_NEVER = tl.constexpr(2**31 - 1)
# Kernels compare with these integers and count by them. The compiler is told nothing of their values, so that one
# variant of a kernel serves all lengths.
LENGTHS = ("queries", "keys", "window", "blocks", "rows", "key_heads", "group", "splits")
# About how many programs sums over queries are split into: some for each multiprocessor of a large GPU. A constant, so
# that the order of additions, and with it the result, does not depend on how many the GPU has.
_PROGRAMS = 264


class Lines(NamedTuple):
    """A block of lines, as a kernel knows it.

    Attributes:
        head: Query head of each, `[BLOCK_M]`.
        token: Its query among those of the head, `[BLOCK_M]`.
        position: Its position, negative where there is no query, int32 `[BLOCK_M]`.
        index: Its index among all lines, which is where it lies in what is contiguous, int64 `[BLOCK_M]`.
    """

    head: Any
    token: Any
    position: Any
    index: Any


@triton.jit
def locate_lines(query_positions, pair, key_heads, first, queries, group, BLOCK_M: tl.constexpr):
    """Find the lines from `first` on of a row and key head."""
    lines = first + tl.arange(0, BLOCK_M)
    row, shared = pair // key_heads, pair % key_heads
    head, token = shared * group + lines // queries, lines % queries
    position = tl.load(query_positions + row * queries + token, mask=lines < group * queries, other=-1)
    return Lines(head, token, position, pair * (group * queries) + lines)


@triton.jit
def locate_keys(key_positions, pair, columns, keys):
    """Find the positions of keys; where there is none, one that no query sees."""
    found = tl.load(key_positions + pair * keys + columns, mask=columns < keys, other=-1)
    return tl.where(found < 0, _NEVER, found)


@triton.jit
def load_lines(base, strides, row, lines, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load `[BLOCK_M, BLOCK_D]` of `[B, H, n, D]`: zeros where there is no query, and nothing is read there."""
    offsets = row * strides.row + lines.head * strides.head + lines.token.to(tl.int64) * strides.token
    return load_tile(base + offsets, lines.position >= 0, D, BLOCK_D)


@triton.jit
def load_wanted(base, lines, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load `[BLOCK_M, BLOCK_D]` of `[B, H, n, D]`, which is contiguous: zeros where there is no query."""
    return load_tile(base + lines.index * D, lines.position >= 0, D, BLOCK_D)


@triton.jit
def load_keys(base, strides, row, shared, columns, positions, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load `[BLOCK_N, BLOCK_D]` of `[B, KV, S, D]`: zeros where there is no key, and nothing is read there."""
    start = base + row * strides.row + shared * strides.head
    return load_tile(start + columns.to(tl.int64) * strides.token, positions < _NEVER, D, BLOCK_D)


@triton.jit
def load_tile(pointers, exists, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load the D numbers at each of the pointers, padded with zeros; zeros for those that do not exist."""
    dims = tl.arange(0, BLOCK_D)
    mask = exists[:, None]
    if D < BLOCK_D:
        mask = mask & (dims < D)[None, :]
    return tl.load(pointers[:, None] + dims[None, :], mask=mask, other=0.0)


@triton.jit
def load_sinks(sinks, lines):
    """Load each line's logit of a sink, to base 2; -inf where there is no query."""
    found = tl.load(sinks + lines.head, mask=lines.position >= 0, other=float("-inf"))
    return found.to(tl.float32) * _LOG2_E


@triton.jit
def masked_logits(
    query, key, query_positions, key_positions, window, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """Compute z of `../reference.py` times log2(e), float32 `[BLOCK_M, BLOCK_N]`; -inf where a key is not seen."""
    products = tl.dot(query, tl.trans(key), input_precision="ieee")
    logits, _ = base_2_logits(products, SCALE, SOFTCAP)
    seen = key_positions[None, :] <= query_positions[:, None]
    if WINDOWED:
        seen = seen & (key_positions[None, :] > query_positions[:, None] - window)
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def load_lse(lse, lines):
    """Load lse of lines, to base 2; +inf for those that see no key, whose weights then are zeros."""
    found = tl.load(lse + lines.index, mask=lines.position >= 0, other=float("-inf"))
    return tl.where(found == float("-inf"), float("inf"), found * _LOG2_E)


def splits_of(programs: int, lines: int, block: int) -> int:
    """Return into how many parts a sum over lines is split, for programs enough but none with little to do.

    Args:
        programs: Number of programs without splits.
        lines: Number of lines.
        block: Number of lines of a block.

    Returns:
        The number of parts, at least 1.
    """
    return max(1, min(_PROGRAMS // max(1, programs), lines // (4 * block)))


def launch_planner(
    inputs: MatchingInputs, settings: MatchingSettings, wanted: torch.Tensor | None = None
) -> Callable[..., Launch]:
    """Make a function that plans the launches of one call.

    Args:
        inputs: Queries and keys.
        settings: Settings of the attention.
        wanted: y of a `value_system`.

    Returns:
        A function `(kernel, grid, configuration, **own)` that plans the launch of a kernel with those of all these
        arguments that its parameters name. `own` are arguments of this launch alone.
    """
    rows, heads, queries, head_dim = inputs.query.shape
    key_heads, keys = inputs.key.shape[1:3]
    available: dict[str, Any] = {
        "query_positions": inputs.query_positions.contiguous(),
        "key_positions": inputs.key_positions.contiguous(),
        "sinks": None if inputs.sinks is None else inputs.sinks.contiguous(),
        "wanted": None if wanted is None else wanted.contiguous(),
        "queries": queries,
        "keys": keys,
        "rows": rows,
        "key_heads": key_heads,
        "group": heads // key_heads,
        "window": settings.window or 0,
        "splits": 1,
        "SCALE": settings.scale,
        "SOFTCAP": settings.softcap or 0.0,
        "WINDOWED": settings.window is not None,
        "D": head_dim,
        "BLOCK_D": pad_to_tile(head_dim),
    }
    for name, tensor in (("query", inputs.query), ("key", inputs.key), ("value", inputs.value)):
        available[name] = ensure_unit_stride(tensor)
        available[f"{name}_strides"] = strides_of(available[name])

    def plan(kernel: Any, grid: int, configuration: Configuration, **own: Any) -> Launch:
        block_m, block_n, threads, stages = configuration
        given = {**available, "BLOCK_M": block_m, "BLOCK_N": block_n, **own}
        arguments: dict[str, Any] = {}
        constexprs: dict[str, Any] = {}
        for name in kernel.arg_names:
            (constexprs if name.isupper() else arguments)[name] = given[name]
        unspecialised = tuple(name for name in LENGTHS if name in arguments)
        return Launch(kernel, grid, arguments, constexprs, threads, {"num_stages": stages}, unspecialised)

    return plan
