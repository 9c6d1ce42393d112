"""`accelerate launch` runs a training script of one's own, with accumulated gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r3mem_fast.training.history import collate_windows
from tests.reversible.tiny import assert_same_gradients
from tests.test_model_history import step
from tests.training.integration.accelerated import ACCUMULATED, LEARNING_RATE, ROWS, STEPS
from tests.training.integration.training import Rows, memory_network

ROOT = Path(__file__).resolve().parents[3]


def test_accelerate_launch(tmp_path):
    """Each step of three batches is that of one batch of all their rows: every loss, and the first gradients."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    ]
    output = tmp_path / "trained.pt"
    script = ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "tests.training.integration.accelerated"]
    done = subprocess.run(
        [*launch, *script, str(output)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trained = torch.load(output)
    model = memory_network()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    rows = Rows(ROWS * ACCUMULATED * STEPS).rows
    losses = []
    for index in range(STEPS):
        batch = collate_windows(rows[index * ROWS * ACCUMULATED :][: ROWS * ACCUMULATED])
        loss, found = step(model, batch["input_ids"], batch["attention_mask"])
        losses.append(loss)
        if index == 0:
            assert_same_gradients(trained["gradients"], found, 1e-4)
        for name, parameter in model.named_parameters():
            parameter.grad = found.get(name)
        optimizer.step()
        optimizer.zero_grad()
    assert trained["losses"] == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0]
