"""Attention Matching: a long prefix of keys and values becomes few of its keys, with new values.

`reference.py` is the specification, where formulas and their sources stand; `triton/` implements it for GPUs. The
functions below validate their arguments and call the operators `torch.ops.r3mem.matching_*`, which run one of the two
(`kernels/common/dispatch.py`). `attention_scores` says which keys count and what attention to all of them gives;
`value_system` makes the normal equations of the values with which the kept keys give the same, and says how much of
the softmax's mass they have.

Shapes: B is the number of rows (batch items; layers may be rows, too), H and KV the numbers of query and key heads (H
a multiple of KV), n, S and t the numbers of queries, keys and kept keys, and D the head_dim (up to `MAX_HEAD_DIM` for
Triton's kernels). Keys and queries already carry their positions (rotary embeddings); positions here only say who sees
whom. They hold no matrix of queries by keys, results are the same at every run, and nothing is differentiable.
"""

import math

import torch

from ..common.compat import MAX_HEAD_DIM
from . import ops

__all__ = ["MAX_HEAD_DIM", "MAX_KEPT", "attention_scores", "value_system"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_KEPT = 1024


def attention_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score every key by the squared attention that it gets, and give what the attention to all keys is.

    A query sees every existing key whose position is not above its own, and with a window only the near ones. The
    formulas are in `reference.py`.

    Args:
        query: `[B, H, n, D]` in bfloat16, float16, float32 or float64.
        key: `[B, KV, S, D]`, in the dtype and on the device of the query; so are all tensors whose description says
            nothing else.
        value: `[B, KV, S, D]`.
        query_positions: int32 `[B, n]`; negative where a query does not exist. What is stored there is not read.
        key_positions: int32 `[B, KV, S]`; negative where a key does not exist. What is stored there is not read.
        scale: Factor of `q · k`; None for `D ** -0.5`.
        softcap: c of `c * tanh(scale * q · k / c)`; None for no cap.
        sinks: Attention sinks, `[H]`: logits that take part in the softmax and have no value; float32, or in the
            dtype of the query.
        window: A query at position p sees the keys at the positions above `p - window` alone; None for all.

    Returns:
        `(scores, lse, output)` in float32 (float64 for float64). scores: `[B, KV, S]`, the sum of the squared weights
        of a key over all existing queries of the heads that share it, 0 for keys that do not exist. lse: `[B, H, n]`,
        logarithm of the softmax's denominator, sinks included. output: `[B, H, n, D]`, the attention to all keys. A
        query that does not exist or sees no key has an lse of -inf and an output of zeros, even where there are
        sinks.

    Raises:
        TypeError: If a dtype is not supported, or dtypes differ.
        ValueError: If a shape, a device or a setting does not fit.
        RuntimeError: If gradients are on and a tensor requires one.
    """
    _check_tensors(query, key, value, query_positions, key_positions)
    _check_no_gradient("attention_scores", query, key, value, sinks)
    settings = _checked_settings(query, sinks, scale, window, softcap)
    return ops.attention_scores(query, key, value, query_positions, key_positions, sinks, *settings)


def value_system(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    target: torch.Tensor,
    *,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make the normal equations of the values with which attention to the kept keys gives the target.

    With `change` from `(gram + ridge) change = residual`, `value + change` are these values. The formulas are in
    `reference.py`.

    Args:
        query: `[B, H, n, D]` in bfloat16, float16, float32 or float64.
        key: The kept keys, `[B, KV, t, D]`, in the dtype and on the device of the query; so are all tensors whose
            description says nothing else. t may be `MAX_KEPT` at most.
        value: The values that they have, `[B, KV, t, D]`.
        target: What attention to all keys gave, `[B, H, n, D]` in float32 (float64 for float64): the output of
            `attention_scores`.
        query_positions: int32 `[B, n]`; negative where a query does not exist. What is stored there is not read.
        key_positions: int32 `[B, KV, t]`; negative where a key does not exist. What is stored there is not read.
        scale: Factor of `q · k`; None for `D ** -0.5`.
        softcap: c of `c * tanh(scale * q · k / c)`; None for no cap.
        sinks: Attention sinks, `[H]`: logits that take part in the softmax and have no value; float32, or in the
            dtype of the query.
        window: A query at position p sees the keys at the positions above `p - window` alone; None for all.

    Returns:
        `(gram, residual, lse)` in float32 (float64 for float64), of the attention weights X of all existing queries of
        the heads that share a key head. gram: `X^T X`, `[B, KV, t, t]`. residual: `X^T (target - X value)`,
        `[B, KV, t, D]`. Rows and columns of keys that do not exist are zeros. lse: `[B, H, n]`, that of
        `attention_scores` over the kept keys.

    Raises:
        TypeError: If a dtype is not supported, or dtypes differ.
        ValueError: If a shape, a device or a setting does not fit, or there are too many keys.
        RuntimeError: If gradients are on and a tensor requires one.
    """
    _check_tensors(query, key, value, query_positions, key_positions)
    wanted = torch.promote_types(query.dtype, torch.float32)
    if target.dtype != wanted:
        raise TypeError(f"target must be {wanted} for a query in {query.dtype}, got {target.dtype}")
    if target.shape != query.shape or target.device != query.device:
        raise ValueError(f"target must be {list(query.shape)} on {query.device}, got {_describe(target)}")
    if key.shape[2] > MAX_KEPT:
        raise ValueError(f"{key.shape[2]} kept keys: at most {MAX_KEPT}")
    _check_no_gradient("value_system", query, key, value, target, sinks)
    settings = _checked_settings(query, sinks, scale, window, softcap)
    return ops.value_system(query, key, value, target, query_positions, key_positions, sinks, *settings)


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def _check_tensors(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
) -> None:
    """Raise TypeError or ValueError where dtypes, devices or shapes do not fit."""
    if query.dtype not in DTYPES:
        raise TypeError(f"query must be bfloat16, float16, float32 or float64, got {query.dtype}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, query {query.dtype}: all must have one dtype")
        if tensor.device != query.device:
            raise ValueError(f"{name} on {tensor.device} and query on {query.device} must be on one device")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got {list(tensor.shape)}")
    if key.shape != value.shape:
        raise ValueError(f"key {list(key.shape)} and value {list(value.shape)} must agree")
    if len(key) != len(query):
        raise ValueError(f"key has {len(key)} rows and query {len(query)}")
    head_dim = query.shape[-1]
    if key.shape[-1] != head_dim:
        raise ValueError(f"key has head_dim {key.shape[-1]}, query {head_dim}")
    if head_dim < 1:
        raise ValueError("head_dim must be at least 1")
    heads, key_heads = query.shape[1], key.shape[1]
    if key_heads == 0 or heads == 0 or heads % key_heads:
        raise ValueError(f"{heads} query heads must be a multiple of the {key_heads} key heads")
    _check_positions("query_positions", query_positions, query, (len(query), query.shape[2]))
    _check_positions("key_positions", key_positions, query, tuple(key.shape[:3]))


def _check_positions(name: str, positions: torch.Tensor, query: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise TypeError or ValueError unless positions are int32, of this shape, and on the device of the query."""
    if positions.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {positions.dtype}")
    if tuple(positions.shape) != shape or positions.device != query.device:
        raise ValueError(f"{name} must be {list(shape)} on {query.device}, got {_describe(positions)}")


def _check_no_gradient(name: str, *tensors: torch.Tensor | None) -> None:
    """Raise RuntimeError if a gradient is wanted."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{name} has no gradient; detach its tensors, or use torch.no_grad()")


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
    # Positions are int32, so that a longer window sees no more.
    window = min(window or 0, 2**31 - 1)
    return query.shape[-1] ** -0.5 if scale is None else float(scale), window, float(softcap or 0.0)
