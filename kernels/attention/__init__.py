"""Memory-token attention: a segment's queries see a memory that is held elsewhere, and causally their own segment.

`reference.py` is the specification, formulas and sources stand there; `triton/` implements the same for GPUs. The
functions below validate and call the operators `torch.ops.r3mem.*`, which run one of the two
(`kernels/common/dispatch.py`), under autograd and `torch.compile`. Nothing is concatenated, no mask is made, and no
kernel is compiled anew when batch, tokens or memory change.

Everywhere: query `[B, Hq, T, D]`, key and value `[B, Hkv, S, D]`, memory_key and memory_value `[B, Hkv, M, D]`, or
`[1, Hkv, M, D]` for one memory that all rows read; all of one dtype (bfloat16, float16, float32, float64) and device;
`Hq` a multiple of `Hkv`; D up to 256. Keys carry their positions (rotary embeddings) already. M may be 0, and the
memory be left out.

    memory_lengths   int32 `[B]`: of each row the *last* so many memory keys are read (it is filled from its end)
    segment_starts   int32 `[B]`: keys of the segment before these are padding, and are not read
    sinks            `[Hq]`: logits that take part in the softmax and have no value (attention sinks); float32, or the
                     dtype of the query
    scale            of q · k; None: `D ** -0.5`
    window           a query sees the last so many keys of its segment, its own included; the memory always
    softcap          c of `c * tanh(scale * q · k / c)`
    return_lse       also return the logarithm of the softmax's denominator, sinks included: float32 `[B, Hq, T]`

A row that sees no key at all gives zeros, and -inf. All raise TypeError for dtypes and ValueError for shapes, devices
or settings that do not fit.
"""

import torch

from . import ops
from .reference import merge

