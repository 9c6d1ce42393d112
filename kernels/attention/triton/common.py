"""What the attention kernels share: which keys a block sees, logits, layouts and launch configurations."""

import math

import triton
import triton.language as tl

from ...common.compat import interpreting, target_of
from ...common.launch import Launch

LOG2_E = 1 / math.log(2)
_LOG2_E = tl.constexpr(LOG2_E)
# Compared and divided by, never an address: as many values, one kernel.
LENGTHS = ("tokens", "offset", "memory_tokens", "window", "blocks", "heads", "group", "splits", "shared", "rows")


@triton.jit
def tanh(x):
    """Without a library, which the interpreter lacks. Near 0 by its series: the quotient would cancel there."""
    size = tl.abs(x)
    small = tl.exp2(size * (-2 * _LOG2_E))
    large = (1 - small) / (1 + small)
    square = x * x
    series = size * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    found = tl.where(size < 0.25, series, large)
    return tl.where(x < 0, -found, found)


@triton.jit
def base_2_logits(products, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Compute z of `reference.py` times log2(e), and cap', from q · k in float32."""
    if SOFTCAP == 0.0:
        return products * (SCALE * _LOG2_E), 1.0
    else:
        share = tanh(products * (SCALE / SOFTCAP))
        return share * (SOFTCAP * _LOG2_E), 1.0 - share * share


@triton.jit
def load_tile(base, lines, stride, first, count, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `lines` of a matrix `[count, D]`, zeros before `first` and from `count` on: `[lines, BLOCK_D]`.

    MASKED: whether some may lie there. What is not read may be anything, NaN too.
    """
    dims = tl.arange(0, BLOCK_D)
    pointers = base + lines[:, None].to(tl.int64) * stride + dims[None, :]
    if MASKED:
        mask = (lines >= first) & (lines < count)
        if D < BLOCK_D:
            return tl.load(pointers, mask=mask[:, None] & (dims < D)[None, :], other=0.0)
        else:
            return tl.load(pointers, mask=mask[:, None], other=0.0)
    elif D < BLOCK_D:
        return tl.load(pointers, mask=(dims < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(base, lines, stride, count, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    mask = (lines < count)[:, None] & (dims < D)[None, :]
    pointers = base + lines[:, None].to(tl.int64) * stride + dims[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def sequence(cu_seqlens, row, tokens):
    """`(row in memory, first token, tokens)` of a row, or of one of the sequences that lie one after the other."""
    if cu_seqlens is None:
        return row, row * 0, tokens
    else:
        first = tl.load(cu_seqlens + row)
        return row * 0, first.to(tl.int64), tl.load(cu_seqlens + row + 1) - first


@triton.jit
def first_in_memory(memory_lengths, row, memory_tokens):
    if memory_lengths is None:
        return memory_tokens * 0
    else:
        return tl.maximum(memory_tokens - tl.load(memory_lengths + row), 0)


@triton.jit
def first_in_segment(segment_starts, row):
    if segment_starts is None:
        return 0
    else:
        return tl.maximum(tl.load(segment_starts + row), 0)


@triton.jit
def key_blocks(low, low_full, high_full, high, BLOCK: tl.constexpr):
    """Blocks of keys that a block of queries reads: `(left, begin, full_begin, full, full_end, right)`.

    low, high: keys that some query sees lie between; low_full, high_full: those that all of them see. First come
    `left` blocks from `begin` on in which some are masked, then `full` from `full_begin`, then `right`, masked, from
    `full_end`.
    """
    begin = low // BLOCK * BLOCK
    last = (high + BLOCK - 1) // BLOCK * BLOCK
    full_begin = tl.minimum((low_full + BLOCK - 1) // BLOCK * BLOCK, last)
    full_end = tl.maximum(high_full // BLOCK * BLOCK, full_begin)
    left = tl.maximum(full_begin - begin, 0) // BLOCK
    return left, begin, full_begin, (full_end - full_begin) // BLOCK, full_end, tl.maximum(last - full_end, 0) // BLOCK


@triton.jit
def segment_range(block, tokens, offset, start, window, BLOCK_M: tl.constexpr, WINDOWED: tl.constexpr):
    """`low, low_full, high_full, high` of `key_blocks` for a block of queries and the segment's keys."""
    first = offset + block * BLOCK_M
    high = offset + tl.minimum((block + 1) * BLOCK_M, tokens)
    low, low_full = start, start
    if WINDOWED:
        low = tl.maximum(start, first - window + 1)
        low_full = tl.maximum(start, high - window)
    return low, low_full, first + 1, high


@triton.jit
def in_segment(places, columns, start, window, high, WINDOWED: tl.constexpr):
    """Which keys (columns) which queries (at places) see; broadcast against each other."""
    seen = (columns <= places) & (columns >= start) & (columns < high)
    if WINDOWED:
        seen = seen & (columns > places - window)
    return seen


def with_unit_stride(tensor):
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def rows_first(tensor):
    """`[total, H, D]` as `[1, H, total, D]`, a view; anything else as it is."""
    return tensor if tensor is None or tensor.dim() == 4 else tensor.transpose(0, 1)[None]


def strides(name, tensor):
    """Arguments NAME_row, NAME_head and NAME_token. A tensor of one row is read by all rows."""
    if tensor is None:
        return {f"{name}_row": 0, f"{name}_head": 0, f"{name}_token": 0}
    row, head, token, _ = tensor.stride()
    return {f"{name}_row": 0 if len(tensor) == 1 else row, f"{name}_head": head, f"{name}_token": token}


def block_d(head_dim):
    return max(16, triton.next_power_of_2(head_dim))


def configuration(table, head_dim, dtype, target):
    """`(BLOCK_M, BLOCK_N, threads, num_stages)` of a table: by target, bytes of an element, padded head_dim."""
    if target == "interpreter":
        return 16, 16, 128, 1
    by_size = table.get(target, table["cuda:80"])
    return by_size[dtype.itemsize][max(64, block_d(head_dim))]


def target_for(tensor, target):
    """target: as the compile gate names it, or None for the tensor's device."""
    if target is not None:
        return target
    return "interpreter" if interpreting() else target_of(tensor.device)


def planner(tensors, others, *, scale, window, softcap):
    """A function that plans launches of kernels, each with those of a call's arguments that it names.

    tensors: `[rows, heads, tokens, D]`, with their strides; others: without. Of the function: `(BLOCK_M, BLOCK_N,
    threads, stages)` and what is this launch's own.
    """
    head_dim = tensors["query"].shape[-1]
    available = {
        **tensors,
        **others,
        "window": window or 0,
        "SCALE": scale,
        "SOFTCAP": softcap or 0.0,
        "WINDOWED": window is not None,
        "D": head_dim,
        "BLOCK_D": block_d(head_dim),
    }
    for name, tensor in tensors.items():
        available |= strides(name, tensor)

    def plan(kernel, grid, configuration, **own):
        block_m, block_n, threads, stages = configuration
        given = {**available, "BLOCK_M": block_m, "BLOCK_N": block_n, **own}
        named = {name: given[name] for name in kernel.arg_names}
        constexprs = {name: value for name, value in named.items() if name.isupper()}
        arguments = {name: value for name, value in named.items() if name not in constexprs}
        return Launch(kernel, grid, arguments, constexprs, threads, {"num_stages": stages}, LENGTHS)

    return plan
