import os

# Set before transformers is imported: a test that would reach for a model hub fails at once, here and in CI.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Without it some versions of PyTorch refuse deterministic matrix products on a GPU. Read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from hypothesis import settings

# Read when a kernel is defined. Kernels run only where a test asks for them: on the CPU the reference is the default.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The first example of a property pays for imports and compilation, so a deadline per example says nothing.
settings.register_profile("r3mem", deadline=None)
settings.load_profile("r3mem")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny Llama in a folder, with a tokenizer of a letter a token."""
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def write_tiny_model(folder):
    """Write the model of the fixture `folder`, the same every time."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.reversible.tiny import build

    model = build(scale=2.0)
    with torch.no_grad():
        model.lm_head.weight.mul_(20.0)  # so that it can be sure of a token
    model.config.eos_token_id = model.generation_config.eos_token_id = 94  # "~", which no text here has
    model.save_pretrained(folder)
    vocabulary = {chr(32 + i): i for i in range(95)} | {"\n": 95}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="~"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="~").save_pretrained(folder)
    return folder
