"""`attn_implementation="r3mem"`: memory-token attention (`r3mem_fast.kernels.attention`) in models of `transformers`.

Importing this module, or anything of `r3mem_fast.reversible`, registers it. No mask tensor is made: what a layer is
given in its place is a `SegmentMask`, which can carry a memory for the attention to read.
"""

from typing import NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    causal_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from r3mem_fast.kernels.attention import MAX_DECODED, memory_attention, memory_decode

NAME = "r3mem"
_OTHERS = 'use attn_implementation="sdpa" or "eager"'
# What attention functions may be given by name, and this one cannot do.
_UNSUPPORTED = (
    "position_bias", "head_mask", "layer_head_mask", "cache", "cu_seq_lens_q", "cu_seq_lens_k", "output_attentions",
)  # fmt: skip


class LayerRead:
    """Notes that a layer's attention has read a memory out of its mask. Not a tensor: it asks the device nothing.

    Args:
        layers: A set, of the layers that have.
        index: The layer's.
    """

    def __init__(self, layers: set, index: int):
        self._layers, self._index = layers, index

    def note(self):
        self._layers.add(self._index)


class SegmentMask(NamedTuple):
    """What the queries of a pass see: causally the keys from `segment_starts` on, and a memory.

    query_offset: keys before the first query. window: a query sees the last so many keys, its own included; None: all.
    segment_starts: int32 `[B]`, the first key of each row that is no padding; None: no row is padded. memory_key,
    memory_value: `[B or 1, kv_heads, M, head_dim]`, at their positions, or None. memory_lengths: int32 `[B]`, of each
    row the last so many of them are seen; None: all. read: notes that it is read.
    """

    query_offset: int
    window: int | None = None
    segment_starts: torch.Tensor | None = None
    memory_key: torch.Tensor | None = None
    memory_value: torch.Tensor | None = None
    memory_lengths: torch.Tensor | None = None
    read: LayerRead | None = None


def segment_mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=causal_mask_function,
    attention_mask=None,
    **kwargs,
) -> SegmentMask:
    """The mask of a pass, with the arguments of `transformers.masking_utils.sdpa_mask`.

    attention_mask: `[B, tokens]`, the cache's included, 0 for padding before a row's tokens or after them. That it has
    no other is read from it, which synchronises with a GPU once a pass and kind of layer, as sdpa's masks do. In a
    CUDA graph or a compiled model that is impossible, and an assertion on the device takes its place.

    Raises ValueError for what no `SegmentMask` can say: a mask with holes, a mask function that is neither causal nor
    that of a causal sliding window, a cache with room for more keys than there are (StaticCache).
    """
    window = _window_of(mask_function)
    if isinstance(q_offset, torch.Tensor) or kv_offset + kv_length != q_offset + q_length:
        raise ValueError(
            f'attn_implementation="{NAME}" takes a cache that holds the keys up to the last query and no more '
            f"(DynamicCache): not a StaticCache, for which {_OTHERS}"
        )
    starts = None
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[1] < kv_offset + kv_length:
            raise ValueError(
                f"attention_mask must be [batch, {kv_offset + kv_length}], the tokens in the cache included, got "
                f"{list(attention_mask.shape)}"
            )
        # Of a window's cache, the oldest keys are gone.
        starts = _first_keys(attention_mask[:, kv_offset : kv_offset + kv_length])
    return SegmentMask(q_offset - kv_offset, window, starts)


