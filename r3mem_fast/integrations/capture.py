"""What the attention of each layer asks in a pass: queries, at their positions, and the settings of the attention."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .own_attention import calls_pytorch, own_attention_noted

_SEPARATOR = "+r3mem-capture-"


class AttentionCall(NamedTuple):
    """One layer's attention in one pass.

    Attributes:
        query: Queries at their positions (rotated), `[B, heads, T, head_dim]`.
        scale: Factor of `q · k`.
        softcap: c of `c * tanh(scale * q · k / c)`; None: no cap.
        window: Number of keys that a query sees, its own included; None: all before it.
        sinks: One logit for each query head that takes part in the softmax and has no value, `[heads]`; None: none.
        expanded: Makes keys and values of all heads of what latent attention keeps in a cache, `[B, 1, S, width]`
            each; None: a cache keeps keys and values.
    """

    query: torch.Tensor
    scale: float
    softcap: float | None
    window: int | None
    sinks: torch.Tensor | None
    expanded: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the attention, as `kernels.matching` takes them."""
        return {"scale": self.scale, "softcap": self.softcap, "window": self.window, "sinks": self.sinks}


def implementation_of(config: Any) -> str:
    """Name of a model's attention, also while it is captured."""
    return str(config._attn_implementation).partition(_SEPARATOR)[0]


@contextlib.contextmanager
def captured_attention(decoder: Any) -> Iterator[dict[int, AttentionCall]]:
    """Note each layer's attention in the block, by the layer's index in the cache; the attention computes as always.

    The model's attention goes by another name meanwhile, under which a function is registered that calls it.

    Args:
        decoder: The decoder.

    Raises:
        ValueError: In the block: an attention is of a kind that is not known here.
    """
    config = decoder.config
    name = config._attn_implementation
    calls: dict[int, AttentionCall] = {}

    def attention(module: Any, query: torch.Tensor, *tensors: torch.Tensor, **settings: Any) -> Any:
        if settings.get("position_bias") is not None:
            raise ValueError(
                f"a {type(module).__name__} has a bias for each pair of positions, for which no memory can be matched"
            )
        scale = settings.get("scaling")
        calls[module.layer_idx] = AttentionCall(
            query.detach(),
            query.shape[-1] ** -0.5 if scale is None else float(scale),
            settings.get("softcap"),
            settings.get("sliding_window"),
            settings.get("s_aux"),
            getattr(module, "expand_kv", None),
        )
        return _attention_of(module, name)(module, query, *tensors, **settings)

    def note(module: Any, query: torch.Tensor, scale: float) -> None:
        calls[module.layer_idx] = AttentionCall(query.detach(), scale, None, None, None)

    with own_attention_noted(decoder, note):
        # What calls PyTorch itself asks for the name, and would do so no more under another.
        other = replaced_attention(config, attention, ALL_MASK_ATTENTION_FUNCTIONS[name])
        with contextlib.nullcontext() if calls_pytorch(decoder) else other:
            yield calls


@contextlib.contextmanager
def scaled_attention(decoder: Any, factor: float) -> Iterator[set[int]]:
    """Multiply what each layer's attention gives, before its output projection, in the block.

    Args:
        decoder: The decoder.
        factor: What it is multiplied by.

    Yields:
        Layers where that was done; those whose attention is a method of its own are none of them.
    """
    config = decoder.config
    name, done = config._attn_implementation, set()

    def attention(module: Any, *tensors: Any, **settings: Any) -> Any:
        output, *others = _attention_of(module, name)(module, *tensors, **settings)
        done.add(module.layer_idx)
        return output * factor, *others

    with replaced_attention(config, attention, ALL_MASK_ATTENTION_FUNCTIONS[name]):
        yield done


class SlotsOfHeads(NamedTuple):
    """The slots that a layer has at the beginning of a cache, and which of them each head sees.

    Attributes:
        present: Which of its n slots the query heads see, bool `[B, heads, 1, n]`.
        columns: Their columns among those that a mask has for slots, int64 `[n]`.
        width: Columns that a mask has for slots.
    """

    present: torch.Tensor
    columns: torch.Tensor
    width: int


@contextlib.contextmanager
def narrowed_attention(decoder: Any, slots: Mapping[int, SlotsOfHeads]) -> Iterator[set[int]]:
    """Let each layer have its own slots at the beginning of a cache in the block, and each head see its own of them.

    Args:
        decoder: The decoder, whose attention is "sdpa" or "eager".
        slots: The slots of each layer, by its index in the cache.

    Yields:
        Layers whose heads have done so.
    """
    config = decoder.config
    name, done = config._attn_implementation, set()

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **settings: Any
    ):
        own, columns, width = slots[module.layer_idx]
        seen = own.new_ones(*own.shape[:3], key.shape[2])
        seen[..., : own.shape[3]] = own
        if mask is None and query.shape[2] > 1:
            raise RuntimeError("a pass over several tokens behind a memory came without a mask")
        if mask is None:
            mask = seen
        else:
            mask = torch.cat([mask.index_select(-1, columns), mask[..., width:]], -1)
            hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            mask = mask.masked_fill(~seen, hidden)
        done.add(module.layer_idx)
        return _attention_of(module, name)(module, query, key, value, mask, **settings)

    with replaced_attention(config, attention, ALL_MASK_ATTENTION_FUNCTIONS[name]):
        yield done


@contextlib.contextmanager
def replaced_attention(config: Any, attention: Callable, masks: Callable) -> Iterator[None]:
    """Let a model compute its attention by another function in the block: a context manager.

    Args:
        config: Configuration of the decoder.
        attention: The function, with the arguments of transformers' attention functions.
        masks: Makes its masks, with the arguments of transformers' mask functions.

    Yields:
        Nothing.
    """
    name = config._attn_implementation
    # A name of its own for each block, so that blocks in other threads do not meet.
    other = f"{name}{_SEPARATOR}{id(attention):x}"
    AttentionInterface.register(other, attention)
    AttentionMaskInterface.register(other, masks)
    config._attn_implementation = other
    try:
        yield
    finally:
        config._attn_implementation = name
        AttentionInterface._global_mapping.pop(other)
        AttentionMaskInterface._global_mapping.pop(other)


def _attention_of(module: Any, name: str) -> Callable:
    if name == "eager":  # a function of the model's own module
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]
