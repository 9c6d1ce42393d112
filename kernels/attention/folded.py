"""Attention on a CPU where all queries of a row see the same keys: one in decoding, or any with a memory alone.

Query heads that share a key head are then more queries of one head, so that PyTorch's kernel reads each key once. It
would else have to be given the keys repeated for every query head, which takes longer than the attention itself.
"""

import torch

from . import reference
from .arguments import AttentionInputs, AttentionSettings

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def why_not(inputs: AttentionInputs, settings: AttentionSettings) -> str | None:
    """Say why these queries cannot be folded.

    Args:
        inputs: Tensors of the attention.
        settings: Its settings; `query_offset` does not matter.

    Returns:
        The reason in a few words, or None if they can.
    """
    query, key, memory = inputs.query, inputs.key, inputs.memory_key
    keys = sum(0 if tensor is None else tensor.shape[2] for tensor in (key, memory))
    reasons = {
        f"the device type {query.device.type!r}": query.device.type != "cpu",
        "sequences of different lengths": inputs.cu_seqlens is not None,
        "several queries of a segment": key is not None and query.shape[2] > 1,
        "a softcap": settings.softcap is not None,
        "nothing": not (query.numel() and keys),
    }
    return next((f"not for {name}" for name, found in reasons.items() if found), None)


def memory_attention(inputs: AttentionInputs, settings: AttentionSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `(o, lse)` as `reference.memory_attention` does.

    Args:
        inputs: Tensors of the attention, for which `why_not` must return None.
        settings: Its settings; `query_offset` may be an integer tensor `[B]`.

    Returns:
        The output, `[B, Hq, T, D]`, and the log-sum-exps, `[B, Hq, T]`.
    """
    query, parts = inputs.query, []
    if inputs.key is not None:
        own = inputs._replace(memory_key=None, memory_value=None)
        offset = settings.query_offset
        bounded = inputs.segment_starts is not None or settings.window is not None
        bounded = bounded or isinstance(offset, torch.Tensor) or offset != inputs.key.shape[2] - 1
        visible = reference.visible_keys(own, settings) if bounded else None
        parts.append(_read(query, inputs.key, inputs.value, visible, settings.scale))
    if inputs.memory_key is not None and inputs.memory_key.shape[2]:
        alone = inputs._replace(query=query[:, :, :1], key=None, value=None)
        visible = None if inputs.memory_lengths is None else reference.visible_keys(alone, settings)
        parts.append(_read(query, inputs.memory_key, inputs.memory_value, visible, settings.scale))
    output, lse = parts[0]
    if inputs.sinks is not None:  # keys of these logits with values of 0
        parts.append((torch.zeros_like(query), inputs.sinks.to(lse.dtype)[None, :, None].expand(query.shape[:3])))
    for part in parts[1:]:
        output, lse = reference.merge(output.to(lse.dtype), lse, *part)
    return output.to(query.dtype), lse  # what is merged is rounded once


def _read(query, key, value, visible, scale):
    """Attend from all queries to the same keys; visible: bool `[B, 1, 1, S]`, None for all."""
    rows, heads, tokens, width = query.shape
    hidden = None
    if visible is not None:
        hidden = ~visible
        # What no query sees may be NaN, and a weight of 0 times NaN is NaN, too.
        key, value = (some.masked_fill(hidden[:, :, 0, :, None], 0.0) for some in (key, value))
        bias = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill(hidden, -torch.inf)
    folded = query.reshape(rows, key.shape[1], -1, width)
    if len(key) == 1 < rows:  # one memory for all rows: these are more queries, too
        folded = folded.transpose(0, 1).reshape(1, key.shape[1], -1, width)
    key, value = (some if some.stride(-1) == 1 else some.contiguous() for some in (key, value))
    output, lse = _flash(folded, key, value, 0.0, False, attn_mask=None if hidden is None else bias, scale=scale)
    if len(folded) < rows:
        output, lse = (some.reshape(key.shape[1], rows, -1).transpose(0, 1) for some in (output[0], lse[0]))
    output, lse = output.reshape(query.shape), lse.reshape(rows, heads, tokens)
    if hidden is not None:
        lse = lse.masked_fill(hidden.all(-1), -torch.inf)
    return output, lse
