"""The models that benchmarks train: real ones by name, and random weights of real shapes for GPUs far from any hub."""

import importlib.util

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from r3mem_fast import load_model
from r3mem_fast.data.text import read_text, token_windows

# Published shapes; the weights are random.
SHAPES = {
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


def load(name, *, dtype, device, tokens, batch, text):
    """`(model, input_ids [batch, tokens])` on `device`: of `SHAPES` with random tokens, else real, with real text.

    text: a file, None for the topics of Python's help; random weights ignore it.
    """
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


def has_liger():
    return importlib.util.find_spec("liger_kernel") is not None


def apply_liger(model):
    """Liger's RMSNorm, SwiGLU and rotary embedding in a Llama; not to be undone in this process."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=False)


def fused_linear_cross_entropy(hidden, weight, ids):
    """Next-token loss without the whole logits: hidden `[batch, tokens, width]`, weight `[vocabulary, width]`.

    Liger's on a GPU where it is installed, else by chunks whose logits are computed again in the backward pass.
    """
    hidden, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    if hidden.is_cuda and has_liger():
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets)

    def loss_of(hidden, targets):
        return functional.cross_entropy(functional.linear(hidden, weight).float(), targets, reduction="sum")

    chunks = zip(hidden.split(_LOSS_CHUNK), targets.split(_LOSS_CHUNK), strict=True)
    return sum(checkpoint(loss_of, *chunk, use_reentrant=False) for chunk in chunks) / targets.numel()
