"""`train` with adapters in bfloat16: losses of float32 adapters, resumed bit for bit, and float32 in every file."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from r3mem_fast import R3MemModel, load_model
from r3mem_fast.cli import main
from r3mem_fast.integrations.masters import masters_of
from r3mem_fast.manifest import TRAIN_CHECKPOINTS
from r3mem_fast.training import history as module
from r3mem_fast.training.history import train
from tests.training.test_history import CONFIG, SETTINGS, TEXT, rows, weights

ROUNDED = dataclasses.replace(SETTINGS, adapter_precision="bfloat16", accumulate=2)


def fresh(folder, config=CONFIG):
    base, tokenizer = load_model(str(folder), dtype=torch.bfloat16)
    torch.manual_seed(0)
    return R3MemModel(base, config), tokenizer


def are_masters(saved):
    """Whether all tensors are float32, and those that have been stepped are more than rounded numbers."""
    stepped = [tensor for name, tensor in saved.items() if "lora_A" not in name]  # whose first gradients are 0
    return {tensor.dtype for tensor in saved.values()} == {torch.float32} and not any(
        torch.equal(tensor, tensor.bfloat16().float()) for tensor in stepped
    )


def seen_in_training(monkeypatch):
    """Dtypes of what is trained and of its gradients, and whether autocast is on, at each step."""
    seen = set()
    check = module._CheckIntegrity.on_pre_optimizer_step

    def look(self, args, state, control, **kwargs):
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                seen.add((parameter.dtype, parameter.grad.dtype, args.bf16))
        check(self, args, state, control, **kwargs)

    monkeypatch.setattr(module._CheckIntegrity, "on_pre_optimizer_step", look)
    return seen


def test_the_losses_are_those_of_float32_adapters(folder, tmp_path, monkeypatch):
    """Through memories, with a teacher, over two passes a step: within 1e-2 nats of losses that fall by many."""
    config = dataclasses.replace(CONFIG, distillation_weight=0.5)
    found = {}
    for precision in ("float32", "bfloat16"):
        model, tokenizer = fresh(folder, config)
        settings = dataclasses.replace(ROUNDED, steps=50, adapter_precision=precision, checkpoint_steps=100)
        seen = seen_in_training(monkeypatch)
        report = train(model, rows(tokenizer), settings, folder=tmp_path / precision, progress=False)
        found[precision] = [loss for _, loss in report.losses]
        assert seen == {(getattr(torch, precision), torch.float32, precision == "float32")}
        assert {p.dtype for p in weights(model).values()} == {torch.float32} and not masters_of(model)
        monkeypatch.undo()
    assert found["bfloat16"] == pytest.approx(found["float32"], abs=1e-2)
    assert found["bfloat16"][-1] < found["bfloat16"][0] - 1


def test_an_interrupted_run_ends_as_an_uninterrupted_one(folder, tmp_path, monkeypatch):
    expected, tokenizer = fresh(folder)
    train(expected, rows(tokenizer), ROUNDED, folder=tmp_path / "whole", progress=False)
    model, _ = fresh(folder)
    before = weights(model)

    def interrupted(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(module._CheckIntegrity, "on_pre_optimizer_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, rows(tokenizer), ROUNDED, folder=tmp_path, progress=False)
    assert all(torch.equal(p, before[name]) and p.dtype == before[name].dtype for name, p in weights(model).items())
    monkeypatch.undo()
    checkpoint = tmp_path / TRAIN_CHECKPOINTS / "checkpoint-2"
    saved = load_file(checkpoint / "model.safetensors")
    assert are_masters(saved)
    train(model, rows(tokenizer), ROUNDED, folder=tmp_path, progress=False)
    assert all(torch.equal(p, weights(expected)[name]) for name, p in weights(model).items())
    # Killed on the way to saving, it has nothing left to do.
    again, _ = fresh(folder)
    train(again, rows(tokenizer), ROUNDED, folder=tmp_path, progress=False)
    assert all(torch.equal(p, weights(expected)[name]) for name, p in weights(again).items())
    with pytest.raises(ValueError, match="belongs to an unfinished run with other texts, settings"):
        other = dataclasses.replace(ROUNDED, adapter_precision="float32")
        train(fresh(folder)[0], rows(tokenizer), other, folder=tmp_path, progress=False)


def test_the_command(folder, tmp_path, capsys):
    (tmp_path / "book.txt").write_text(TEXT)
    command = ["train", str(tmp_path / "book.txt"), "-o", str(tmp_path / "out"), "--model", str(folder), "--json"]
    command += ["--memory-tokens", "2", "--segment-length", "8", "--steps", "2", "--device", "cpu"]
    command += ["--adapter-precision", "bfloat16"]
    assert main([*command, "--dtype", "float32"]) == 2
    assert "is for weights in bfloat16, and the model's are torch.float32" in capsys.readouterr().err
    assert main([*command, "--dtype", "bfloat16"]) == 0
    for name in ("adapter_model.safetensors", "memory_tokens.safetensors"):
        assert are_masters(load_file(tmp_path / "out" / name))
