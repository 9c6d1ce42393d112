"""The residual branch `f(x) = layer(x) - x` of Hugging Face decoder layers.

For the families below the branch is computed as the sum of what the sublayers add, without the cancellation that
`layer(x) - x` suffers in bfloat16. Every other layer takes `generic_branch`.
"""

import inspect
import sys

import torch


def llama_branch(layer, hidden, kwargs):
    """Norm first, attention then MLP: Llama (and SmolLM2), Mistral, Qwen2, Qwen3."""
    attention = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)[0]
    return attention + layer.mlp(layer.post_attention_layernorm(hidden + attention))


def gpt2_branch(layer, hidden, kwargs):
    kwargs = dict(kwargs)
    if kwargs.pop("encoder_hidden_states", None) is not None:
        raise ValueError("cross-attention (encoder_hidden_states) is not supported by a reversible GPT-2")
    kwargs.pop("encoder_attention_mask", None)
    attention = layer.attn(layer.ln_1(hidden), **kwargs)[0]
    return attention + layer.mlp(layer.ln_2(hidden + attention))


def generic_branch(layer, hidden, kwargs):
    """`layer(x) - x` in float32, for any layer that maps a hidden state to one of the same shape.

    Raises TypeError if the layer returns other tensors beside its hidden state.
    """
    # A copy: some layers add to their input in place.
    output = type(layer).unreversed.forward(layer, hidden.clone(), **kwargs)
    # As older versions of transformers have it; the model's loop then expects a tuple from the reversible layer too.
    layer.reversible.returns_tuple = isinstance(output, tuple)
    if layer.reversible.returns_tuple:
        output, *others = output
        if any(other is not None for other in others):
            raise TypeError(
                "a decoder layer returned more than its hidden state (attention weights, router logits?); a "
                "reversible layer cannot. Turn that output off, or call restore(model) first."
            )
    return output.float() - hidden.float()


# Module and class of a decoder layer, and its branch.
_EXACT = {
    ("transformers.models.llama.modeling_llama", "LlamaDecoderLayer"): llama_branch,
    ("transformers.models.mistral.modeling_mistral", "MistralDecoderLayer"): llama_branch,
    ("transformers.models.qwen2.modeling_qwen2", "Qwen2DecoderLayer"): llama_branch,
    ("transformers.models.qwen3.modeling_qwen3", "Qwen3DecoderLayer"): llama_branch,
    ("transformers.models.gpt2.modeling_gpt2", "GPT2Block"): gpt2_branch,
}


def branch_of(layer_class):
    """The branch function for a decoder layer class, `generic_branch` if it is none of the known ones.

    Known is what has the *forward function* of a known class: a subclass that overrides it is another layer, and one
    that only wraps it (FSDP2's) is the same. In older versions of transformers some of them return tuples: those are
    not the functions that the branches here were written after.
    """
    forward = inspect.unwrap(layer_class.forward)
    if inspect.signature(forward).return_annotation not in (torch.Tensor, "torch.Tensor"):
        return generic_branch
    for (module, name), branch in _EXACT.items():
        known = getattr(sys.modules.get(module), name, None)
        if known is not None and inspect.unwrap(known.forward) is forward:
            return branch
    return generic_branch
