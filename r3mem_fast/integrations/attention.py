"""`attn_implementation="r3mem"`: memory-token attention (`r3mem_fast.kernels.attention`) in models of `transformers`.

Importing this module, or anything of `r3mem_fast.reversible`, registers it. No mask tensor is made: layers are given a
`SegmentMask` in its place, which can carry a memory for the attention to read.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

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
_NO_TENSOR = f'attn_implementation="{NAME}" makes no mask tensor, and a layer looks for something of one'
_EVERY = slice(None)
# Keywords that attention functions may be given, and that this one cannot serve.
_UNSUPPORTED = (
    "position_bias", "head_mask", "layer_head_mask", "cache", "cu_seq_lens_q", "cu_seq_lens_k", "output_attentions",
)  # fmt: skip


class LayerRead:
    """Notes that a layer's attention has read a memory out of its mask; no tensor, so that no device is waited for."""

    def __init__(self, layers: set[int], index: int) -> None:
        """Prepare the note of one layer.

        Args:
            layers: Indices of the layers that have read; `note` adds to it.
            index: The layer's index.
        """
        self._layers, self._index = layers, index
        self._key: weakref.ref[torch.Tensor] | None = None

    def note(self, module: torch.nn.Module, key: torch.Tensor) -> None:
        """Note that the layer has read the memory.

        Args:
            module: Its attention.
            key: The segment's keys that it was read with.

        Raises:
            ValueError: They are those of the attention before: its values are not those that the cache holds then.
        """
        self._layers.add(self._index)
        if torch.compiler.is_compiling():
            return
        if self._key is not None and self._key() is key:
            raise ValueError(
                f"a {type(module).__name__} computes several attentions over the same keys, with parts of the values "
                f'that a cache holds, and attn_implementation="{NAME}" knows the memory\'s whole values; {_OTHERS}'
            )
        self._key = weakref.ref(key)


class SegmentMask(NamedTuple):
    """Describes what the queries of a pass see: the keys up to their own, and a memory.

    Attributes:
        query_offset: Number of keys before the first query; None: the queries are those of the last keys.
        window: Number of keys that a query sees, its own and those just before it; None: all.
        segment_starts: Index of the first key of each row that is no padding, int32 `[B]`; None: no row is padded.
        memory_key: Keys of the memory at their positions, `[B or 1, kv_heads, M, head_dim]`; None: there is no memory.
        memory_value: Values of the memory, in the shape of its keys; None: there is no memory.
        memory_lengths: Number of the memory's last keys that each row sees, int32 `[B]`; None: all.
        read: Is told when the memory is read; None: nobody is.
    """

    query_offset: int | None
    window: int | None = None
    segment_starts: torch.Tensor | None = None
    memory_key: torch.Tensor | None = None
    memory_value: torch.Tensor | None = None
    memory_lengths: torch.Tensor | None = None
    read: LayerRead | None = None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{_NO_TENSOR} ({name}); {_OTHERS}")

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, tuple) and place == (_EVERY, _EVERY, *place[2:3], _EVERY) and _are_last(place[2]):
            return self._replace(query_offset=None)  # Gemma 4 leaves out tokens whose logits nobody asks for
        if not isinstance(place, (int, slice)):
            raise TypeError(f"{_NO_TENSOR} (an index); {_OTHERS}")
        return tuple.__getitem__(self, place)


def _are_last(queries: Any) -> bool:
    """Whether an index chooses the last queries of a pass, or all."""
    return isinstance(queries, slice) and (queries.start or 0) <= 0 and queries.stop is queries.step is None


