"""Adapters that are added to the weights for inference, and taken out again."""

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model

from r3mem_fast import R3MemConfig, R3MemModel
from r3mem_fast.integrations.peft import MergedAdapters
from tests.reversible.tiny import build

IDS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))


def network(**changes):
    base = build("llama", scale=2.0)
    lora = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, **changes)
    torch.manual_seed(1)
    config = R3MemConfig(num_memory_tokens=3, segment_length=8, core=(1, 3))
    return R3MemModel(get_peft_model(base, lora), config).eval()


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}])
def test_they_compute_what_adapters_do_and_leave_no_trace(changes):
    model = network(**changes)
    before = weights(model)
    logits, memory = model(IDS).logits, model.compress(IDS, finish=True)
    behind, written = model(IDS, memory=memory).logits, model.generate(IDS, memory=memory, max_new_tokens=6)
    recalled = model.recall(IDS[:, :4], max_new_tokens=6)
    with model.disable_adapters():
        base = model(IDS).logits
    with model.merged_adapters():
        torch.testing.assert_close(model(IDS).logits, logits, atol=2e-3, rtol=2e-3)
        again = model.compress(IDS, finish=True)
        torch.testing.assert_close(again.states, memory.states, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(model(IDS, memory=memory).logits, behind, atol=2e-3, rtol=2e-3)
        assert torch.equal(model.generate(IDS, memory=memory, max_new_tokens=6), written)
        assert [row.tolist() for row in model.recall(IDS[:, :4], max_new_tokens=6)] == [r.tolist() for r in recalled]
        with model.disable_adapters():
            assert torch.equal(model(IDS).logits, base)
        torch.testing.assert_close(model(IDS).logits, logits, atol=2e-3, rtol=2e-3)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert torch.equal(model(IDS).logits, logits)
    model(IDS, memory=again)  # which fits, also outside


@torch.no_grad()
def test_adapters_compute_nothing_while_merged():
    model, calls = network(), []
    for name, module in model.named_modules():
        if name.rpartition(".")[0].endswith("lora_A"):
            module.register_forward_hook(lambda *_: calls.append(1))
    model(IDS)
    count = len(calls)
    with model.merged_adapters():
        model(IDS)
    assert count > 0 and len(calls) == count


def test_what_cannot_be_merged_is_said_and_nothing_is_changed():
    model = network()
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"call eval\(\)"), model.train().merged_adapters():
        pass
    model.eval()
    with model.merged_adapters(), pytest.raises(RuntimeError, match="once"), model.merged_adapters():
        pass
    with pytest.raises(KeyError), model.merged_adapters():
        raise KeyError
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name)[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"[Nn]a[Nn]"), model.merged_adapters():
        pass
    for name, parameter in model.named_parameters():
        assert "lora_B" in name or torch.equal(parameter, before[name]), name
    config = R3MemConfig(num_memory_tokens=3, segment_length=8, adapter_rows="memory", core=(1, 3))
    held = R3MemModel(build("llama"), config).eval()
    with pytest.raises(ValueError, match="some tokens alone"), held.merged_adapters():
        pass
    model.peft_model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters of this model already"), model.merged_adapters():
        pass


def test_nothing_may_change_weights_or_adapters_meanwhile():
    """Whatever PEFT or PyTorch would do to them would be undone, or done twice, at the end of the block."""
    model = network()
    before = weights(model)
    with model.merged_adapters():
        for change in (
            model.train,
            model.half,
            lambda: model.to(torch.bfloat16),
            model.peft_model.merge_adapter,
            model.peft_model.unload,
            model.peft_model.disable_adapter,
            model.merge_and_unload,
        ):
            with pytest.raises(RuntimeError, match="nothing may train, move or change"):
                change()
        model.eval()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    with model.peft_model.disable_adapter(), pytest.raises(ValueError, match="are off"), model.merged_adapters():
        pass
    model.train().eval().to(torch.float64)


def test_weights_that_are_shared_or_that_peft_would_replace_are_refused():
    base = build("llama")
    base.lm_head.weight = base.model.embed_tokens.weight
    tied = get_peft_model(base, LoraConfig(target_modules=["q_proj", "lm_head"]))
    normed = get_peft_model(build("llama"), LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"))
    for adapted in (tied, normed):
        before = weights(adapted)
        with pytest.raises(ValueError, match="cannot be merged and taken out again"):
            MergedAdapters(adapted)
        assert all(torch.equal(parameter, before[name]) for name, parameter in adapted.named_parameters())
