"""What the attention kernels share: which keys a block of queries sees, logits, layouts and launch configurations."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...common.compat import interpreting, target_of
from ...common.launch import Launch
from ..arguments import AttentionInputs, AttentionSettings

LOG2_E = 1 / math.log(2)
_LOG2_E = tl.constexpr(LOG2_E)
# Kernels compare with these integers and divide by them, but address nothing with them. The compiler is told nothing
# of their values, so that one variant of a kernel serves all lengths.
LENGTHS = (
    "tokens", "offset", "memory_tokens", "memory_rows", "window", "blocks", "heads", "group", "splits", "shared",
    "rows",
)  # fmt: skip

# Threads and stages of one launch, and its blocks of queries (BLOCK_M) and of keys (BLOCK_N).
Configuration = tuple[int, int, int, int]
# Configurations by target, bytes of an element, and head_dim, padded to a power of two.
ConfigurationTable = dict[str, dict[int, dict[int, Configuration]]]


class Strides(NamedTuple):
    """Distances, in elements, from a row, a head and a token of a tensor `[rows, heads, tokens, D]` to the next.

    One argument of a kernel, which keeps its signature short. Triton passes and specialises each item of a tuple by
    itself, so that the machine code is that of three arguments.

    Attributes:
        row: Distance from row to row; 0 if all rows read the same one.
        head: Distance from head to head.
        token: Distance from token to token.
    """

    row: Any
    head: Any
    token: Any


class Keys(NamedTuple):
    """Keys and values of one key head, of a memory or a segment, as a kernel loads them.

    Attributes:
        key: Pointer to the first key.
        value: Pointer to the first value.
        key_token: Distance from a key to the next, in elements.
        value_token: Distance from a value to the next, in elements.
        first: Position of the first key that may be read.
        end: Position behind the last key that may be read.
    """

    key: Any
    value: Any
    key_token: Any
    value_token: Any
    first: Any
    end: Any


class Extent(NamedTuple):
    """Sizes of one call, by the parameters of the kernels that take them.

    Attributes:
        stored: Rows in which the queries lie; 1 if sequences lie one after the other.
        rows: Rows, or sequences.
        heads: Query heads.
        key_heads: Key heads.
        group: Query heads that share a key head.
        tokens: Queries of a stored row.
        longest: Queries of the longest row or sequence.
        offset: Position of the first query among the segment's keys; when decoding, keys of the cache.
        memory_tokens: Tokens of a memory; 0 without one.
    """

    stored: int
    rows: int
    heads: int
    key_heads: int
    group: int
    tokens: int
    longest: int
    offset: int
    memory_tokens: int


@triton.jit
def rank_and_pair(blocks):
    """Return the rank of this program's block of one head of one row, and the number of that pair.

    All blocks of one rank come before those of the next, so that what takes longest can have the first rank in every
    head: programs start in their order, and the last ones to start are then short.
    """
    program = tl.program_id(0)
    pairs = tl.num_programs(0) // blocks
    return program // pairs, program % pairs


@triton.jit
def tanh(x):
    """Compute tanh without a library, which the interpreter lacks.

    Near 0 by the Taylor series, because the quotient of exponentials would cancel there.
    """
    size = tl.abs(x)
    small = tl.exp2(size * (-2 * _LOG2_E))
    large = (1 - small) / (1 + small)
    square = x * x
    series = size * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    found = tl.where(size < 0.25, series, large)
    return tl.where(x < 0, -found, found)


@triton.jit
def base_2_logits(products, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Compute z of `../reference.py` times log2(e), and cap', from q · k in float32."""
    if SOFTCAP == 0.0:
        return products * (SCALE * _LOG2_E), 1.0
    else:
        share = tanh(products * (SCALE / SOFTCAP))
        return share * (SOFTCAP * _LOG2_E), 1.0 - share * share


@triton.jit
def advance(pointer, strides, row, head, token):
    """Move a pointer from a tensor's start to a row, a head and a token."""
    return pointer + row * strides.row + head * strides.head + token * strides.token


