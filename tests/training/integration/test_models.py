"""Base models that were changed before: 4-bit weights, Liger's kernels, a loss of their own, a device map."""

import sys
import types

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama import modeling_llama

from r3mem_fast import R3MemModel, make_reversible
from r3mem_fast.training.history import collate_windows
from tests.reversible.tiny import (
    assert_gradients_as_stored,
    assert_same_gradients,
    build,
    stored_activations,
    token_ids,
)
from tests.test_model_history import step
from tests.test_model_memory import made
from tests.training.integration.training import Rows, learned, losses_of, memory_network, trainer_of

# Wide enough for 4-bit blocks.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    build(scale=2.0, **WIDE).save_pretrained(folder)
    return folder


@pytest.fixture
def quantised(wide_folder):
    """Loads the model in NF4, with double quantisation, prepared as QLoRA recipes do it."""

    def load():
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(wide_folder, quantization_config=config, device_map={"": DEVICE})
        assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
        return prepare_model_for_kbit_training(model)

    return load


@pytest.mark.skipif(sys.platform != "linux", reason="bitsandbytes is installed for development on Linux")
@pytest.mark.parametrize("first", ["make_reversible", "adapters"])
def test_qlora_reversible(quantised, first):
    """Loss and gradients are those of stored activations, bit for bit; every adapter weight has one."""
    model = quantised()
    if first == "make_reversible":
        make_reversible(model)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    if first == "adapters":
        make_reversible(model)
    ids = token_ids().to(DEVICE)
    assert_gradients_as_stored(model.train(), ids)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.skipif(sys.platform != "linux", reason="bitsandbytes is installed for development on Linux")
def test_qlora_memory_network(quantised, tmp_path):
    """Several segments are replayed with the gradients of stored ones, Trainer's loss falls, and its checkpoint holds
    what learns and none of the quantised weights, nor their scales."""
    batch = collate_windows(Rows(6).rows)
    ids, mask = batch["input_ids"].to(DEVICE), batch["attention_mask"].to(DEVICE)
    loss, found = step(made(base=quantised()).train(), ids, mask)
    kept = made(base=quantised(), kept_segments="device").train()
    with stored_activations(kept):
        expected_loss, expected = step(kept, ids, mask)
    assert loss == expected_loss
    assert_same_gradients(found, expected, 1e-5)
    model = memory_network(base=quantised())
    losses = losses_of(trainer_of(tmp_path, model, use_cpu=DEVICE == "cpu"))
    assert losses[-1] < losses[0]
    state = model.state_dict()
    assert state.keys() == learned(model).keys()
    assert not any(made(base=quantised()).load_state_dict(state))


@pytest.fixture
def with_liger(monkeypatch):
    """Puts Liger's kernels on a model: all of them on a GPU; on the CPU, by Triton's interpreter, those it can run."""
    if sys.platform != "linux":
        pytest.skip("Liger needs Triton, which is for Linux")
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    # Liger replaces this for all models, for good.
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)

    def apply(model, **kernels):
        if DEVICE == "cpu":
            kernels = {"rms_norm": False, "swiglu": False, **kernels}
        _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=True, **kernels)
        return model

    return apply


def test_liger_reversible(with_liger):
    """Liger's fused loss makes no logits; loss and gradients are those of the same network without Liger."""
    ids = token_ids(tokens=12).to(DEVICE)
    expected_loss, expected = step(make_reversible(build(scale=2.0).to(DEVICE)), ids)
    model = make_reversible(with_liger(build(scale=2.0).to(DEVICE)))
    assert model(input_ids=ids, labels=ids).logits is None
    loss, found = step(model, ids)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(found, expected, 1e-4)


@pytest.mark.slow
def test_liger_reversible_in_training(with_liger, tmp_path):
    """Every loss of three steps with adapters is that of the same network without Liger. On the CPU that is Liger's
    rotary embedding and fused loss: its other kernels call a method of a number, which Triton's interpreter lacks."""

    def train(liger):
        base = build(scale=2.0).to(DEVICE)
        model = make_reversible(with_liger(base) if liger else base)
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        data = Rows(6, lengths=(12,))
        return losses_of(trainer_of(tmp_path, model, data, max_steps=3, use_cpu=DEVICE == "cpu"))

    losses = train(liger=True)
    assert losses == pytest.approx(train(liger=False), rel=1e-4)
    assert losses[-1] < losses[0]


