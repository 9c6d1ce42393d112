"""Fingerprints of base models, adapters and tokenizers: digests that tell by values what belongs together."""

import dataclasses
import hashlib
import json
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

from .config import TRAINING_SETTINGS, R3MemConfig
from .integrations.compat import setting_of
from .integrations.peft import base_parameters, own_parameters
from .memory.layout import MemoryLayout, Origin
from .reversible.convert import text_config
from .reversible.replay import sum_of_bits

# Settings of a model that change what the same weights compute.
_CONFIG_KEYS = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rope_parameters",
    "sliding_window",
    "layer_types",
)
# A line of characters that tokenizers normalise and split in different ways.
_PROBE = "A naïve  tab\tand\nline, 1234.5 'don't' ﬁ Ǆ é ½ 東京 🙂 end"


def fingerprint(model: Any) -> str:
    """Fingerprint of a base model: its weights, rounded to bfloat16, and the settings that change what they compute.

    Adapters on the model do not count, and whether it was loaded in float32 or bfloat16 does not matter.

    Args:
        model: A causal language model, or a PeftModel of one.

    Returns:
        BLAKE2 digest, 32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    config = text_config(model.config)
    settings = [setting_of(config, key) for key in _CONFIG_KEYS]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, parameter in sorted(own_parameters(model)):
        digest.update(f"{name} {list(parameter.shape)}".encode())
        value: Any = parameter.detach()
        value = value.to(torch.bfloat16) if value.is_floating_point() else value
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def adapter_settings(peft_model: Any) -> list[Any]:
    """Settings of a model's adapters that change what their weights compute.

    Args:
        peft_model: A PeftModel.

    Returns:
        For each module with adapters `(name, whether they are merged, [[active adapter, its scale], ...])`.
    """
    return [
        (name, module.merged, [[adapter, _scale(module, adapter)] for adapter in module.active_adapters])
        for name, module in peft_model.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]


def _scale(module, adapter):
    scales = getattr(module, "scaling", {})
    return scales.get(adapter) if isinstance(scales, dict) else None


def adapter_fingerprint(model: Any, settings: Any) -> str:
    """Fingerprint of active adapters and memory tokens, and of the settings that memories depend on.

    The dtype in which the same values are held does not matter.

    Args:
        model: A `Network`.
        settings: Settings of its adapters, values for JSON: see `adapter_settings`.

    Returns:
        BLAKE2 digest, 32 hexadecimal digits.
    """
    # A setting that was added later is left out while it has its default, so that older memories still fit.
    values, defaults = model.r3mem_config.to_dict(), dataclasses.asdict(R3MemConfig())
    added = {"segment_overlap"}
    values = {k: v for k, v in values.items() if k not in TRAINING_SETTINGS and not (k in added and v == defaults[k])}
    described = [values, settings]
    digest = hashlib.blake2b(json.dumps(described, sort_keys=True, default=str).encode(), digest_size=16)
    tensors = {} if model.memory_embeddings is None else {"memory_embeddings": model.memory_embeddings}
    for adapter in model.peft_model.active_adapters:
        # Without embeddings: the base model's fingerprint covers them, and PEFT would ask a model hub about them.
        found = get_peft_model_state_dict(model.peft_model, adapter_name=adapter, save_embedding_layers=False)
        tensors |= {f"{adapter}/{name}": tensor for name, tensor in found.items()}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        tensor = tensor.detach().float() if tensor.is_floating_point() else tensor
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def layout_fingerprint(layout: MemoryLayout) -> str:
    """Fingerprint of what matched memories of a base model depend on beside it."""
    described = json.dumps(layout.to_dict(), sort_keys=True)
    return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()


class FingerprintCache:
    """Keeps a network's fingerprints, and computes them again when its weights or settings have changed."""

    def __init__(self):
        self._base: tuple[list, str] | None = None
        self._origins: tuple[tuple, dict[bool, Origin]] | None = None

    def base(self, peft_model: Any) -> str:
        """Fingerprint of the base model inside of a PeftModel."""
        stamps = _base_stamps(peft_model)
        if self._base is None or self._base[0] != stamps:
            self._base = (stamps, fingerprint(peft_model))
        return self._base[1]

    def set_base(self, peft_model: Any, fingerprint: str) -> None:
        """Take over the fingerprint of a base model that has just been computed.

        Args:
            peft_model: The PeftModel around it.
            fingerprint: Fingerprint of its weights as they are now.
        """
        self._base = (_base_stamps(peft_model), fingerprint)

    def origin(self, network: Any, adapters_off: bool) -> Origin:
        """Fingerprints that the memories of a network carry.

        Args:
            network: The `Network`.
            adapters_off: Whether they are made while its adapters are off.
        """
        settings = adapter_settings(network.peft_model)
        of_base = base_parameters(network.peft_model)
        ids = set(map(id, of_base))
        own = [parameter for parameter in network.parameters() if id(parameter) not in ids]
        known = (_stamps(of_base), _stamps(own, changing=True), settings)
        if self._origins is None or self._origins[0] != known:
            self._origins = (known, {})
        found = self._origins[1]
        if adapters_off not in found:
            adapter = adapter_fingerprint(network, [settings, adapters_off])
            found[adapters_off] = Origin(self.base(network.peft_model), adapter)
        return found[adapters_off]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Fingerprint of a tokenizer: its vocabulary, and its token ids for a line of many kinds of characters.

    Args:
        tokenizer: The tokenizer.

    Returns:
        BLAKE2 digest, 32 hexadecimal digits.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    probe = tokenizer(_PROBE, add_special_tokens=False).input_ids
    return hashlib.blake2b(json.dumps([vocabulary, probe]).encode(), digest_size=16).hexdigest()


def _base_stamps(peft_model):
    return _stamps(base_parameters(peft_model))


def _stamps(parameters, changing=False):
    """Stamps of parameters, which change with their values; of frozen ones, unless `changing`, as PyTorch says."""
    # Fused optimizers, transformers' default, change values and leave versions as they are.
    learning = [sum_of_bits(p) for p in parameters if changing or p.requires_grad]
    sums = torch.stack([found.to(learning[0].device) for found in learning]).tolist() if learning else []
    return [[(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters], sums]