def segment_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> SegmentMask:
    """Make the mask of a pass; takes the arguments of `transformers.masking_utils.sdpa_mask`.

    Making sure that `attention_mask` has no holes synchronises with a GPU once a pass and kind of layer, as sdpa's
    masks do. In a CUDA graph or a compiled model that is impossible, and an assertion on the device takes its place.

    Args:
        batch_size: Number of rows B; not needed.
        q_length: Number of queries.
        kv_length: Number of keys.
        q_offset: Number of tokens before the first query.
        kv_offset: Number of tokens before the first key: those that a sliding window's cache has dropped.
        mask_function: Causal, with or without a sliding window.
        attention_mask: `[B, tokens]`, those in the cache included, 0 for padding before a row's tokens or after them;
            None: there is no padding.
        kwargs: Further arguments of `sdpa_mask`; not needed.

    Returns:
        The mask. A `PrefixCache` puts its memory into it, layer by layer.

    Raises:
        ValueError: A `SegmentMask` cannot express this: `attention_mask` has holes, the mask function is neither
            causal nor that of a causal sliding window, or the cache has room for more keys than there are
            (StaticCache).
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
        # The cache of a sliding window has dropped its oldest keys.
        starts = _first_keys(attention_mask[:, kv_offset : kv_offset + kv_length])
    return SegmentMask(q_offset - kv_offset, window, starts)


def memory_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: SegmentMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention; takes the arguments of `transformers`' attention functions.

    Under autocast it computes in autocast's dtype, as sdpa does.

    Args:
        module: The attention module that calls.
        query: `[B, heads, T, head_dim]`.
        key: `[B, kv_heads, S, head_dim]`.
        value: `[B, kv_heads, S, head_dim]`.
        attention_mask: A `SegmentMask`, with or without a memory.
        dropout: Must be 0.
        scaling: Factor of the scores; None: `head_dim**-0.5`.
        is_causal: Must not be False; None: as the module says.
        sliding_window: The module's sliding window; must be that of the mask.
        softcap: Limit of the scores, in Gemma 2's attention.
        s_aux: Sinks of the heads, `[heads]`, in gpt-oss's attention.
        kwargs: Further arguments, among which none may ask for what this function cannot do.

    Returns:
        The output, `[B, T, heads, head_dim]`, and None in place of attention weights.

    Raises:
        ValueError: The mask is another one, there is dropout, attention is not causal, or something else is asked for
            that this function would ignore.
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
    if mask.memory_key is not None and mask.memory_key.shape[1] != key.shape[1]:
        raise ValueError(
            f"a {type(module).__name__} attends with {key.shape[1]} heads of keys, and its cache holds those of "
            f"{mask.memory_key.shape[1]}: a memory is read as the cache holds it; {_OTHERS}"
        )
    given_key = key
    query, key, value = as_autocast(query, key, value)
    memory = [None if t is None else t.to(query.dtype) for t in (mask.memory_key, mask.memory_value)]
    tensors: list[Any] = [query, key, value, *memory]
    settings: dict[str, Any] = {
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
        output = memory_attention(*tensors, **settings, query_offset=offset_of(mask, query, key))
    if mask.read is not None:
        mask.read.note(module, given_key)
    return output.transpose(1, 2), None


def offset_of(mask: SegmentMask, query: torch.Tensor, key: torch.Tensor) -> int:
    """Number of keys before the first query, `[B, heads, T, head_dim]` each.

    Args:
        mask: The mask.
        query: The queries.
        key: The keys.
    """
    return key.shape[2] - query.shape[2] if mask.query_offset is None else mask.query_offset


def as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors on one device in autocast's dtype, where autocast is on there; else as they are.

    Args:
        tensors: The tensors.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def _window_of(mask_function: Callable) -> int | None:
    """Return the sliding window of a mask function, None for plain causal attention; raise ValueError for others."""
    if mask_function is causal_mask_function:
        return None
    # transformers makes these functions anew for every pass, so recognise them by their code.
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


def _captured(function: Any, like: Any) -> Any:
    """Return the one variable that a function captured if the function has the code of `like`, else None."""
    if getattr(function, "__code__", None) is not like.__code__:
        return None
    (cell,) = function.__closure__
    return cell.cell_contents


def _first_keys(attention_mask: torch.Tensor) -> torch.Tensor | None:
    """Return the index of each row's first 1, int32 `[B]`; the row's length if there is none.

    The result may be None if all rows start at 0. Raises ValueError for zeros between ones.
    """
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