def test_liger_memory_network(with_liger):
    """In training every segment's loss is Liger's, without logits; in evaluation there are logits."""
    ids = token_ids(tokens=20).to(DEVICE)
    plain = made(base=build(scale=2.0).to(DEVICE)).to(DEVICE).train()
    # Interpreted, Liger's rotary embedding takes seconds.
    kernels = {"rope": False} if DEVICE == "cpu" else {}
    expected_loss, expected = step(plain, ids)
    model = made(base=with_liger(build(scale=2.0).to(DEVICE), **kernels)).to(DEVICE).train()
    loss, found = step(model, ids)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(found, expected, 1e-4)
    with torch.no_grad():
        logits = model.eval()(ids, labels=ids).logits
        assert torch.allclose(logits, plain.eval()(ids, labels=ids).logits, atol=1e-4)


def test_liger_asked_of_trainer(tmp_path):
    """`use_liger_kernel=True` changes nothing: Trainer says that it applies no kernels, trains and evaluates."""
    settings = {"eval_dataset": Rows(6), "eval_strategy": "steps", "eval_steps": 2, "prediction_loss_only": True}

    def run(**more):
        trainer = trainer_of(tmp_path, memory_network(), **settings, **more)
        return losses_of(trainer), [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]

    assert run(use_liger_kernel=True) == run()


def with_fused_loss(base):
    """A base model whose forward computes the loss from its head's weight and returns no logits, as Liger's does."""

    def forward(self, input_ids=None, labels=None, shift_labels=None, num_items_in_batch=None, **inputs):
        hidden = self.model(input_ids=input_ids, **inputs).last_hidden_state
        hidden = hidden.view(-1, hidden.shape[-1])
        logits = nn.functional.linear(hidden, self.lm_head.weight)
        loss = nn.functional.cross_entropy(logits, shift_labels.view(-1), reduction="sum") / num_items_in_batch
        return CausalLMOutputWithPast(loss=loss)

    base.forward = types.MethodType(forward, base)
    return base


def test_a_loss_without_logits():
    """The losses and gradients of a model that makes its logits, in training and evaluation; where they are needed,
    an error says what to do."""
    batch = collate_windows(Rows(6).rows)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    model, plain = made(base=with_fused_loss(build(scale=2.0))).train(), made().train()
    loss, found = step(model, ids, mask)
    expected_loss, expected = step(plain, ids, mask)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(found, expected, 1e-4)
    with torch.no_grad():
        output = model.eval()(**batch)
    assert output.logits is None and output.loss.item() == pytest.approx(loss, rel=1e-5)
    taught = made(base=with_fused_loss(build(scale=2.0)), distillation_weight=0.5).train()
    # Its teacher needs a pass without labels, whose logits this stand-in would not make either.
    taught._teacher_logits = lambda memory, rows: torch.zeros(*rows.ids.shape, 96)
    with pytest.raises(ValueError, match="fused_linear_cross_entropy=False"):
        taught(**batch)


@pytest.mark.parametrize("device_map", ["auto", {"": DEVICE}])
def test_device_map_of_one_device(wide_folder, device_map):
    """Nothing is put on the layers, and the model trains as one that was loaded without a map."""
    ids = token_ids(tokens=20).to(DEVICE)
    found = []
    for settings in ({"device_map": device_map}, {}):
        base = AutoModelForCausalLM.from_pretrained(wide_folder, **settings).to(DEVICE)
        found.append(step(made(base=base).to(DEVICE).train(), ids))
    assert found[0][0] == found[1][0]
    assert_same_gradients(found[0][1], found[1][1])


def test_device_map_of_several_devices(wide_folder, tmp_path):
    """The hooks that move tensors between devices replace the layers' forward: the error says so, and what to do. The
    model is then as it was."""
    base = AutoModelForCausalLM.from_pretrained(wide_folder)
    ids = token_ids()
    with torch.no_grad():
        expected = base(ids).logits
    parts = [
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{i}" for i in range(4)),
    ]
    places = {name: "disk" if name == "model.layers.3" else "cpu" for name in parts}
    base = dispatch_model(base, places, offload_dir=tmp_path, main_device="cpu")
    with pytest.raises(ValueError, match=r"accelerate hook.*\n?.*load the model on one"):
        R3MemModel(base)
    with torch.no_grad():
        assert torch.equal(base(ids).logits, expected)
