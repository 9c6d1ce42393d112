"""Memory-token attention: the specification, in plain PyTorch.

A query of a segment sees every key of a memory that is held elsewhere, and of its own segment the keys up to itself
(Bulatov et al. 2022 for memory tokens, read here in every layer). With queries q, keys k, values v, memory
keys and values k^M, v^M, and an optional logit s of an attention sink (Xiao et al. 2023; one a head, of a value 0):

    z_ij  = cap(scale * q_i · k_j)               over the visible j, memory first;  cap(z) = c tanh(z / c), or z
    lse_i = log(sum_j exp(z_ij) [+ exp(s)])
    o_i   = sum_j exp(z_ij - lse_i) v_j

A row that sees nothing gives o = 0 and lse = -inf. For gradients g^o of o and g^lse of lse (Dao et al. 2022, appendix
B.2; the second extends it to what is made of lse, a merge for one):

    p_ij  = exp(z_ij - lse_i)                    delta_i = g^o_i · o_i - g^lse_i
    g^z   = p_ij (g^o_i · v_j - delta_i)         g^s     = g^z_ij cap'(...) = g^z_ij (1 - (z_ij / c)^2)
    g^q_i = scale sum_j g^s_ij k_j               g^k_j   = scale sum_i g^s_ij q_i
    g^v_j = sum_i p_ij g^o_i                     g^sink  = -sum_i exp(s - lse_i) delta_i

and where query heads share a key head, or rows a memory, gradients of these are summed.

Two softmaxes over different keys of the same queries make one (`merge`):

    lse = log(exp(lse_a) + exp(lse_b)),   o = exp(lse_a - lse) o_a + exp(lse_b - lse) o_b

Shapes: query `[B, Hq, T, D]`, key and value `[B, Hkv, S, D]`, memory_key and memory_value `[B or 1, Hkv, M, D]`, lse
`[B, Hq, T]`. The softmax is computed in float32 (float64 for float64).
"""

import torch


