"""Memory-token attention: a segment's queries see a memory that is held elsewhere, and causally their own segment.

`reference.py` is the specification, where formulas and their sources stand; `triton/` implements it for GPUs, and
`vendor.py` by PyTorch's own attention. The functions below validate their arguments and call the operators
`torch.ops.r3mem.*`, which run one of these (`dispatch.py`), under autograd and `torch.compile`. Nothing is
concatenated, no mask is made, and no kernel is compiled anew when batch, tokens or memory change.

Shapes: B is the number of rows (batch items), Hq and Hkv the numbers of query and key heads (Hq a multiple of Hkv), T,
S and M the numbers of queries, keys of the segment and memory tokens, and D the head_dim (up to `MAX_HEAD_DIM` for
Triton's kernels). Keys already carry their positions (rotary embeddings). A query that sees no key at all gives an
output of zeros, and a log-sum-exp of -inf.
"""

import math

import torch

from ..common.compat import MAX_HEAD_DIM
from . import ops
from .reference import merge

__all__ = ["MAX_HEAD_DIM", "memory_attention", "memory_attention_varlen", "memory_decode", "merge"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_DECODED = 64  # queries that share a key head


def memory_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_key: torch.Tensor | None = None,
    memory_value: torch.Tensor | None = None,
    *,
    memory_lengths: torch.Tensor | None = None,
    segment_starts: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    query_offset: int = 0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend from a segment's queries to a memory and, causally, to the segment.

    Differentiable once in all float tensors, the returned log-sum-exps included. Gradients are deterministic. The
    formula is in `reference.py`.

    Args:
        query: `[B, Hq, T, D]` in bfloat16, float16, float32 or float64.
        key: Keys of the segment, `[B, Hkv, S, D]`, in the dtype and on the device of the query; so are all tensors
            whose description says nothing else.
        value: Values of the segment, `[B, Hkv, S, D]`.
        memory_key: `[B, Hkv, M, D]`, or `[1, Hkv, M, D]` for one memory that all rows read. M may be 0. None for no
            memory.
        memory_value: Tensor of the shape of `memory_key`; None for no memory.
        memory_lengths: int32 or int64 `[B]`, numbers of memory tokens that the rows read. These are the *last* ones,
            because a memory is filled from its end. None for all of them.
        segment_starts: int32 or int64 `[B]`. Keys of the segment before these positions are padding, and are not
            read. None for no padding.
        sinks: Attention sinks, `[Hq]`: logits that take part in the softmax and have no value; float32, or in the
            dtype of the query.
        scale: Factor of `q · k`; None for `D ** -0.5`.
        window: Number of keys of the segment that a query sees, counted back from its own, which is included; None
            for all of them. The memory is always seen.
        softcap: c of `c * tanh(scale * q · k / c)`; None for no cap.
        query_offset: Number of keys of the segment before the first query, so that `S = query_offset + T`: query i
            sees the keys up to position `query_offset + i`.
        return_lse: Also return the log-sum-exps: logarithms of the softmax's denominators, sinks included.

    Returns:
        The output, `[B, Hq, T, D]` in the dtype of the query. With `return_lse` a tuple of it and the log-sum-exps,
        `[B, Hq, T]` in float32 (float64 for float64).

    Raises:
        TypeError: If a dtype is not supported, or dtypes differ.
        ValueError: If a shape, a device or a setting does not fit.
    """
    _check_tensors(query, key, value, memory_key, memory_value)
    if type(query_offset) is not int or query_offset < 0:
        raise ValueError(f"query_offset must be an integer of at least 0, got {query_offset!r}")
    if key.shape[2] != query_offset + query.shape[2]:
        raise ValueError(
            f"key has {key.shape[2]} tokens; {query.shape[2]} queries behind query_offset={query_offset} need "
            f"{query_offset + query.shape[2]}"
        )
    lengths = _checked_lengths("memory_lengths", memory_lengths, query, len(query), needs=memory_key)
    starts = _checked_lengths("segment_starts", segment_starts, query, len(query))
    settings = _checked_settings(query, sinks, scale, window, softcap)
    output, lse = ops.memory_attention(
        query, key, value, memory_key, memory_value, lengths, starts, None, sinks, *settings, query_offset
    )
    return (output, lse) if return_lse else output


def memory_attention_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    memory_key: torch.Tensor | None = None,
    memory_value: torch.Tensor | None = None,
    *,
    memory_lengths: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend as `memory_attention` does, for N segments of different lengths that lie one after the other.

    Args:
        query: `[total, Hq, D]` in bfloat16, float16, float32 or float64.
        key: `[total, Hkv, D]`, in the dtype and on the device of the query; so are all tensors whose description says
            nothing else.
        value: `[total, Hkv, D]`.
        cu_seqlens: int32 `[N + 1]`, where each segment starts, and the total.
        max_seqlen: Length of the longest segment, in tokens. A larger number costs time; what a smaller one gives is
            not defined, and refused on a CPU alone: to compare it with `cu_seqlens` would synchronise with a GPU.
        memory_key: `[N, Hkv, M, D]`, or `[1, Hkv, M, D]` for one memory that all segments read. M may be 0. None for
            no memory.
        memory_value: Tensor of the shape of `memory_key`; None for no memory.
        memory_lengths: int32 or int64 `[N]`, numbers of memory tokens, the last ones, that the segments read; None
            for all of them.
        sinks: Attention sinks, `[Hq]`: logits that take part in the softmax and have no value; float32, or in the
            dtype of the query.
        scale: Factor of `q · k`; None for `D ** -0.5`.
        window: Number of keys of the segment that a query sees, its own included; None for all of them.
        softcap: c of `c * tanh(scale * q · k / c)`; None for no cap.
        return_lse: Also return the log-sum-exps.

    Returns:
        The output, `[total, Hq, D]` in the dtype of the query. With `return_lse` a tuple of it and the log-sum-exps,
        `[Hq, total]` in float32 (float64 for float64).

    Raises:
        TypeError: If a dtype is not supported, or dtypes differ.
        ValueError: If a shape, a device or a setting does not fit.
    """
    if query.dim() != 3:
        raise ValueError(f"query must be [total, Hq, D], got {list(query.shape)}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must be int32 [N + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if cu_seqlens.device != query.device:
        raise ValueError(f"cu_seqlens on {cu_seqlens.device} and query on {query.device} must be on one device")
    if type(max_seqlen) is not int or max_seqlen < 1:
        raise ValueError(f"max_seqlen must be an integer of at least 1, got {max_seqlen!r}")
    segments = len(cu_seqlens) - 1
    _check_tensors(query, key, value, memory_key, memory_value, segments=segments)
    if len(key) != len(query):
        raise ValueError(f"key has {len(key)} tokens and query {len(query)}: as many of both")
    on_host = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and (longest := int(cu_seqlens.diff().max())) > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, and a segment has {longest} tokens")
    lengths = _checked_lengths("memory_lengths", memory_lengths, query, segments, needs=memory_key)
    settings = _checked_settings(query, sinks, scale, window, softcap)
    ends = cu_seqlens.contiguous()
    output, lse = ops.memory_attention(
        query, key, value, memory_key, memory_value, lengths, None, ends, sinks, *settings, max_seqlen
    )
    return (output, lse) if return_lse else output


def memory_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_key: torch.Tensor | None = None,
    memory_value: torch.Tensor | None = None,
    *,
    lengths: torch.Tensor | None = None,
    memory_lengths: torch.Tensor | None = None,
    segment_starts: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend as `memory_attention` does, from one query or a few to a memory and a cache, split over the keys.

    The T queries are the last of the filled keys. Every row may have another length, and none of the lengths is known
    on the host, so the call can be captured in a CUDA graph. Not differentiable.

    Args:
        query: `[B, Hq, T, D]` in bfloat16, float16, float32 or float64; `Hq / Hkv * T` may be 64 at most.
        key: Keys of the cache, `[B, Hkv, S, D]`, those of the queries included; in the dtype and on the device of the
            query, as are all tensors whose description says nothing else.
        value: Values of the cache, `[B, Hkv, S, D]`.
        memory_key: `[B, Hkv, M, D]`, or `[1, Hkv, M, D]` for one memory that all rows read. M may be 0. None for no
            memory.
        memory_value: Tensor of the shape of `memory_key`; None for no memory.
        lengths: int32 or int64 `[B]`, numbers of keys of the cache that are filled, those of the queries included;
            None for all S.
        memory_lengths: int32 or int64 `[B]`, numbers of memory tokens, the last ones, that the rows read; None for
            all of them.
        segment_starts: int32 or int64 `[B]`. Keys of the cache before these positions are padding, and are not read.
            None for no padding.
        sinks: Attention sinks, `[Hq]`: logits that take part in the softmax and have no value; float32, or in the
            dtype of the query.
        scale: Factor of `q · k`; None for `D ** -0.5`.
        window: Number of keys of the cache that a query sees, its own included; None for all of them.
        softcap: c of `c * tanh(scale * q · k / c)`; None for no cap.
        return_lse: Also return the log-sum-exps.

    Returns:
        The output, `[B, Hq, T, D]` in the dtype of the query. With `return_lse` a tuple of it and the log-sum-exps,
        `[B, Hq, T]` in float32 (float64 for float64).

    Raises:
        TypeError: If a dtype is not supported, or dtypes differ.
        ValueError: If a shape, a device or a setting does not fit, or there are too many queries.
        RuntimeError: If gradients are on and a tensor requires one.
    """
    _check_tensors(query, key, value, memory_key, memory_value)
    tokens = query.shape[2]
    if key.shape[2] < tokens:
        raise ValueError(f"key has {key.shape[2]} tokens, fewer than the {tokens} queries that are among them")
    if query.shape[1] // key.shape[1] * tokens > MAX_DECODED:
        raise ValueError(
            f"{tokens} queries of {query.shape[1] // key.shape[1]} heads a key head: at most {MAX_DECODED} together; "
            "use memory_attention"
        )
    tensors = [t for t in (query, key, value, memory_key, memory_value, sinks) if t is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError("memory_decode has no gradient; use memory_attention, or torch.no_grad()")
    checked_memory_lengths = _checked_lengths("memory_lengths", memory_lengths, query, len(query), needs=memory_key)
    cache_lengths = _checked_lengths("lengths", lengths, query, len(query))
    starts = _checked_lengths("segment_starts", segment_starts, query, len(query))
    settings = _checked_settings(query, sinks, scale, window, softcap)
    output, lse = ops.memory_decode(
        query, key, value, memory_key, memory_value, checked_memory_lengths, cache_lengths, starts, sinks, *settings
    )
    return (output, lse) if return_lse else output


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def _check_tensors(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_key: torch.Tensor | None,
    memory_value: torch.Tensor | None,
    segments: int | None = None,
) -> None:
    """Raise where dtypes, devices or shapes do not fit.

    Args:
        query: As the calling function takes it; so are the other tensors.
        key: See `query`.
        value: See `query`.
        memory_key: See `query`.
        memory_value: See `query`.
        segments: Number of segments that lie one after the other; None where tensors have rows.
    """
    if (memory_key is None) != (memory_value is None):
        raise ValueError("memory_key and memory_value must both be given, or neither")
    if query.dtype not in DTYPES:
        raise TypeError(f"query must be bfloat16, float16, float32 or float64, got {query.dtype}")
    packed = segments is not None
    dims, rows = (4, len(query)) if segments is None else (3, segments)
    tensors = {"query": query, "key": key, "value": value, "memory_key": memory_key, "memory_value": memory_value}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, query {query.dtype}: all must have one dtype")
        if tensor.device != query.device:
            raise ValueError(f"{name} on {tensor.device} and query on {query.device} must be on one device")
        wanted = 4 if name.startswith("memory") else dims
        if tensor.dim() != wanted:
            raise ValueError(f"{name} must have {wanted} dimensions, got {list(tensor.shape)}")
        if tensor.shape[-1] != query.shape[-1]:
            raise ValueError(f"{name} has head_dim {tensor.shape[-1]}, query {query.shape[-1]}")
    if query.shape[-1] < 1:
        raise ValueError("head_dim must be at least 1")
    if key.shape != value.shape:
        raise ValueError(f"key {list(key.shape)} and value {list(value.shape)} must agree")
    if not packed and len(key) != rows:
        raise ValueError(f"key has {len(key)} rows and query {rows}")
    heads, key_heads = query.shape[1], key.shape[1]
    if key_heads == 0 or heads == 0 or heads % key_heads:
        raise ValueError(f"{heads} query heads must be a multiple of the {key_heads} key heads")
    if memory_key is not None and memory_value is not None:
        if memory_key.shape != memory_value.shape:
            raise ValueError(
                f"memory_key {list(memory_key.shape)} and memory_value {list(memory_value.shape)} must agree"
            )
        if memory_key.shape[0] not in (1, rows) or memory_key.shape[1] != key_heads:
            raise ValueError(f"memory_key must be [{rows} or 1, {key_heads}, M, D], got {list(memory_key.shape)}")


def _checked_lengths(
    name: str, lengths: torch.Tensor | None, query: torch.Tensor, rows: int, needs: object = True
) -> torch.Tensor | None:
    """Return lengths as a kernel takes them, int32 `[rows]`; None where there are none, or `needs` is None."""
    if lengths is None or needs is None:
        return None
    if lengths.dtype not in (torch.int32, torch.int64) or lengths.shape != (rows,) or lengths.device != query.device:
        raise ValueError(f"{name} must be int32 [{rows}] on {query.device}, got {_describe(lengths)}")
    return lengths.to(torch.int32).contiguous()


def _checked_settings(
    query: torch.Tensor, sinks: torch.Tensor | None, scale: float | None, window: int | None, softcap: float | None
) -> tuple[float, int, float]:
    """Check sinks and settings; return `(scale, window, softcap)` as the operators take them."""
    if sinks is not None:
        if sinks.dtype not in (torch.float32, query.dtype):
            raise TypeError(f"sinks must be float32 or {query.dtype}, got {sinks.dtype}")
        if sinks.shape != (query.shape[1],) or sinks.device != query.device:
            raise ValueError(f"sinks must be [{query.shape[1]}] on {query.device}, got {_describe(sinks)}")
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"window must be an integer of at least 1, or None, got {window!r}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be finite and above 0, or None, got {softcap!r}")
    return query.shape[-1] ** -0.5 if scale is None else float(scale), window or 0, float(softcap or 0.0)