@triton.jit
def load_tile(base, lines, stride, first, count, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load the lines `lines` of a matrix `[count, D]` as `[lines, BLOCK_D]`.

    Lines before `first` and from `count` on are zeros, and are not read, for what lies there may be NaN. Without
    MASKED there must be none of these.
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
    """Store `values`, `[lines, BLOCK_D]`, as the lines `lines` of a matrix `[count, D]`, up to its end."""
    dims = tl.arange(0, BLOCK_D)
    mask = (lines < count)[:, None] & (dims < D)[None, :]
    pointers = base + lines[:, None].to(tl.int64) * stride + dims[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def locate_sequence(cu_seqlens, row, tokens):
    """Find where a row lies, or one of the sequences that lie one after the other.

    Returns `(stored row, first token, number of tokens)`; all sequences lie in the stored row 0.
    """
    if cu_seqlens is None:
        return row, row * 0, tokens
    else:
        first = tl.load(cu_seqlens + row)
        return row * 0, first.to(tl.int64), tl.load(cu_seqlens + row + 1) - first


@triton.jit
def first_in_memory(memory_lengths, row, memory_tokens):
    """Find the first memory token that a row reads."""
    if memory_lengths is None:
        return memory_tokens * 0
    else:
        return tl.maximum(memory_tokens - tl.load(memory_lengths + row), 0)


@triton.jit
def first_in_segment(segment_starts, row):
    """Find the first key of a row's segment that is no padding."""
    if segment_starts is None:
        return 0
    else:
        return tl.maximum(tl.load(segment_starts + row), 0)


@triton.jit
def split_key_blocks(low, low_full, high_full, high, BLOCK: tl.constexpr):
    """Split the keys that a block of queries reads into blocks with and without a mask.

    The keys that some of the queries see lie in `low..high`; those that all of them see in `low_full..high_full`.
    Returns `(left, begin, full_begin, full, full_end, right)`: first come `left` blocks from `begin` on in which some
    keys are masked, then `full` unmasked ones from `full_begin`, then `right` masked ones from `full_end`.
    """
    begin = low // BLOCK * BLOCK
    last = (high + BLOCK - 1) // BLOCK * BLOCK
    full_begin = tl.minimum((low_full + BLOCK - 1) // BLOCK * BLOCK, last)
    full_end = tl.maximum(high_full // BLOCK * BLOCK, full_begin)
    left = tl.maximum(full_begin - begin, 0) // BLOCK
    return left, begin, full_begin, (full_end - full_begin) // BLOCK, full_end, tl.maximum(last - full_end, 0) // BLOCK


@triton.jit
def visible_range(block, tokens, offset, start, window, BLOCK_M: tl.constexpr, WINDOWED: tl.constexpr):
    """Find the segment's keys that a block of queries sees: low, low_full, high_full, high of `split_key_blocks`."""
    first = offset + block * BLOCK_M
    high = offset + tl.minimum((block + 1) * BLOCK_M, tokens)
    low, low_full = start, start
    if WINDOWED:
        low = tl.maximum(start, first - window + 1)
        low_full = tl.maximum(start, high - window)
    return low, low_full, first + 1, high


@triton.jit
def segment_visible(positions, columns, start, window, high, WINDOWED: tl.constexpr):
    """Find which keys (columns) the queries at these positions see; both are broadcast against each other."""
    seen = (columns <= positions) & (columns >= start) & (columns < high)
    if WINDOWED:
        seen = seen & (columns > positions - window)
    return seen


def ensure_unit_stride(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return the tensor with its last dimension contiguous, copied if it is not; None for None."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def view_as_rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """View `[total, H, D]` as `[1, H, total, D]`; return anything else, None too, as it is."""
    return tensor if tensor is None or tensor.dim() == 4 else tensor.transpose(0, 1)[None]


def strides_of(tensor: torch.Tensor | None) -> Strides:
    """Return the strides of a tensor `[rows, heads, tokens, D]`, in elements.

    A tensor of one row is read by all rows, so that its stride from row to row is 0. All strides of None are 0.
    """
    if tensor is None:
        return Strides(0, 0, 0)
    row, head, token, _ = tensor.stride()
    return Strides(0 if len(tensor) == 1 else row, head, token)


def pad_to_tile(size: int) -> int:
    """Return the power of two, at least 16, that holds a size."""
    return max(16, triton.next_power_of_2(size))


def select_configuration(table: ConfigurationTable, head_dim: int, dtype: torch.dtype, target: str) -> Configuration:
    """Select a launch configuration from a table.

    Args:
        table: Configurations by target, bytes of an element and padded head_dim.
        head_dim: Size of a head.
        dtype: Dtype of the query.
        target: As `resolve_target` returns it; one that the table lacks counts as hip:gfx942, or as cuda:80.

    Returns:
        `(BLOCK_M, BLOCK_N, threads, num_stages)`.
    """
    if target == "interpreter":
        return 16, 16, 128, 1
    by_size = table.get(target, table["hip:gfx942" if target.startswith("hip:") else "cuda:80"])
    return by_size[dtype.itemsize][max(64, pad_to_tile(head_dim))]


def resolve_target(tensor: torch.Tensor, target: str | None) -> str:
    """Return the target to compile for.

    Args:
        tensor: A tensor on the device that the kernel will run on.
        target: As the compile gate names it (cuda:90, hip:gfx942); None for the tensor's device.

    Returns:
        The target, or `interpreter`.
    """
    if target is not None:
        return target
    return "interpreter" if interpreting() else target_of(tensor.device)


def extent_of(inputs: AttentionInputs, offset: Any, max_seqlen: int | None = None) -> Extent:
    """Return the sizes of a call.

    Args:
        inputs: Tensors of the attention.
        offset: `Extent.offset`, for rows; it is 0 for sequences.
        max_seqlen: Length of the longest sequence; read only with `cu_seqlens`.

    Returns:
        The sizes.
    """
    query, key, memory_key = inputs.query, inputs.key, inputs.memory_key
    heads = query.shape[1]
    key_heads = (memory_key if key is None else key).shape[1]  # type: ignore[union-attr]  # one of them is there
    memory_tokens = 0 if memory_key is None else memory_key.shape[2]
    if inputs.cu_seqlens is None:
        stored = rows = query.shape[0]
        tokens = longest = query.shape[2]
    else:
        assert max_seqlen is not None
        stored, rows, tokens, longest, offset = 1, len(inputs.cu_seqlens) - 1, query.shape[0], max_seqlen, 0
    return Extent(stored, rows, heads, key_heads, heads // key_heads, tokens, longest, offset, memory_tokens)


def launch_planner(
    inputs: AttentionInputs,
    settings: AttentionSettings,
    extent: Extent,
    tensors: Mapping[str, torch.Tensor | None],
    others: Mapping[str, Any],
) -> Callable[..., Launch]:
    """Make a function that plans the launches of one call.

    Args:
        inputs: Tensors of the attention.
        settings: Its settings.
        extent: Sizes of the call.
        tensors: Further tensors of the query's or key's layout by parameter; the kernels take their strides, too.
        others: All other arguments by parameter.

    Returns:
        A function `(kernel, grid, configuration, **own)` that plans the launch of a kernel with those of all these
        arguments that its parameters name. `own` are arguments of this launch alone.
    """
    head_dim = inputs.query.shape[-1]
    available = {
        "memory_lengths": inputs.memory_lengths,
        "segment_starts": inputs.segment_starts,
        "cu_seqlens": inputs.cu_seqlens,
        "sinks": None if inputs.sinks is None else inputs.sinks.contiguous(),
        **extent._asdict(),
        **others,
        "window": settings.window or 0,
        "SCALE": settings.scale,
        "SOFTCAP": settings.softcap or 0.0,
        "WINDOWED": settings.window is not None,
        "D": head_dim,
        "BLOCK_D": pad_to_tile(head_dim),
    }
    for name, tensor in (*zip(inputs._fields[:5], inputs[:5], strict=True), *tensors.items()):
        tensor = ensure_unit_stride(view_as_rows(tensor))
        available[name], available[f"{name}_strides"] = tensor, strides_of(tensor)

    def plan(kernel: Any, grid: int, configuration: Configuration, **own: Any) -> Launch:
        block_m, block_n, threads, stages = configuration
        # A short memory is not padded to a long block: one variant for each power of two below it.
        memory_n = min(block_n, pad_to_tile(extent.memory_tokens)) if extent.memory_tokens else block_n
        given = {**available, "BLOCK_M": block_m, "BLOCK_N": block_n, "MEMORY_N": memory_n, **own}
        arguments: dict[str, Any] = {}
        constexprs: dict[str, Any] = {}
        for name in kernel.arg_names:
            (constexprs if name.isupper() else arguments)[name] = given[name]
        return Launch(kernel, grid, arguments, constexprs, threads, {"num_stages": stages}, LENGTHS)

    return plan
