"""Loads models that benchmarks measure: real ones by name, and random weights of real shapes, which need no hub."""

import importlib.util
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from r3mem_fast import R3MemConfig, R3MemModel, load_model
from r3mem_fast.data.text import read_text, token_windows

# Published shapes; the weights are random.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b-shape": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
    "smollm2-135m-shape": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
}
# Tokens whose logits exist at one time.
_LOSS_CHUNK = 2048


def load(
    name: str, *, dtype: torch.dtype, device: torch.device | str, tokens: int, batch: int, text: str | None
) -> tuple[Any, torch.Tensor]:
    """Load a model and a batch of tokens.

    Args:
        name: A key of `SHAPES`, for random weights and random tokens; else the name of a real model.
        dtype: dtype of the weights.
        device: Where both are put.
        tokens: Tokens of a sequence.
        batch: Number of sequences.
        text: A text file for a real model; None: the topics of Python's help.

    Returns:
        `(model, input_ids)`, where `input_ids` are int64 `[batch, tokens]`.
    """
    model: Any
    if name not in SHAPES:
        model, tokenizer = load_model(name, dtype=dtype)
        ids = token_windows(tokenizer, read_text(text), tokens=tokens, count=batch)
        return model.to(device), ids.to(device)
    config = LlamaConfig(**SHAPES[name], max_position_embeddings=1 << 20)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval(), torch.randint(config.vocab_size, (batch, tokens), device=device)


def network(name: str, config: R3MemConfig, **settings: Any) -> tuple[R3MemModel, torch.Tensor]:
    """Load a model as a memory network, in evaluation, and a batch of tokens.

    Args:
        name: As `load` takes it. Random weights get a fingerprint without being read, which takes as long as a large
            model has weights.
        config: Its settings.
        settings: More arguments of `load`.
    """
    base, ids = load(name, **settings)
    model = R3MemModel(base, config).eval()
    if name in SHAPES:
        model.set_base_fingerprint("0" * 32)
    return model, ids


def has_liger() -> bool:
    """Whether the package liger-kernel is installed."""
    return importlib.util.find_spec("liger_kernel") is not None


def apply_liger(model: torch.nn.Module) -> None:
    """Put Liger's RMSNorm, SwiGLU and rotary embedding into a Llama; cannot be undone in this process."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=False)


def fused_linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Compute the next-token loss without ever holding the whole logits.

    It is Liger's on a GPU where that is installed; else it is computed by chunks, whose logits are computed again in
    the backward pass.

    Args:
        hidden: Last hidden states, `[batch, tokens, width]`.
        weight: Weight of the head, `[vocabulary, width]`.
        ids: Token ids, int64 `[batch, tokens]`.

    Returns:
        The mean cross-entropy in nats, a scalar.
    """
    hidden, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    if hidden.is_cuda and has_liger():
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets)

    def loss_of(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(functional.linear(hidden, weight).float(), targets, reduction="sum")

    chunks = zip(hidden.split(_LOSS_CHUNK), targets.split(_LOSS_CHUNK), strict=True)
    return sum(checkpoint(loss_of, *chunk, use_reentrant=False) for chunk in chunks) / targets.numel()
