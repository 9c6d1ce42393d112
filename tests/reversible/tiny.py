"""Tiny random models of every family, and the same network with stored activations to compare with."""

import contextlib

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from r3mem_fast.reversible.convert import stack_of
from r3mem_fast.reversible.stack import Mode

_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
_GPT2 = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 128,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXACT_FAMILIES = {
    "llama": _SMALL,
    "mistral": {**_SMALL, "sliding_window": 8},
    "qwen2": _SMALL,
    "qwen3": {**_SMALL, "use_sliding_window": False},
    "gpt2": _GPT2,
}
GENERIC_FAMILIES = {
    "gemma2": {**_SMALL, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        **_SMALL,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neox": {**_SMALL, "hidden_dropout": 0.0},
    "olmo2": _SMALL,
    "opt": {
        "vocab_size": 96,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "dropout": 0.0,
    },
}
# Models that rotate a part of each key, or the keys of some layers.
MIXED_ROTARY = {
    "phi": {**_SMALL, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "stablelm": {**_SMALL, "hidden_dropout": 0.0},
    "persimmon": {**_SMALL, "hidden_dropout": 0.0},
    "smollm3": {**_SMALL, "no_rope_layers": [1, 0, 1, 0]},
    "cohere2": {**_SMALL, "sliding_window": 64},
    "exaone4": {**_SMALL, "sliding_window": 64},
}
# Models in which layers differ in the size of their heads, read keys of layers below them, and are given something of
# each token.
_GEMMA_3N = {
    **{**_SMALL, "sliding_window": 64, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8},
    **{"layer_types": ["sliding_attention", "full_attention"] * 2, "laurel_rank": 4, "altup_num_inputs": 2},
    **{"activation_sparsity_pattern": [0.0] * 4, "num_kv_shared_layers": 2},
}
LAYERED = {
    "gemma3n_text": _GEMMA_3N,
    "gemma4_text": {
        **{name: value for name, value in _GEMMA_3N.items() if name[:6] not in ("laurel", "altup_", "activa")},
        **{"global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
    },
}
_DEEPSEEK = {
    **{name: value for name, value in _SMALL.items() if name != "head_dim"},
    **{"num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4},
    **{"qk_nope_head_dim": 4, "v_head_dim": 6, "first_k_dense_replace": 1},
}
_OWN = {**{name: 0.0 for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}, **_GPT2}
# Models whose attention is none of transformers' interchangeable functions, and has rotary tables of its own.
OWN_ATTENTION = {
    "gptj": {**_OWN, "rotary_dim": 4},
    "codegen": {**_OWN, "n_ctx": 128, "rotary_dim": 4},
    "gpt_neox_japanese": {
        **_SMALL,
        "intermediate_multiple_size": 2,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "rotary_pct": 1.0,
    },
    "falcon": {
        **{name: value for name, value in _SMALL.items() if name != "head_dim"},
        "hidden_dropout": 0.0,
        "alibi": False,
        "new_decoder_architecture": False,
    },
}
MIXTURES = {
    "mixtral": {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {**_SMALL, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **_SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_moe": {**_SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "granitemoe": {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {
        **_SMALL, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1,
        "topk_group": 1,
    },
    "gpt_oss": {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
}  # fmt: skip


def build(family="llama", dtype=torch.float32, scale=1.0, seed=0, **changes):
    """A tiny random model in train mode; `scale` multiplies its matrices, so that branches matter."""
    settings = {**EXACT_FAMILIES, **GENERIC_FAMILIES, **MIXED_ROTARY, **LAYERED, **OWN_ATTENTION, **MIXTURES}[family]
    config = CONFIG_MAPPING[family](**{**settings, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model.to(dtype).train()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, expected, tolerance=0.0):
    """Relative 2-norm difference of every parameter's gradient, none by default; the same parameters have one."""
    assert actual.keys() == expected.keys()
    assert actual
    largest = max(gradient.norm().item() for gradient in expected.values())
    for name, gradient in expected.items():
        norm = gradient.norm().item()
        # A gradient that is zero but for rounding (a key bias under softmax) has no relative error of its own.
        scale = norm if norm > 1e-6 * largest else largest
        assert (actual[name] - gradient).norm().item() <= tolerance * scale, name


def token_ids(batch=2, tokens=17, seed=1):
    return torch.randint(3, 96, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def train_step(model, ids, **inputs):
    """Forward and backward; returns the loss value and the gradients, and clears them."""
    loss = model(input_ids=ids, labels=ids, **inputs).loss
    loss.backward()
    result = loss.item(), gradients(model)
    model.zero_grad(set_to_none=True)
    return result


@contextlib.contextmanager
def stored_activations(model):
    """The same reversible network, with activations stored by autograd: what every gradient is compared with."""
    with stack_of(model).in_mode(Mode.STORED):
        yield


def assert_gradients_as_stored(model, ids, tolerance=0.0, **inputs):
    loss, actual = train_step(model, ids, **inputs)
    with stored_activations(model):
        loss_stored, expected = train_step(model, ids, **inputs)
    assert loss == loss_stored
    assert_same_gradients(actual, expected, tolerance)
