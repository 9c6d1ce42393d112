"""What cannot work says so, and what to do instead."""

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    BertConfig,
    BertForMaskedLM,
    CLIPModel,
    GPT2LMHeadModel,
    T5EncoderModel,
    T5ForConditionalGeneration,
    WhisperForConditionalGeneration,
)

from r3mem_fast import MomentumCoupling, R3MemModel, check_gradients, check_inverse, make_reversible
from r3mem_fast.tiny_models import tiny_model
from tests.reversible.tiny import build, token_ids, train_step


def loss_of(model):
    return model(input_ids=token_ids(), labels=token_ids()).loss


def test_retain_graph():
    """The first backward pass is right even with retain_graph; the second raises."""
    model = make_reversible(build())
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()


def test_double_backward():
    model = make_reversible(build())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss_of(model), list(model.parameters()), create_graph=True)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_in_place_edit_between_layers(mode):
    model = make_reversible(build())

    def edit(module, inputs, output):
        output.mul_(2.0)

    model.model.layers[1].register_forward_hook(edit)
    with mode(), pytest.raises(RuntimeError, match=r"layer 2 .LlamaDecoderLayer.*edited it in place"):
        model(token_ids())


def test_replaced_hidden_state_between_layers():
    model = make_reversible(build())
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: output * 2.0)
    with pytest.raises(RuntimeError, match="did not receive the output of the layer before it"):
        model(token_ids())


def test_a_layer_on_its_own():
    model = make_reversible(build())
    with pytest.raises(RuntimeError, match="layer 1"):
        model.model.layers[1](torch.randn(1, 3, 32))


def test_a_failed_forward_pass_leaves_no_trace():
    model = make_reversible(build())
    expected, _ = train_step(model, token_ids())
    handle = model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(token_ids())
    handle.remove()
    assert train_step(model, token_ids())[0] == expected


def small(kind, **settings):
    """A random model of a class of transformers, from a configuration with these settings."""
    return kind(kind.config_class(**settings))


_CLIP = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
# What is no model that could be made reversible, and what is said of it.
REFUSED = {
    "t5": ("T5ForConditionalGeneration has cross-attention to an encoder", ValueError),
    "t5 encoder": ("returns `position_bias` beside its hidden state", ValueError),
    "whisper": ("WhisperForConditionalGeneration has cross-attention to an encoder", ValueError),
    "clip": ("CLIPModel compares the outputs of two encoders; convert one of them", ValueError),
    "gpt2 with cross-attention": ("only decoder-only", ValueError),
    "xlnet": ("XLNetLayer returns `output_g` beside its hidden state", ValueError),
    "xlm": ("XLMWithLMHeadModel has 4 lists of parts of layers .attentions, ", TypeError),
    "hy_v4": ("HYV4DecoderLayer returns `prev_topk_indices` beside its hidden state", ValueError),
    "hrm_text": ("HrmTextForCausalLM has lists of others .*does not run once through one", TypeError),
    "reformer": ("ReformerLayer returns `prev_attn_output` beside its hidden state", ValueError),
    "a module": (
        "Linear has no list of layers; make_reversible takes a transformers causal language model",
        TypeError,
    ),
}


def refused_model(name):
    t5 = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 3, "num_heads": 2, "vocab_size": 32}
    if name == "t5":
        return small(T5ForConditionalGeneration, **t5)
    if name == "t5 encoder":
        return small(T5EncoderModel, **t5)
    if name == "whisper":
        sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 32}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 2, "decoder_layers": 2}
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        return small(WhisperForConditionalGeneration, **sizes, **heads, **ids)
    if name == "clip":
        images = {**_CLIP, "num_hidden_layers": 3, "image_size": 16, "patch_size": 8}
        return small(CLIPModel, text_config={**_CLIP, "num_hidden_layers": 2}, vision_config=images)
    if name == "gpt2 with cross-attention":
        return small(GPT2LMHeadModel, n_embd=16, n_layer=2, n_head=2, vocab_size=32, add_cross_attention=True)
    return torch.nn.Linear(2, 2) if name == "a module" else tiny_model(name)


