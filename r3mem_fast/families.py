"""Tries a family of models: a tiny random one of its configuration class is made reversible, and given memories.

That needs no weights, so every causal language model that the installed transformers registers can be tried, new ones
on the day they appear.
"""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .config import R3MemConfig
from .memory.rotary import is_rotary
from .model import R3MemModel
from .reversible import MomentumCoupling, check_gradients, check_inverse, make_reversible

# What is tried, in this order.
CHECKS = ("reversible", "base", "matched", "learned")
_MOST_PARAMETERS = 3_000_000
_TOLERANCE = 5e-3  # of logits behind a memory that has a slot for every token, relative to the largest
# Small values for settings, by the names that configurations have for them; a configuration takes those that it has.
_NAMES = {
    96: ["vocab_size", "vocab_size_per_layer_input"],
    32: ["hidden_size", "n_embd", "d_model", "dim", "embed_dim", "word_embed_proj_dim", "lru_width"],
    48: ["intermediate_size", "ffn_dim", "n_inner", "d_ff"],
    16: ["moe_intermediate_size", "shared_expert_intermediate_size"],
    8: [
        *("head_dim", "global_head_dim", "d_kv", "kv_channels", "kv_lora_rank", "q_lora_rank", "v_head_dim"),
        *("mamba_d_state", "mamba_n_heads", "mamba_d_head", "state_size", "ssm_state_size", "linear_key_head_dim"),
        *("linear_value_head_dim", "hidden_size_per_layer_input"),
    ],
    4: [
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "max_window_layers", "num_attention_heads"),
        *("n_head", "n_heads", "num_heads", "num_local_experts", "num_experts", "n_routed_experts", "rotary_dim"),
        *("qk_rope_head_dim", "qk_nope_head_dim", "mamba_d_conv", "time_step_rank", "conv_kernel"),
        "linear_num_value_heads",
    ],
    2: ["num_key_value_heads", "num_experts_per_tok", "mamba_expand", "linear_num_key_heads", "eos_token_id"],
    1: ["n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "mamba_n_groups", "bos_token_id"],
    0: ["pad_token_id", "num_kv_shared_layers"],
    128: ["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"],
}
_DROPOUTS = [
    *("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    *("attention_probs_dropout_prob", "hidden_dropout_prob"),
]
_SETTINGS = {name: value for value, names in _NAMES.items() for name in names} | dict.fromkeys(_DROPOUTS, 0.0)
# What configurations say by themselves is not always what the family's models are.
_OWN = {"lfm2": {"layer_types": 2 * ["conv", "full_attention"]}}
_WINDOW = 64  # longer than any text that is read here


@dataclasses.dataclass(frozen=True)
class FamilyReport:
    """What a family of models can do here.

    Attributes:
        family: Name of the family, `model_type` of its configurations.
        results: For each of `CHECKS` "yes", or why not; none if no model was made.
        refused: Why no tiny model could be made, or run as transformers made it; None if one was.
    """

    family: str
    results: dict[str, str]
    refused: str | None = None

    @property
    def does_all(self) -> bool:
        """Whether it can do everything that is tried."""
        return self.refused is None and all(result == "yes" for result in self.results.values())

    def __str__(self) -> str:
        """Return the report in one line."""
        if self.refused is not None:
            return f"{self.family}: not tried: {self.refused}"
        return f"{self.family}: " + "; ".join(f"{check}: {result}" for check, result in self.results.items())


def families() -> list[str]:
    """Names of all families of causal language models that the installed transformers registers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def try_family(family: str) -> FamilyReport:
    """Make a tiny random model of a family, and try it.

    - reversible: the inverse is exact, and gradients are those of stored activations.
    - base: with its adapters off, it is the model that transformers made, bit for bit.
    - matched: it compresses without training, and writes behind the memory; where that has a slot for every token, a
      text is read as behind the tokens (if positions are rotary).
    - learned: a loss through segments with memory tokens has gradients; it compresses, writes and expands.

    Args:
        family: Name of the family.

    Raises:
        ValueError: transformers registers no causal language model of that name.
    """
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"transformers registers no causal language model {family!r}; r3mem families lists them")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            base = _tiny_model(family)
            with torch.no_grad():
                base(input_ids=_ids(17, 2))
        except Exception as error:  # of any kind: it is transformers' model, and the report says what it was
            return FamilyReport(family, {}, _in_words(error))
        checks = (_reversible, _base, _matched, _learned)
        return FamilyReport(family, {name: _tried(check, base) for name, check in zip(CHECKS, checks, strict=True)})


def _tried(check: Callable[[Any], str], base: Any) -> str:
    try:
        return check(copy.deepcopy(base))
    except Exception as error:  # of any kind, and reported
        return _in_words(error)


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _tiny_config(family: str) -> Any:
    kind = CONFIG_MAPPING[family]
    default = kind()
    if default.get_text_config() is not default:
        raise ValueError("it is made of several models; its text model is a family of its own")
    known = default.to_dict().keys() | default.attribute_map.keys()
    given: dict[str, Any] = {name: value for name, value in _SETTINGS.items() if name in known}
    if kinds := list(dict.fromkeys(default.to_dict().get("layer_types") or ())):
        given["layer_types"] = [kinds[index % len(kinds)] for index in range(4)]
    if "sliding_window" in known:
        windowed = any("sliding" in kind or "chunk" in kind for kind in kinds)
        given["sliding_window"] = _WINDOW if windowed or default.sliding_window is not None else None
    return kind(**given | _OWN.get(family, {}))


def _tiny_model(family: str) -> Any:
    torch.manual_seed(0)
    config = _tiny_config(family)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if count > _MOST_PARAMETERS:
        raise ValueError(f"the smallest model has {count} parameters: settings have names that are not known here")
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)  # so that branches matter
    return model


def _ids(tokens: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def _reversible(base: Any) -> str:
    model, ids = make_reversible(base.train(), MomentumCoupling()), _ids(17, 2)
    report = check_inverse(model, ids)
    if not report.exact:
        return f"the inverse of layer {report.first_inexact_layer} is not exact"
    error = check_gradients(model, ids).max_relative_error
    return "yes" if error < 1e-4 else f"gradients differ by {error:.1e}"


def _base(base: Any) -> str:
    ids = _ids(17, 2)
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        model = R3MemModel(base, R3MemConfig(core=(1, 3))).eval()
        with model.disable_adapters():
            same = torch.equal(model.plain_model(input_ids=ids).logits, expected)
    return "yes" if same else "logits are others"


def _matched(base: Any) -> str:
    config = R3MemConfig(
        memory_writer="matched",
        adapter_rows="memory",
        core=(1, 3),
        num_memory_tokens=16,
        memory_budget=64,
        segment_length=16,
        segment_overlap=4,
    )
    model = R3MemModel(base, config).eval()
    context, text = _ids(40), _ids(9, seed=1)
    memory = model.compress(context, finish=True)
    with torch.no_grad():
        behind = model(text, memory=memory).logits
        with model.disable_adapters():
            whole = model.plain_model(torch.cat([context, text], 1)).logits[:, 40:]
    model.generate(text, memory=memory, max_new_tokens=3, do_sample=False)
    error = ((behind - whole).abs().max() / whole.abs().max()).item()
    if is_rotary(model.decoder) and not error < _TOLERANCE:
        return f"logits behind a memory of all tokens differ by {error:.1e}"
    return "yes"


def _learned(base: Any) -> str:
    model = R3MemModel(base, R3MemConfig(num_memory_tokens=3, segment_length=8, core=(1, 3))).train()
    ids = _ids(17, 2)
    model(ids, labels=ids).loss.backward()
    learned = model.memory_embeddings
    if learned is None or learned.grad is None or not learned.grad.isfinite().all():
        return "memory tokens get no finite gradient"
    model.eval()
    memory = model.compress(ids)
    model.generate(ids[:, :4], memory=memory, max_new_tokens=3, do_sample=False)
    model.expand(memory, max_new_tokens=3)
    return "yes"


def try_families(names: Sequence[str] = ()) -> Iterator[FamilyReport]:
    """Try families one after the other.

    Args:
        names: Names of the families; none: all.

    Yields:
        A report for each.
    """
    for name in names or families():
        yield try_family(name)
