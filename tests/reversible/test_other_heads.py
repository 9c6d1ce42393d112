"""Models that are no causal language models alone: other heads, encoders, images, and language models that see."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    SiglipVisionConfig,
    ViTConfig,
    ViTForImageClassification,
)

from r3mem_fast import MomentumCoupling, check_gradients, check_inverse, make_reversible, restore
from r3mem_fast.reversible.convert import stack_of
from tests.reversible.tiny import token_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*no exact branch is known:UserWarning")

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_TEXT = {
    **_SIZES,
    **{"vocab_size": 96, "num_hidden_layers": 4, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_MODERN = {**_TEXT, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2, "local_attention": 8}
# As many layers as the text has: then which of the two is converted is not told by their numbers.
_IMAGES = {**_SIZES, "num_hidden_layers": 4, "image_size": 16, "patch_size": 8}
_SHARED = {"num_key_value_heads": 2, "head_dim": 8}
TEXT_HEADS = {
    "bert": (
        lambda: BertConfig(**_TEXT, **_STILL, num_labels=3),
        (BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification),
    ),
    "roberta": (
        lambda: RobertaConfig(**_TEXT, **_STILL, num_labels=3),
        (RobertaForMaskedLM, RobertaForSequenceClassification, RobertaForTokenClassification),
    ),
    "modernbert": (
        lambda: ModernBertConfig(**_MODERN, num_labels=3),
        (ModernBertForMaskedLM, ModernBertForSequenceClassification, ModernBertForTokenClassification),
    ),
    "llama": (
        lambda: LlamaConfig(**_TEXT, **_SHARED, num_labels=3),
        (LlamaForSequenceClassification, LlamaForTokenClassification),
    ),
}


def made(kind, config):
    """A tiny random model in train mode, whose branches matter."""
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
    return model.train()


def labels_for(kind, ids):
    if "SequenceClassification" in kind.__name__:
        return torch.arange(len(ids)) % 3
    return ids % 3 if "TokenClassification" in kind.__name__ else ids


def assert_reversible(model, *ids, **inputs):
    """The inverse is exact, gradients are those of stored activations, and the plain model comes back."""
    labels = inputs.pop("labels")
    with torch.no_grad():
        expected = model.eval()(*ids, **inputs).logits
    make_reversible(model.train(), MomentumCoupling())
    inverse = check_inverse(model, *ids, **inputs)
    assert inverse.exact and inverse.layers == 4
    gradients = check_gradients(model, *ids, labels=labels, **inputs)
    assert gradients.max_relative_error < 1e-5 and gradients.loss == gradients.loss_stored > 0
    with torch.no_grad():
        assert torch.equal(restore(model).eval()(*ids, **inputs).logits, expected)


@pytest.mark.parametrize("kind", [kind for _, kinds in TEXT_HEADS.values() for kind in kinds])
def test_heads_of_text_models(kind):
    """Masked language models, classification of texts and of tokens; a row is padded on the right."""
    config = next(config for config, kinds in TEXT_HEADS.values() if kind in kinds)
    ids, mask = token_ids(3, 12), torch.ones(3, 12, dtype=torch.int64)
    ids[1, 7:], mask[1, 7:] = 0, 0
    assert_reversible(made(kind, config()), ids, attention_mask=mask, labels=labels_for(kind, ids))


def test_images():
    """A ViT takes images by keyword, and no tokens."""
    model = made(ViTForImageClassification, ViTConfig(**_IMAGES, **_STILL, num_labels=3))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert_reversible(model, pixel_values=pixels, labels=torch.tensor([0, 2]))
    make_reversible(model)
    assert check_inverse(model, pixel_values=pixels).tokens == 2 * 5  # four patches and the class
    with pytest.raises(ValueError, match="needs a loss"):
        check_gradients(model, pixel_values=pixels)


def llava():
    text = LlamaConfig(**_TEXT, **_SHARED)
    return made(
        LlavaForConditionalGeneration,
        LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(**_IMAGES), image_token_id=95),
    )


def gemma3():
    text = Gemma3TextConfig(**_TEXT, **_SHARED, query_pre_attn_scalar=8, sliding_window=8)
    config = Gemma3Config(
        text_config=text, vision_config=SiglipVisionConfig(**_IMAGES), mm_tokens_per_image=4, image_token_id=95
    )
    return made(Gemma3ForConditionalGeneration, config)


def qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = Qwen2VLConfig(
        text_config={**_TEXT, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={"depth": 4, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8},
        image_token_id=95,
    )
    return made(Qwen2VLForConditionalGeneration, config)


@pytest.mark.parametrize("make", [llava, gemma3, qwen2_vl])
def test_text_of_models_that_see(make):
    """The layers of their language model are reversible; those that read images stay what they were."""
    model, ids = make(), token_ids(2, 17).clamp(max=94)
    assert_reversible(model, ids, labels=ids)
    make_reversible(model)
    inside = {id(module) for module in model.get_decoder().modules()}
    converted = [module for module in model.modules() if hasattr(module, "reversible")]
    assert len(converted) == len(stack_of(model).bits) == 4 and all(id(layer) in inside for layer in converted)


@pytest.mark.parametrize("make", [llava, gemma3])
def test_images_before_the_text(make):
    """What a model sees has gradients through the reversible layers of its text, too."""
    model, ids = make(), token_ids(2, 17).clamp(max=94)
    ids[:, 2:6] = 95
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = {"token_type_ids": (ids == 95).long()} if make is gemma3 else {}
    assert_reversible(model, ids, pixel_values=pixels, labels=ids, **inputs)