__all__ = ["MAX_HEAD_DIM", "memory_attention", "memory_attention_varlen", "memory_decode", "merge"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256
MAX_DECODED = 64  # queries of a key head


def memory_attention(
    query,
    key,
    value,
    memory_key=None,
    memory_value=None,
    *,
    memory_lengths=None,
    segment_starts=None,
    sinks=None,
    scale=None,
    window=None,
    softcap=None,
    query_offset=0,
    return_lse=False,
):
    """Attention of a segment's queries to a memory and, causally, to the segment: `[B, Hq, T, D]`.

    query_offset: keys of the segment before the first query, so that `S = query_offset + T`: query i sees the keys up
    to `query_offset + i`. Arguments otherwise, and errors, as in the module's text. Differentiable once in all float
    tensors, the returned lse included; gradients are deterministic.
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
    query,
    key,
    value,
    cu_seqlens,
    max_seqlen,
    memory_key=None,
    memory_value=None,
    *,
    memory_lengths=None,
    sinks=None,
    scale=None,
    window=None,
    softcap=None,
    return_lse=False,
):
    """`memory_attention` of N segments of different lengths, one after the other: `[total, Hq, D]`.

    query `[total, Hq, D]`, key and value `[total, Hkv, D]`; cu_seqlens: int32 `[N + 1]`, where each segment starts,
    and the total; max_seqlen: the longest, an int (a larger one costs time, a smaller one leaves tokens out: it is not
    compared with cu_seqlens, which would synchronise). memory_key, memory_value `[N or 1, Hkv, M, D]`,
    memory_lengths `[N]`. lse: `[Hq, total]`. Otherwise as `memory_attention`.
    """
    if query.dim() != 3:
        raise ValueError(f"query must be [total, Hq, D], got {list(query.shape)}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must be int32 [N + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if cu_seqlens.device != query.device:
        raise ValueError(f"cu_seqlens on {cu_seqlens.device} and query on {query.device} must be on one device")
    if type(max_seqlen) is not int or max_seqlen < 1:
        raise ValueError(f"max_seqlen must be an integer of at least 1, got {max_seqlen!r}")
    rows = len(cu_seqlens) - 1
    _check_tensors(query, key, value, memory_key, memory_value, rows=rows)
    if len(key) != len(query):
        raise ValueError(f"key has {len(key)} tokens and query {len(query)}: as many of both")
    lengths = _checked_lengths("memory_lengths", memory_lengths, query, rows, needs=memory_key)
    settings = _checked_settings(query, sinks, scale, window, softcap)
    output, lse = ops.memory_attention(
        query,
        key,
        value,
        memory_key,
        memory_value,
        lengths,
        None,
        cu_seqlens.contiguous(),
        sinks,
        *settings,
        max_seqlen,
    )
    return (output, lse) if return_lse else output


def memory_decode(
    query,
    key,
    value,
    memory_key=None,
    memory_value=None,
    *,
    lengths=None,
    memory_lengths=None,
    segment_starts=None,
    sinks=None,
    scale=None,
    window=None,
    softcap=None,
    return_lse=False,
):
    """`memory_attention` for one query or a few, split over the keys: for decoding behind a memory and a cache.

    lengths: int32 `[B]`, keys of each row's cache that are filled, the queries' own included; None: all S. The T
    queries are the last of these, so that every row may have another length, and none of it is known on the host: it
    can be captured in a CUDA graph. `Hq / Hkv * T` may be 64 at most. Not differentiable: raises RuntimeError
    for tensors that require a gradient while gradients are on. Otherwise as `memory_attention`.
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
    of_memory = _checked_lengths("memory_lengths", memory_lengths, query, len(query), needs=memory_key)
    of_cache = _checked_lengths("lengths", lengths, query, len(query))
    starts = _checked_lengths("segment_starts", segment_starts, query, len(query))
    settings = _checked_settings(query, sinks, scale, window, softcap)
    output, lse = ops.memory_decode(
        query, key, value, memory_key, memory_value, of_memory, of_cache, starts, sinks, *settings
    )
    return (output, lse) if return_lse else output


def _describe(tensor):
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def _check_tensors(query, key, value, memory_key, memory_value, rows=None):
    """rows: of a memory, where there are other tensors than one a row."""
    if (memory_key is None) != (memory_value is None):
        raise ValueError("memory_key and memory_value must both be given, or neither")
    if query.dtype not in DTYPES:
        raise TypeError(f"query must be bfloat16, float16, float32 or float64, got {query.dtype}")
    packed = rows is not None
    dims, rows = (3, rows) if packed else (4, len(query))
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
    if not 1 <= query.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must lie in 1..{MAX_HEAD_DIM}, got {query.shape[-1]}")
    if key.shape != value.shape:
        raise ValueError(f"key {list(key.shape)} and value {list(value.shape)} must agree")
    if not packed and len(key) != rows:
        raise ValueError(f"key has {len(key)} rows and query {rows}")
    heads, shared = query.shape[1], key.shape[1]
    if shared == 0 or heads == 0 or heads % shared:
        raise ValueError(f"{heads} query heads must be a multiple of the {shared} key heads")
    if memory_key is not None:
        if memory_key.shape != memory_value.shape:
            raise ValueError(
                f"memory_key {list(memory_key.shape)} and memory_value {list(memory_value.shape)} must agree"
            )
        if memory_key.shape[0] not in (1, rows) or memory_key.shape[1] != shared:
            raise ValueError(f"memory_key must be [{rows} or 1, {shared}, M, D], got {list(memory_key.shape)}")


def _checked_lengths(name, lengths, query, rows, needs=True):
    """An int32 tensor `[rows]` for a kernel, or None."""
    if lengths is None or needs is None:
        return None
    if lengths.dtype not in (torch.int32, torch.int64) or lengths.shape != (rows,) or lengths.device != query.device:
        raise ValueError(f"{name} must be int32 [{rows}] on {query.device}, got {_describe(lengths)}")
    return lengths.to(torch.int32).contiguous()


def _checked_settings(query, sinks, scale, window, softcap):
    """`(scale, window, softcap)` as the operators take them."""
    if sinks is not None:
        if sinks.dtype not in (torch.float32, query.dtype):
            raise TypeError(f"sinks must be float32 or {query.dtype}, got {sinks.dtype}")
        if sinks.shape != (query.shape[1],) or sinks.device != query.device:
            raise ValueError(f"sinks must be [{query.shape[1]}] on {query.device}, got {_describe(sinks)}")
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"window must be an integer of at least 1, or None, got {window!r}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, or None, got {softcap!r}")
    return query.shape[-1] ** -0.5 if scale is None else float(scale), window or 0, float(softcap or 0.0)
