"""Computes the residual branch `f(x) = layer(x) - x` of Hugging Face decoder layers.

For the families below the branch is computed as the sum of what the sublayers add, without the cancellation that
`layer(x) - x` suffers in bfloat16. Every other layer takes `generic_branch`.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

# Computes the branch of a layer: `(layer, hidden, kwargs) -> tensor`, of the input and the layer's keyword arguments.
Branch = Callable[[Any, torch.Tensor, dict[str, Any]], torch.Tensor]


def llama_branch(layer: Any, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Compute the branch of layers with a norm before attention and one before the MLP.

    These are the layers of Llama (and SmolLM2), Mistral, Qwen2 and Qwen3, and of the mixtures Mixtral, OLMoE,
    Qwen2-MoE and Qwen3-MoE.

    Args:
        layer: The decoder layer.
        hidden: Its input, `[B, T, width]`.
        kwargs: Keyword arguments of the layer.

    Returns:
        What attention and MLP add to `hidden`, in its shape.
    """
    attention = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)[0]
    return attention + layer.mlp(layer.post_attention_layernorm(hidden + attention))


def gpt2_branch(layer: Any, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Compute the branch of GPT-2's layers.

    Args:
        layer: The decoder layer.
        hidden: Its input, `[B, T, width]`.
        kwargs: Keyword arguments of the layer.

    Returns:
        What attention and MLP add to `hidden`, in its shape.

    Raises:
        ValueError: Cross-attention is asked for.
    """
    kwargs = dict(kwargs)
    if kwargs.pop("encoder_hidden_states", None) is not None:
        raise ValueError("cross-attention (encoder_hidden_states) is not supported by a reversible GPT-2")
    kwargs.pop("encoder_attention_mask", None)
    attention = layer.attn(layer.ln_1(hidden), **kwargs)[0]
    return attention + layer.mlp(layer.ln_2(hidden + attention))


def generic_branch(layer: Any, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Compute `layer(x) - x` in float32, for any layer that maps a hidden state to one of the same shape.

    Args:
        layer: The decoder layer, made reversible.
        hidden: Its input, `[B, T, width]`.
        kwargs: Keyword arguments of the layer.

    Returns:
        The difference, float32 `[B, T, width]`.

    Raises:
        TypeError: The layer is to return other tensors beside its hidden state.
    """
    # Clone, because some layers add to their input in place.
    output = type(layer).unreversed.forward(layer, hidden.clone(), **kwargs)
    output = hidden_of(layer, output, kwargs)
    return output.float() - hidden.float()


def hidden_of(layer: Any, output: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """Take the hidden state out of what a layer returns, and note what its model's loop expects beside it.

    Args:
        layer: The decoder layer, made reversible.
        output: A tensor, or a tuple that begins with one, as in older versions of transformers and in some models.
        kwargs: Keyword arguments that the layer was called with.

    Raises:
        TypeError: The layer is to return other tensors, too, or a state beside that which it was given.
    """
    if not isinstance(output, (tuple, list)):
        layer.reversible.others = None
        return output
    hidden, *others = output
    # What layers were given, such as a state, they may give back. Some return attention weights whether they are asked
    # for or not, and the model's loop leaves them; what belongs to tokens, `[B, T, n]`, it hands to the next layer.
    known = tuple(other if any(other is given for given in kwargs.values()) else None for other in others)
    layer.reversible.others = known
    lost = [other for other, kept in zip(others, known, strict=True) if other is not None and kept is None]
    handed_on = any(isinstance(other, torch.Tensor) and other.dim() == 3 for other in lost)
    if handed_on or (kwargs.get("output_attentions") and lost):
        raise TypeError(
            f"a {type(layer).__name__} returned more than its hidden state (attention weights, router logits, what "
            "the next layer needs?); a reversible layer cannot. Turn that output off, or call restore(model) first."
        )
    if kwargs.get("state") is not None and lost:
        raise TypeError(
            f"a {type(layer).__name__} was given a state and returned a new one, which a reversible layer cannot; "
            "pass use_cache=False, or call restore(model) first"
        )
    return hidden


# The branch of each layer that is known: of `NAME.CLASS`, a class in `transformers.models.NAME.modeling_NAME`.
_EXACT: dict[str, Branch] = {
    "gpt2.GPT2Block": gpt2_branch,
    "llama.LlamaDecoderLayer": llama_branch,
    "mistral.MistralDecoderLayer": llama_branch,
    "mixtral.MixtralDecoderLayer": llama_branch,
    "olmoe.OlmoeDecoderLayer": llama_branch,
    "qwen2.Qwen2DecoderLayer": llama_branch,
    "qwen2_moe.Qwen2MoeDecoderLayer": llama_branch,
    "qwen3.Qwen3DecoderLayer": llama_branch,
    "qwen3_moe.Qwen3MoeDecoderLayer": llama_branch,
}


def branch_of(layer_class: type[torch.nn.Module]) -> Branch:
    """Choose the branch function for a class of decoder layers.

    A class is known if it has the *forward function* of a known class: a subclass that overrides it is another layer,
    and one that only wraps it (FSDP2's) is the same. In older versions of transformers some of these functions return
    tuples: the branches here were not written after those.

    Args:
        layer_class: The class, before it is made reversible.

    Returns:
        A function of layer, input and keyword arguments; `generic_branch` if the class is not known.
    """
    forward = inspect.unwrap(layer_class.forward)
    if inspect.signature(forward).return_annotation not in (torch.Tensor, "torch.Tensor"):
        return generic_branch
    for place, branch in _EXACT.items():
        family, name = place.split(".")
        known = getattr(sys.modules.get(f"transformers.models.{family}.modeling_{family}"), name, None)
        if known is not None and inspect.unwrap(known.forward) is forward:
            return branch
    return generic_branch
