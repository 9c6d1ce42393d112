"""Which modules of mixtures of experts are adapted, and that experts which PEFT parametrises train exactly."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import ParamWrapper

from r3mem_fast import MomentumCoupling, R3MemConfig, R3MemModel, make_reversible
from r3mem_fast.integrations.peft import renamed_targets
from r3mem_fast.reversible.stack import Mode
from tests.reversible.tiny import MIXTURES, assert_gradients_as_stored, assert_same_gradients, build, token_ids

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no exact branch is known:UserWarning", "ignore:adapters leave out:UserWarning"
)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def with_adapted_experts():
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], target_parameters=EXPERTS)
    model = get_peft_model(build("qwen3_moe", scale=2.0), lora)
    assert any(isinstance(module, ParamWrapper) for module in model.modules())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def renames():
    """Whether this version of PEFT takes names of modules for experts."""
    return renamed_targets(build("glm4_moe"), LoraConfig(target_modules=["gate_proj", "up_proj"])) == set()


def adapted(**settings):
    model = R3MemModel(build("glm4_moe", scale=2.0), R3MemConfig(core=(2, 3), **settings))
    return {name for name, p in model.peft_model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", MIXTURES)
def test_layers_below_the_first_adapted_one_and_experts_are_not_adapted(family):
    model = R3MemModel(build(family), R3MemConfig(core=(2, 3), first_adapted_layer=2))
    names = {name for name, parameter in model.peft_model.named_parameters() if parameter.requires_grad}
    assert names and all(
        name.startswith(("base_model.model.model.layers.2", "base_model.model.model.layers.3")) for name in names
    )
    assert not any(isinstance(module, ParamWrapper) for module in model.modules())


def test_what_is_left_out_is_said_and_can_be_asked_for():
    if not renames():
        pytest.skip("this version of PEFT adapts modules by their names")
    with pytest.warns(
        UserWarning, match="adapters leave out down_proj, gate_proj, up_proj in the layers of a Glm4Moe"
    ):
        adapted()
    wanted = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*no exact branch is known")
        assert any("experts" in name for name in adapted(target_modules=wanted, first_adapted_layer=0))
    with pytest.raises(ValueError, match="PEFT adapts the experts of all layers"):
        adapted(target_modules=wanted, first_adapted_layer=1)


def test_a_folder_adapts_the_same_modules(tmp_path):
    model = R3MemModel(build("qwen3_moe"), R3MemConfig(core=(2, 3), first_adapted_layer=2))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's, for adapters that are missing
        again = PeftModel.from_pretrained(build("qwen3_moe"), tmp_path)
    lora = [name for name, _ in model.peft_model.named_parameters() if "lora_" in name]
    assert lora and lora == [name for name, _ in again.named_parameters() if "lora_" in name]


def test_adapted_experts_have_gradients_of_stored_activations():
    model = make_reversible(with_adapted_experts(), MomentumCoupling(fraction_bits=20))
    assert_gradients_as_stored(model, token_ids())
    names = {name for name, p in model.named_parameters() if p.requires_grad and "experts" in name}
    assert names


def test_adapted_experts_learn_through_segments():
    settings = {"num_memory_tokens": 3, "segment_length": 8, "core": (1, 3), "fraction_bits": 20}
    model = R3MemModel(with_adapted_experts(), R3MemConfig(**settings)).train()
    ids, found = token_ids(), []
    for mode in (model.stack.mode, Mode.STORED):
        with model.stack.in_mode(mode):
            model(ids, labels=ids).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert any("experts" in name for name in found[0])
    assert_same_gradients(*found, tolerance=1e-5)


def test_other_parameters_are_watched_all_the_same():
    model = make_reversible(with_adapted_experts(), MomentumCoupling(fraction_bits=20))
    loss = model(input_ids=token_ids(), labels=token_ids()).loss
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "experts" in name and p.requires_grad).add_(1)
    with pytest.raises(RuntimeError, match="was modified in place"):
        loss.backward()


def test_adapters_of_experts_act_on_all_tokens():
    with pytest.raises(ValueError, match='adapter_rows="memory" needs one adapter'):
        R3MemModel(with_adapted_experts(), R3MemConfig(num_memory_tokens=3, adapter_rows="memory"))