def memory_attention(
    query,
    key,
    value,
    memory_key,
    memory_value,
    memory_lengths,
    segment_starts,
    sinks,
    *,
    scale,
    window,
    softcap,
    offsets,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(o, lse)`: o in the dtype of the query, lse in float32 (float64 for float64).

    key, value: None for a pass over the memory alone. memory_key, memory_value: None: no memory. memory_lengths: int
    `[B]`, of each row the last so many memory keys are visible; None: all. segment_starts: int `[B]`, keys of the
    segment before these are not; None: all. sinks: `[Hq]`, or None. window: the last so many keys of the segment, the
    query's own included; None: all. softcap: c, or None. offsets: position of the first query among the segment's
    keys, an int, or int `[B]`. Differentiable.
    """
    visible = _visible(query, key, memory_key, memory_lengths, segment_starts, window=window, offsets=offsets)
    keys, values = (_joined(*pair, visible) for pair in ((memory_key, key), (memory_value, value)))
    logits = scale * _by_head(_by_key_head(_wide(query), keys) @ keys.transpose(-1, -2), query)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.to(logits.dtype)[None, :, None, None].expand(*logits.shape[:-1], 1)
        lse = torch.cat([logits, column], -1).logsumexp(-1)
    elif logits.shape[-1]:
        lse = logits.logsumexp(-1)
    else:
        lse = logits.new_full(logits.shape[:-1], -torch.inf)
    output = _by_head(_by_key_head(_weights(logits, lse, visible), keys) @ values, query)
    return output.to(query.dtype), lse


def memory_attention_backward(
    grad_output,
    grad_lse,
    query,
    key,
    value,
    memory_key,
    memory_value,
    memory_lengths,
    segment_starts,
    sinks,
    output,
    lse,
    *,
    scale,
    window,
    softcap,
    offsets,
):
    """`(g^q, g^k, g^v, g^(k^M), g^(v^M), g^sink)`, each in the dtype of its tensor, or None where that is None.

    grad_output, grad_lse: of `output` and `lse`, results of `memory_attention` with the other arguments; grad_lse may
    be None. output and lse may also be those of a merge with other keys: gradients are those of these keys then.
    """
    visible = _visible(query, key, memory_key, memory_lengths, segment_starts, window=window, offsets=offsets)
    keys, values = (_joined(*pair, visible) for pair in ((memory_key, key), (memory_value, value)))
    wide, grad = _by_key_head(_wide(query), keys), _by_key_head(_wide(grad_output), keys)
    logits = scale * _by_head(wide @ keys.transpose(-1, -2), query)
    slope = None
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
        slope = 1 - (logits / softcap) ** 2
    weights = _weights(logits, lse, visible)
    delta = (_wide(grad_output) * _wide(output)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    grad_logits = weights * (_by_head(grad @ values.transpose(-1, -2), query) - delta[..., None])
    if slope is not None:
        grad_logits = grad_logits * slope
    grad_logits, weights = _by_key_head(grad_logits, keys), _by_key_head(weights, keys)
    grad_query = scale * _by_head(grad_logits @ keys, query)
    grad_keys, grad_values = scale * (grad_logits.transpose(-1, -2) @ wide), weights.transpose(-1, -2) @ grad
    count = 0 if memory_key is None else memory_key.shape[2]
    found = [grad_query.to(query.dtype)]
    for tensor, grads in ((key, grad_keys[:, :, count:]), (value, grad_values[:, :, count:])):
        found.append(None if tensor is None else grads.to(tensor.dtype))
    for tensor, grads in ((memory_key, grad_keys[:, :, :count]), (memory_value, grad_values[:, :, :count])):
        shared = tensor is not None and len(tensor) < len(grads)
        grads = grads.sum(0, keepdim=True) if shared else grads
        found.append(None if tensor is None else grads.to(tensor.dtype))
    found.append(None if sinks is None else grad_of_sinks(sinks, lse, delta))
    return tuple(found)


def grad_of_sinks(sinks, lse, delta):
    """g^sink, `[Hq]`. lse, delta: `[B, Hq, T]`."""
    return -(torch.exp(sinks.to(lse.dtype)[None, :, None] - lse) * delta).sum((0, 2)).to(sinks.dtype)


def merge(output_a, lse_a, output_b, lse_b):
    """`(o, lse)` of both sets of keys together. Differentiable."""
    largest = torch.maximum(lse_a, lse_b).detach()
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    weight_a, weight_b = torch.exp(lse_a - largest), torch.exp(lse_b - largest)
    total = weight_a + weight_b
    some = total.masked_fill(total == 0, 1.0)  # a row that sees nothing at all
    mixed = (weight_a / some)[..., None] * output_a + (weight_b / some)[..., None] * output_b
    return mixed.to(output_a.dtype), torch.log(some).masked_fill(total == 0, -torch.inf) + largest


def _wide(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _joined(memory, own, visible):
    """Keys or values of memory and segment, `[B, Hkv, M + S, D]`, in float32 or wider; 0 what no query sees."""
    parts = [_wide(part).expand(len(visible), -1, -1, -1) for part in (memory, own) if part is not None]
    # It may be NaN, which 0 times it would be too.
    return torch.cat(parts, 2).masked_fill(~visible.any(2)[..., None], 0.0)


def _by_key_head(tensor, keys):
    """`[B, Hq, T, n]` as `[B, Hkv, Hq / Hkv * T, n]`: one matrix for all queries that share a key head."""
    rows, heads, tokens, size = tensor.shape
    return tensor.reshape(rows, keys.shape[1], heads // keys.shape[1] * tokens, size)


def _by_head(tensor, query):
    """The inverse."""
    return tensor.reshape(*query.shape[:3], tensor.shape[-1])


def _weights(logits, lse, visible):
    # exp(z + inf) of a row that sees nothing.
    return torch.where(visible, torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]), 0.0)


def _visible(query, key, memory_key, memory_lengths, segment_starts, *, window, offsets):
    """Which keys each query sees: bool `[B, 1, T, M + S]`."""
    device, tokens = query.device, query.shape[2]
    parts = []
    if memory_key is not None:
        count = memory_key.shape[2]
        seen = torch.ones(1, count, dtype=torch.bool, device=device)
        if memory_lengths is not None:
            seen = torch.arange(count, device=device) >= count - memory_lengths[:, None]
        parts.append(seen[:, None, None].expand(-1, 1, tokens, -1))
    if key is not None:
        places = torch.arange(key.shape[2], device=device)
        first = torch.as_tensor(offsets, device=device).reshape(-1, 1, 1)
        own = torch.arange(tokens, device=device)[:, None] + first
        seen = places <= own
        if window is not None:
            seen = seen & (places > own - window)
        if segment_starts is not None:
            seen = seen & (places >= segment_starts[:, None, None])
        parts.append(seen[:, None])
    return torch.cat([part.expand(len(query), -1, -1, -1) for part in parts], -1)


def padded(tensor, cu_seqlens, max_seqlen):
    """Sequences `[total, H, ...]`, one after the other, as rows padded on the right: `[N, H, max_seqlen, ...]`."""
    places, inside = _places(cu_seqlens, max_seqlen)
    rows = (
        tensor[places.clamp_max(len(tensor) - 1)]
        if len(tensor)
        else tensor.new_zeros(*places.shape, *tensor.shape[1:])
    )
    rows = torch.where(inside.view(*inside.shape, *(1,) * (tensor.dim() - 1)), rows, 0)
    return rows.transpose(1, 2)


def packed(rows, cu_seqlens, total):
    """The inverse: `[N, H, max_seqlen, ...]` to `[total, H, ...]`."""
    places, inside = _places(cu_seqlens, rows.shape[2])
    rows = rows.transpose(1, 2)
    found = rows.new_zeros(total, *rows.shape[2:])
    return found.index_put((places[inside],), rows[inside])


def _places(cu_seqlens, max_seqlen):
    """Where the tokens of padded rows lie, int64 `[N, max_seqlen]`, and which of them are any."""
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    places = starts + torch.arange(max_seqlen, device=cu_seqlens.device)
    return places, places < ends
