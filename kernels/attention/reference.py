"""Memory-token attention: the specification, in plain PyTorch.

A query of a segment sees every key of a memory that is held elsewhere, and of its own segment the keys up to itself
(Bulatov et al. 2022 for memory tokens, read here in every layer). With queries q, keys k, values v, memory
keys and values k^M, v^M, and an optional logit s of an attention sink (Xiao et al. 2023; one a head, of a value 0):

    z_ij  = cap(scale * q_i · k_j)               over the visible j, memory first;  cap(z) = c tanh(z / c), or z
    lse_i = log(sum_j exp(z_ij) [+ exp(s)])
    o_i   = sum_j exp(z_ij - lse_i) v_j

A query that sees nothing gives o = 0 and lse = -inf. For gradients g^o of o and g^lse of lse (Dao et al. 2022,
appendix B.2; g^lse extends it to what is made of lse, such as a merge):

    p_ij  = exp(z_ij - lse_i)                    delta_i = g^o_i · o_i - g^lse_i
    g^z   = p_ij (g^o_i · v_j - delta_i)         g^s     = g^z_ij cap'(...) = g^z_ij (1 - (z_ij / c)^2)
    g^q_i = scale sum_j g^s_ij k_j               g^k_j   = scale sum_i g^s_ij q_i
    g^v_j = sum_i p_ij g^o_i                     g^sink  = -sum_i exp(s - lse_i) delta_i

Where query heads share a key head, or rows a memory, the gradients of these are summed.

Two softmaxes over different keys of the same queries make one (`merge`):

    lse = log(exp(lse_a) + exp(lse_b)),   o = exp(lse_a - lse) o_a + exp(lse_b - lse) o_b

Shapes: query `[B, Hq, T, D]`, key and value `[B, Hkv, S, D]`, memory_key and memory_value `[B or 1, Hkv, M, D]`, lse
`[B, Hq, T]`. The softmax is computed in float32 (float64 for float64). Sequences of different lengths, one after the
other, are padded to rows first.
"""

import torch

from .arguments import AttentionInputs, AttentionSettings