def memory_attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    **kwargs,
):
    """Attention with the arguments of `transformers`' attention functions: `([B, T, heads, head_dim], None)`.

    query `[B, heads, T, head_dim]`, key and value `[B, kv_heads, S, head_dim]`. attention_mask: a `SegmentMask`.
    softcap, s_aux: of Gemma 2's and gpt-oss's attention. Under autocast it computes in its dtype, as sdpa does.
    Raises ValueError for another mask, dropout, attention that is not causal, or anything else that it would ignore.
    """
    mask = attention_mask
    if not isinstance(mask, SegmentMask):
        given = "none was made" if mask is None else f"got {type(mask).__name__} {list(getattr(mask, 'shape', []))}"
        raise ValueError(
            f'attn_implementation="{NAME}" takes the mask that transformers has made for it of a 2D attention_mask, '
            f"and {given}; for masks of your own, {_OTHERS}"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    refused = [name for name in _UNSUPPORTED if kwargs.get(name) is not None and kwargs[name] is not False]
    refused += [] if causal else ["is_causal=False"]
    refused += [f"dropout={dropout}"] if dropout else []
    if refused:
        raise ValueError(f'attn_implementation="{NAME}" has no {", ".join(refused)}; {_OTHERS}')
    if sliding_window != mask.window:
        raise ValueError(
            f"a {type(module).__name__} has a sliding window of {sliding_window}, and its mask one of {mask.window}; "
            f"{_OTHERS}"
        )
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        query, key, value = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (query, key, value))
    memory = [None if t is None else t.to(query.dtype) for t in (mask.memory_key, mask.memory_value)]
    tensors = [query, key, value, *memory]
    settings = {
        "memory_lengths": mask.memory_lengths,
        "segment_starts": mask.segment_starts,
        "sinks": s_aux,
        "scale": scaling,
        "window": mask.window,
        "softcap": softcap,
    }
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, s_aux))
    if not differentiated and query.shape[1] // key.shape[1] * query.shape[2] <= MAX_DECODED:
        output = memory_decode(*tensors, **settings)
    else:
        output = memory_attention(*tensors, **settings, query_offset=mask.query_offset)
    if mask.read is not None:
        mask.read.note()
    return output.transpose(1, 2), None


def _window_of(mask_function):
    """The sliding window of a mask function, None for plain causal attention. Raises ValueError for any other."""
    if mask_function is causal_mask_function:
        return None
    # Made anew for every pass: known by their code.
    parts = _captured(mask_function, like=_SLIDING)
    if parts is not None and len(parts) == 2 and parts[1] is causal_mask_function:
        window = _captured(parts[0], like=_OVERLAY)
        if window is not None:
            return window
    raise ValueError(
        f'attn_implementation="{NAME}" knows causal attention, with or without a sliding window, of rows that are one '
        "sequence each: no packed sequences (position_ids that start again, without an attention_mask), no chunks, no "
        f"bidirectional attention, no mask function of your own; {_OTHERS}"
    )


_SLIDING, _OVERLAY = sliding_window_causal_mask_function(1), sliding_window_overlay(1)


def _captured(function, like):
    """The one variable that a function captured, if it is of the code of `like`; else None."""
    if getattr(function, "__code__", None) is not like.__code__:
        return None
    (cell,) = function.__closure__
    return cell.cell_contents


def _first_keys(attention_mask):
    """Place of each row's first 1, int32 `[B]`, that of the end if there is none; None if all rows start at 0."""
    real, tokens = attention_mask.bool(), attention_mask.shape[1]
    places = torch.arange(tokens, dtype=torch.int32, device=real.device)
    first = torch.where(real, places, tokens).amin(1)
    last = torch.where(real, places, -1).amax(1)
    whole = (last - first < real.sum(1)).all()
    message = (
        f'attn_implementation="{NAME}" takes rows that are padded before their tokens or after them, and an '
        "attention_mask has zeros between ones (as a row has that is padded on the right and then continued): pad on "
        f"the left, or {_OTHERS}"
    )
    if torch.compiler.is_compiling() or (real.is_cuda and torch.cuda.is_current_stream_capturing()):
        torch._assert_async(whole, message)
        return first
    is_whole, is_padded = torch.stack([whole, first.any()]).tolist()
    if not is_whole:
        raise ValueError(message)
    return first if is_padded else None


AttentionInterface.register(NAME, memory_attention_forward)
AttentionMaskInterface.register(NAME, segment_mask)
