"""What configurations say of positions and special tokens, by whatever name and in whichever part."""

import pytest

from r3mem_fast.positions import positions_of, special_id
from r3mem_fast.tiny_models import tiny_model


@pytest.mark.parametrize("family", ["llama", "gpt2", "whisper", "gemma3"])
def test_positions(family):
    assert positions_of(tiny_model(family)) == 128


def test_special_tokens():
    """A model's own ids count, else those of its language model; of a list the first one."""
    model = tiny_model("gemma3")
    assert special_id(model, "eos_token_id") == 2
    model.config.eos_token_id = [7, 8]
    assert special_id(model, "eos_token_id") == 7
    model.config.eos_token_id = model.config.text_config.eos_token_id = None
    assert special_id(model, "eos_token_id") is None
