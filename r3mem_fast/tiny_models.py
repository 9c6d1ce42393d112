"""Makes a tiny random model of any family of causal language models, from its configuration class alone.

General rules make configurations small: what settings are named, what their default is, and how long lists are. What a
family needs beside them stands in `_OWN`.
"""

import re
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

LAYERS = 4
_MOST_PARAMETERS = 3_000_000
_WINDOW = 64  # longer than any text that is read here
# What settings are, whatever they are by default.
_EXACT = {
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2, "decoder_start_token_id": 1},
    **dict.fromkeys(
        ["num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"], LAYERS
    ),
    **{"is_decoder": True, "add_cross_attention": False},
}
# Sizes, by what settings are called; of several patterns that fit a name, the first counts. A setting that is smaller
# by default stays as it is, and so does one that is None, but for `_GIVEN`: what a family does without stays off.
_SIZES: list[tuple[str, int]] = [
    (r"num_kv_shared_layers|num_nextn_predict_layers", 0),
    (r"n_group|num_expert_group|topk_group|first_k_dense_replace|n(um)?_shared_experts|\w*n_?groups", 1),
    (r"num_dense_layers|num_mem_blocks|\w*_layer_offset", 1),
    (r"\w*(kv|key_value)_heads|\w*experts_per_tok(en)?|moe_topk|\w*expand|\w*num_key_heads|\w*_layer_period", 2),
    (r"rotary_dim|qk_(rope|nope)_head_dim|mamba_d_conv|\w*conv_kernel|time_step_rank|mamba_dt_rank", 4),
    (r"\w*layers?|num_blocks|mamba_n_heads|\w*heads|n_head|\w*experts|zero_expert_num|heads_per_ngram|hc_count", 4),
    (r"\w*head_?(dim|size)|dim_head|d_kv|kv_channels|\w*_rank|mamba_d_state|\w*state_size|hc_lowrank", 8),
    (r"attention_chunk_size", 64),  # as `_WINDOW`
    (r"hidden_size_per_layer_input|\w*chunk_size|\w*chunk_length", 8),
    (r"(moe|shared_experts?|shared|expert)_(intermediate|ffn_hidden)_size", 16),
    (r"mamba_d_head", 16),
    (
        r"\w*(hidden_size|embed_dim|embedding_dim|word_embed_proj_dim)|n_embd|d_model|dim|lru_width|\w*out_channels?|\w*conv_channels",
        32,
    ),
    (r"\w*(intermediate_size|ffn_hidden_size|ffn_dim|feed_forward_size)|n_inner|d_inner|d_ff|dff|dim_ff|mlp_dim", 48),
    (r"index_topk", 64),
    (r"\w*vocab(_size\w*)?", 96),
    (r"\w*token_(id|index)", 95),  # images and the like: the last token, of which no text has any
    (r"\w*max_(position_embeddings|seq_len|target_positions)|n_positions|n_ctx|model_max_length", 128),
]
_GIVEN = r"num_key_value_heads|head_dim|n_routed_experts|n_shared_experts|num_experts_per_tok|n_group|topk_group"
_DROPOUT = r"\w*(dropout|dropout_prob|dropout_p|pdrop|layerdrop)"
_MAMBA = 2 * ["linear_attention", "full_attention"]
# What configurations say by themselves is not always what the family's models are, or rules do not find it.
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt_global_transformer": {"hidden_size": 64, "head_dim": 16},
    "blt_local_decoder": {"hidden_size_global": 64},
    "blt_local_encoder": {"hidden_size_global": 64},
    "cohere_compass_text": {
        "layer_types": LAYERS * ["full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note_text": {
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8},
        **{"swa_head_dim": 8, "swa_qk_nope_head_dim": 4, "swa_v_head_dim": 8},
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "granitemoehybrid": {"layer_types": _MAMBA},
    "lfm2": {"layer_types": 2 * ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": 2 * ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds": False},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 4, "mamba_headdim": 16},
}  # fmt: skip