@pytest.mark.parametrize("convert", [make_reversible, R3MemModel])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_reversible_is_refused_and_left_as_it_is(name, convert):
    """At the conversion, not in the first pass, with the reason; nothing is changed."""
    if name in ("hy_v4", "hrm_text") and name not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {name}")
    model = refused_model(name)
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    why, kind = REFUSED[name]
    with pytest.raises(kind, match=why):
        convert(model)
    after = [(type(module), dict(vars(module))) for module in model.modules()]
    assert len(before) == len(after)
    for (kind_before, own_before), (kind_after, own_after) in zip(before, after, strict=True):
        assert kind_after is kind_before and own_after.keys() == own_before.keys()
        assert all(own_after[name] is value for name, value in own_before.items())
        assert not own_after["_forward_hooks"] and not own_after["_forward_pre_hooks"]


def test_bidirectional_encoder_is_refused_or_exact():
    """BERT is no decoder: its layers return tuples in some versions; whatever it does, it must not be wrong."""
    model = BertForMaskedLM(
        BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=96)
    )
    with pytest.warns(UserWarning, match="no exact branch"):
        make_reversible(model)
    assert check_inverse(model, token_ids()).exact


def test_reversible_twice():
    with pytest.raises(ValueError, match="reversible already"):
        make_reversible(make_reversible(build()))


def test_forward_set_on_a_layer_instance():
    """Such as accelerate's hooks set: they would be bypassed, so they are refused."""
    model = build()
    layer = model.model.layers[3]
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(ValueError, match=r"layer 3 .LlamaDecoderLayer. has a forward of its own"):
        make_reversible(model)


def test_forward_set_on_a_reversible_layer_is_honoured():
    model = make_reversible(build())
    layer, calls = model.model.layers[3], []
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    train_step(model, token_ids())
    assert calls == [1]


def test_captured_attentions_while_gradients_are_on():
    model = make_reversible(build(attn_implementation="eager"))
    with pytest.raises(ValueError, match="output_attentions=True while gradients are on"):
        model(token_ids(), output_attentions=True)
    with torch.no_grad():
        assert len(model(token_ids(), output_attentions=True).attentions) == 4


@pytest.mark.parametrize("bits", [0, 3, 16, [4, 5], [], "4"])
def test_bits_out_of_the_set(bits):
    with pytest.raises(ValueError, match="bits must be one of"):
        MomentumCoupling(bits=bits)


@pytest.mark.parametrize("fraction_bits", [-1, 25, 16.0, "automatic"])
def test_fraction_bits_out_of_range(fraction_bits):
    with pytest.raises(ValueError, match=r"fraction_bits must be 'auto' or an integer in 0..24"):
        MomentumCoupling(fraction_bits=fraction_bits)


def test_wrong_settings_leave_the_model_as_it_was():
    model = build()
    with pytest.raises(TypeError, match="must be a Coupling"):
        make_reversible(model, 4)
    with pytest.raises(ValueError, match="integrity must be one of"):
        make_reversible(model, integrity="never")
    for check in (check_inverse, check_gradients):
        with pytest.raises(ValueError, match="not reversible"):
            check(model, token_ids())


def test_gradients_of_a_frozen_model_cannot_be_checked():
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        check_gradients(make_reversible(build()).requires_grad_(False), token_ids())


def test_float64_is_refused():
    with pytest.raises(TypeError, match="bfloat16, float16 or float32"):
        make_reversible(build(dtype=torch.float64))(token_ids())


def test_layers_that_return_their_states():
    model = make_reversible(tiny_model("xlstm"))
    with torch.no_grad():
        with pytest.raises(TypeError, match=r"xLSTMBlock was given a state.*use_cache=False"):
            model(token_ids())
        assert model(token_ids(), use_cache=False).logits.isfinite().all()