def memory_attention(inputs: AttentionInputs, settings: AttentionSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `(o, lse)` by the formulas above. Differentiable.

    Args:
        inputs: Tensors of the attention.
        settings: Its settings; `query_offset` may be an integer tensor `[B]`.

    Returns:
        o, of the shape and dtype of the query, and lse, `[B, Hq, T]` in float32 (float64 for float64). With
        `cu_seqlens`, `[total, Hq, D]` and `[Hq, total]`.
    """
    if inputs.cu_seqlens is not None:
        output, lse = memory_attention(*_with_padded_sequences(inputs, settings))
        total = len(inputs.query)
        output, lse = (pack_sequences(tensor, inputs.cu_seqlens, total) for tensor in (output, lse))
        return output, lse.transpose(0, 1)
    query = inputs.query
    visible = visible_keys(inputs, settings)
    keys, values = _joined_keys_and_values(inputs, visible)
    logits = settings.scale * _by_head(_by_key_head(_wide(query), keys) @ keys.transpose(-1, -2), query)
    if settings.softcap is not None:
        logits = settings.softcap * torch.tanh(logits / settings.softcap)
    logits = logits.masked_fill(~visible, -torch.inf)
    if inputs.sinks is not None:
        column = inputs.sinks.to(logits.dtype)[None, :, None, None].expand(*logits.shape[:-1], 1)
        lse = torch.cat([logits, column], -1).logsumexp(-1)
    elif logits.shape[-1]:
        lse = logits.logsumexp(-1)
    else:
        lse = logits.new_full(logits.shape[:-1], -torch.inf)
    output = _by_head(_by_key_head(_weights(logits, lse, visible), keys) @ values, query)
    return output.to(query.dtype), lse


def memory_attention_backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    inputs: AttentionInputs,
    output: torch.Tensor,
    lse: torch.Tensor,
    settings: AttentionSettings,
) -> tuple[torch.Tensor | None, ...]:
    """Compute the gradients by the formulas above.

    Args:
        grad_output: Gradient of the output, of its shape.
        grad_lse: Gradient of lse, of its shape; None for zeros.
        inputs: Tensors of the attention.
        output: What `memory_attention` returned. Output and lse may also be those of a merge with other keys; then
            the gradients are those of the keys given here.
        lse: What `memory_attention` returned.
        settings: Settings of the attention; `query_offset` may be an integer tensor `[B]`.

    Returns:
        `(g^q, g^k, g^v, g^(k^M), g^(v^M), g^sink)`, each of the shape and dtype of its tensor, or None where the
        tensor is None.
    """
    if inputs.cu_seqlens is not None:
        return _backward_of_sequences(grad_output, grad_lse, inputs, output, lse, settings)
    query, key, value, memory_key, memory_value = inputs[:5]
    visible = visible_keys(inputs, settings)
    keys, values = _joined_keys_and_values(inputs, visible)
    wide, grad = _by_key_head(_wide(query), keys), _by_key_head(_wide(grad_output), keys)
    logits = settings.scale * _by_head(wide @ keys.transpose(-1, -2), query)
    slope = None
    if settings.softcap is not None:
        logits = settings.softcap * torch.tanh(logits / settings.softcap)
        slope = 1 - (logits / settings.softcap) ** 2
    weights = _weights(logits, lse, visible)
    delta = (_wide(grad_output) * _wide(output)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    grad_logits = weights * (_by_head(grad @ values.transpose(-1, -2), query) - delta[..., None])
    if slope is not None:
        grad_logits = grad_logits * slope
    grad_logits, weights = _by_key_head(grad_logits, keys), _by_key_head(weights, keys)
    grad_query = settings.scale * _by_head(grad_logits @ keys, query)
    grad_keys, grad_values = settings.scale * (grad_logits.transpose(-1, -2) @ wide), weights.transpose(-1, -2) @ grad
    count = 0 if memory_key is None else memory_key.shape[2]
    found: list[torch.Tensor | None] = [grad_query.to(query.dtype)]
    for tensor, grads in ((key, grad_keys[:, :, count:]), (value, grad_values[:, :, count:])):
        found.append(None if tensor is None else grads.to(tensor.dtype))
    for tensor, grads in ((memory_key, grad_keys[:, :, :count]), (memory_value, grad_values[:, :, :count])):
        shared = tensor is not None and len(tensor) < len(grads)
        grads = grads.sum(0, keepdim=True) if shared else grads
        found.append(None if tensor is None else grads.to(tensor.dtype))
    found.append(None if inputs.sinks is None else grad_of_sinks(inputs.sinks, lse, delta))
    return tuple(found)


def grad_of_sinks(sinks: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Compute g^sink by the formula above.

    Args:
        sinks: `[Hq]`.
        lse: `[B, Hq, T]`.
        delta: `[B, Hq, T]`.

    Returns:
        g^sink, `[Hq]`, in the dtype of the sinks.
    """
    weights = torch.exp(sinks.to(lse.dtype)[None, :, None] - lse)
    weights = weights.masked_fill(lse == -torch.inf, 0.0)  # sinks of -inf where a query sees nothing else
    return -(weights * delta).sum((0, 2)).to(sinks.dtype)


def merge(
    output_a: torch.Tensor, lse_a: torch.Tensor, output_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attentions of the same queries to two different sets of keys. Differentiable.

    The formula is given in the description of `reference.py`.

    Args:
        output_a: Output for the first set of keys, `[B, Hq, T, D]`.
        lse_a: Log-sum-exps for the first set of keys, `[B, Hq, T]`.
        output_b: Output for the second set of keys, `[B, Hq, T, D]`.
        lse_b: Log-sum-exps for the second set of keys, `[B, Hq, T]`.

    Returns:
        `(o, lse)` of the attention to both sets together; o in the dtype of `output_a`.
    """
    largest = torch.maximum(lse_a, lse_b).detach()
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    weight_a, weight_b = torch.exp(lse_a - largest), torch.exp(lse_b - largest)
    total = weight_a + weight_b
    divisor = total.masked_fill(total == 0, 1.0)  # 0 for a query that sees nothing at all
    mixed = (weight_a / divisor)[..., None] * output_a + (weight_b / divisor)[..., None] * output_b
    return mixed.to(output_a.dtype), torch.log(divisor).masked_fill(total == 0, -torch.inf) + largest


def visible_keys(inputs: AttentionInputs, settings: AttentionSettings) -> torch.Tensor:
    """Find which keys each query sees, memory first.

    Args:
        inputs: Tensors of the attention, without `cu_seqlens`. Of their values only those of `memory_lengths` and
            `segment_starts` matter.
        settings: Its settings; `query_offset` may be an integer tensor `[B]`.

    Returns:
        bool `[B, 1, T, M + S]`.
    """
    query, device, tokens = inputs.query, inputs.query.device, inputs.query.shape[2]
    parts = []
    if inputs.memory_key is not None:
        count = inputs.memory_key.shape[2]
        seen = torch.ones(1, count, dtype=torch.bool, device=device)
        if inputs.memory_lengths is not None:
            seen = torch.arange(count, device=device) >= count - inputs.memory_lengths[:, None]
        parts.append(seen[:, None, None].expand(-1, 1, tokens, -1))
    if inputs.key is not None:
        key_positions = torch.arange(inputs.key.shape[2], device=device)
        first = torch.as_tensor(settings.query_offset, device=device).reshape(-1, 1, 1)
        query_positions = torch.arange(tokens, device=device)[:, None] + first
        seen = key_positions <= query_positions
        if settings.window is not None:
            seen = seen & (key_positions > query_positions - settings.window)
        if inputs.segment_starts is not None:
            seen = seen & (key_positions >= inputs.segment_starts[:, None, None])
        parts.append(seen[:, None])
    return torch.cat([part.expand(len(query), -1, -1, -1) for part in parts], -1)


def pad_sequences(tensor: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int) -> torch.Tensor:
    """Pad sequences that lie one after the other to rows, on the right and with zeros.

    Args:
        tensor: `[total, H, ...]`.
        cu_seqlens: int32 `[N + 1]`, where each sequence starts, and the total.
        max_seqlen: Length of the longest sequence.

    Returns:
        `[N, H, max_seqlen, ...]`.
    """
    positions, inside = _token_positions(cu_seqlens, max_seqlen)
    rows = (
        tensor[positions.clamp_max(len(tensor) - 1)]
        if len(tensor)
        else tensor.new_zeros(*positions.shape, *tensor.shape[1:])
    )
    rows = torch.where(inside.view(*inside.shape, *(1,) * (tensor.dim() - 1)), rows, 0)
    return rows.transpose(1, 2)


def pack_sequences(rows: torch.Tensor, cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """Put padded rows one after the other, without their padding: the inverse of `pad_sequences`.

    Args:
        rows: `[N, H, max_seqlen, ...]`.
        cu_seqlens: int32 `[N + 1]`, where each sequence starts, and the total.
        total: Number of tokens of the result; those that belong to no sequence are zeros.

    Returns:
        `[total, H, ...]`.
    """
    positions, inside = _token_positions(cu_seqlens, rows.shape[2])
    rows = rows.transpose(1, 2)
    found = rows.new_zeros(total, *rows.shape[2:])
    return found.index_put((positions[inside],), rows[inside])


def _token_positions(cu_seqlens: torch.Tensor, max_seqlen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find where the tokens of padded rows lie in packed ones, int64 `[N, max_seqlen]`, and which are no padding."""
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    positions = starts + torch.arange(max_seqlen, device=cu_seqlens.device)
    return positions, positions < ends


def _with_padded_sequences(
    inputs: AttentionInputs, settings: AttentionSettings
) -> tuple[AttentionInputs, AttentionSettings]:
    """Make rows of sequences, padded on the right, where no query of a sequence sees the padding."""
    cu_seqlens, max_seqlen = _sequences(inputs, settings)
    query, key, value = (
        None if tensor is None else pad_sequences(tensor, cu_seqlens, max_seqlen) for tensor in inputs[:3]
    )
    assert query is not None
    rows = inputs._replace(query=query, key=key, value=value, cu_seqlens=None)
    return rows, settings._replace(query_offset=0, max_seqlen=None)


def _sequences(inputs: AttentionInputs, settings: AttentionSettings) -> tuple[torch.Tensor, int]:
    """Return cu_seqlens and max_seqlen, of inputs that have them."""
    assert inputs.cu_seqlens is not None and settings.max_seqlen is not None
    return inputs.cu_seqlens, settings.max_seqlen


def _backward_of_sequences(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    inputs: AttentionInputs,
    output: torch.Tensor,
    lse: torch.Tensor,
    settings: AttentionSettings,
) -> tuple[torch.Tensor | None, ...]:
    """Compute the gradients for sequences by those for padded rows."""
    cu_seqlens, max_seqlen = _sequences(inputs, settings)

    def pad_by_head(tensor: torch.Tensor) -> torch.Tensor:
        return pad_sequences(tensor.transpose(0, 1), cu_seqlens, max_seqlen)

    rows, settings = _with_padded_sequences(inputs, settings)
    grads = memory_attention_backward(
        pad_sequences(grad_output, cu_seqlens, max_seqlen),
        None if grad_lse is None else pad_by_head(grad_lse),
        rows,
        pad_sequences(output, cu_seqlens, max_seqlen),
        pad_by_head(lse),
        settings,
    )
    own = (None if grad is None else pack_sequences(grad, cu_seqlens, len(inputs.query)) for grad in grads[:3])
    return (*own, *grads[3:])


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Convert to float32, or leave float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _joined_keys_and_values(inputs: AttentionInputs, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Concatenate memory and segment, `[B, Hkv, M + S, D]` in float32 or wider, with 0 for what no query sees."""
    unseen = ~visible.any(2)[..., None]

    def join(memory: torch.Tensor | None, own: torch.Tensor | None) -> torch.Tensor:
        parts = [_wide(part).expand(len(visible), -1, -1, -1) for part in (memory, own) if part is not None]
        # What no query sees may be NaN, and a weight of 0 times NaN is NaN too.
        return torch.cat(parts, 2).masked_fill(unseen, 0.0)

    return join(inputs.memory_key, inputs.key), join(inputs.memory_value, inputs.value)


def _by_key_head(tensor: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """View `[B, Hq, T, n]` as `[B, Hkv, Hq / Hkv * T, n]`: one matrix for all queries that share a key head."""
    rows, heads, tokens, size = tensor.shape
    return tensor.reshape(rows, keys.shape[1], heads // keys.shape[1] * tokens, size)


def _by_head(tensor: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """View `[B, Hkv, Hq / Hkv * T, n]` as `[B, Hq, T, n]`: the inverse of `_by_key_head`."""
    return tensor.reshape(*query.shape[:3], tensor.shape[-1])


def _weights(logits: torch.Tensor, lse: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Compute p of the formulas above."""
    # A query that sees nothing has lse = -inf, and exp(z + inf) would be infinite.
    return torch.where(visible, torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]), 0.0)