_DRAFTS = "it drafts for a Gemma 4, whose keys and values its layers read, and is no language model by itself"
_NO_MODEL = {"gemma4_assistant": _DRAFTS, "gemma4_unified_assistant": _DRAFTS}


def tiny_config(family: str) -> Any:
    """Make a small configuration of a family; of a model made of several, all of them are small.

    Args:
        family: Name of the family, `model_type` of its configurations.

    Raises:
        ValueError: The family has no language models.
    """
    if family in _NO_MODEL:
        raise ValueError(_NO_MODEL[family])
    kind = CONFIG_MAPPING[family]
    made_from = getattr(MODEL_FOR_CAUSAL_LM_MAPPING[kind], "config_class", kind)
    # The causal language model of a composite is often its text model alone.
    inner = [sub for sub in kind.sub_configs.values() if sub is made_from] if made_from is not kind else []
    config = _small(inner[0] if inner else kind)
    if getattr(config.get_text_config(decoder=True), "eos_token_id", None) is None:
        config.eos_token_id = _EXACT["eos_token_id"]
    return config


def _small(kind: Any, default: Any = None) -> Any:
    default = kind() if default is None else default
    values = default.to_dict()
    depth = getattr(default, "num_hidden_layers", None)
    text = _text_part(default)
    aliases = {real: alias for alias, real in default.attribute_map.items()}
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name in kind.sub_configs:
            part = getattr(default, name)
            if isinstance(part, PreTrainedConfig):
                given[name] = _small(type(part), part)
                if part is not text and hasattr(part, "num_hidden_layers"):
                    given[name].num_hidden_layers = (
                        LAYERS - 1
                    )  # so that its layers are not taken for those of the text
        elif isinstance(value, list) and len(value) == depth:
            kinds = list(dict.fromkeys(_small_value(item, name) for item in value))
            given[name] = [kinds[index % len(kinds)] for index in range(LAYERS)]
        elif (small := _small_value(value, name, aliases.get(name))) is not value:
            given[name] = small
    if "kv_lora_rank" in values:  # latent attention, whose heads are not shared and have sizes that follow from parts
        given["num_key_value_heads"] = given.get("num_attention_heads")
        given.pop("qk_head_dim", None)
        if "head_dim" in given and values["head_dim"] == values["qk_rope_head_dim"]:
            given["head_dim"] = given["qk_rope_head_dim"]
    if "sliding_window" in values:
        windowed = any("sliding" in kind or "chunk" in kind for kind in given.get("layer_types", ()))
        given["sliding_window"] = _WINDOW if windowed or default.sliding_window is not None else None
    return kind(**given | _OWN.get(kind.model_type, {}))


def _text_part(config: Any) -> Any:
    """The configuration of the language model in that of a composite."""
    try:
        return config.get_text_config(decoder=True)
    except ValueError:  # there are several
        return config


def _small_value(value: Any, *names: str | None) -> Any:
    """A small value for a setting that has these names; the value itself if there is no need for another."""
    for name in filter(None, names):
        if name in _EXACT:
            return _EXACT[name]
        if re.fullmatch(_DROPOUT, name) and value is not None:
            return type(value)(0)
        size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
        if size is not None and type(value) is int:
            return min(value, size)
        if size is not None and value is None and re.fullmatch(_GIVEN, name):
            return size
    return value


def tiny_model(family: str) -> Any:
    """Make a tiny random model of a family, in eval mode, whose matrices are large enough for branches to matter.

    Args:
        family: Name of the family.

    Raises:
        ValueError: The family has no language models, or has settings of names that are not known here.
    """
    torch.manual_seed(0)
    config, kind = tiny_config(family), MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in kind._from_config(config).parameters())
    if count > _MOST_PARAMETERS:
        raise ValueError(f"the smallest model has {count} parameters: settings have names that are not known here")
    model = kind._from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
    return model
