"""Mixtures of experts: exact, with gradients equal to those of stored activations, whatever computes the experts."""

from unittest import mock

import pytest
import torch

from r3mem_fast import MomentumCoupling, R3MemConfig, R3MemModel, check_inverse, make_reversible
from r3mem_fast.reversible.branches import branch_of, llama_branch
from r3mem_fast.reversible.experts import order_experts
from tests.memory.test_matched import check_that_nothing_is_lost, ids_of, network
from tests.reversible.tiny import MIXTURES, assert_gradients_as_stored, build, token_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*no exact branch is known:UserWarning")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", MIXTURES)
def test_exact(family, implementation, dtype):
    base = build(family, dtype=dtype, scale=2.0)
    if implementation != "eager" and not base._can_set_experts_implementation():
        pytest.skip("this version of transformers has one implementation of its experts")
    if base._can_set_experts_implementation():
        base.set_experts_implementation(implementation)
    model = make_reversible(base, MomentumCoupling(fraction_bits=20))
    report = check_inverse(model, token_ids())
    assert report.exact
    assert_gradients_as_stored(model, token_ids())


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_branches_that_are_known(family):
    layers = build(family).model.layers
    assert {branch_of(type(layer)) for layer in layers} == {llama_branch}


@pytest.mark.parametrize("family", MIXTURES)
def test_matched_memories(family):
    """With a slot for every token a memory is the context; gpt-oss has windows and attention sinks, too."""
    check_that_nothing_is_lost(family, "eager" if family == "gpt_oss" else "sdpa")


@pytest.mark.parametrize("family", MIXTURES)
def test_what_is_written_behind_a_memory_is_what_its_logits_say(family):
    model = network(family, of_base={"attn_implementation": "eager"})
    memory, text = model.compress(ids_of(70)), ids_of(4, seed=1)
    written = model.generate(text, memory=memory, max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        said = model(written[:, :-1], memory=memory).logits[:, 3:].argmax(-1)
    assert torch.equal(said, written[:, 4:])


def test_experts_that_add_in_no_order_are_replaced_on_a_gpu():
    base = build("mixtral")
    base.set_experts_implementation("eager")
    order_experts(base, base.config)
    assert base.config._experts_implementation == "eager"  # which is exact on a CPU
    on_gpu = mock.patch.object(type(base), "device", torch.device("cuda", 0))
    with on_gpu, pytest.warns(UserWarning, match="adds in no fixed order"):
        order_experts(base, base.config)
    assert base.config._experts_implementation == "grouped_mm"


def test_a_router_s_loss_is_refused():
    model = R3MemModel(build("mixtral", output_router_logits=True), R3MemConfig(core=(1, 3)))
    with pytest.raises(ValueError, match="output_router_logits"):
        model(token_ids(), labels=token_ids(), query_input_ids=token_ids())
