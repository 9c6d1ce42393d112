"""Writes and reads checkpoints of a run of `remember`, to go on from after an interruption."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...files import replacing, unfinished_files
from ...manifest import REMEMBER_CHECKPOINT

_VERSION = 4
# Attributes of a `Run` that a checkpoint holds beside the tensors.
_STATE = ("step", "epoch", "seconds", "queue", "known", "losses", "answered", "compress_loss", "divergence")


def write(run: Any) -> None:
    """Write the whole state of a run into one file: adapters, the optimizer's moments, and its progress.

    Args:
        run: The `Run`.
    """
    tensors = {}
    for name, parameter in run.parameters.items():
        tensors[f"parameter.{name}"] = parameter.detach()
        for moment in ("step", "exp_avg", "exp_avg_sq"):
            if moment in run.optimizer.state[parameter]:
                tensors[f"{moment}.{name}"] = run.optimizer.state[parameter][moment]
    state = {
        "version": _VERSION,
        "run": _identity(run),
        **{name: getattr(run, name) for name in _STATE},
    }
    run.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with replacing(run.checkpoint) as path:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            path,
            {"r3mem": json.dumps(state)},
        )


def read(run: Any) -> None:
    """Put a run into the state that its checkpoint holds.

    Args:
        run: The `Run`.

    Raises:
        ValueError: The checkpoint is damaged, or of another run.
    """
    try:
        with safe_open(run.checkpoint, "pt") as file:
            state = json.loads((file.metadata() or {})["r3mem"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        version, identity = state["version"], state["run"]
    except (SafetensorError, ValueError, KeyError, TypeError):
        raise ValueError(f"{run.checkpoint} is damaged; delete it to start again") from None
    if version != _VERSION or identity != _identity(run):
        raise ValueError(
            f"{run.checkpoint} belongs to an unfinished run with other documents, settings or another model. "
            "Finish that run, delete the file, or choose another folder"
        )
    for name in _STATE:
        setattr(run, name, state[name])
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            # A parameter that has had no gradient yet has no moments.
            if f"step.{name}" in tensors:
                run.optimizer.state[parameter] = {
                    "step": tensors[f"step.{name}"],
                    **{m: tensors[f"{m}.{name}"].to(parameter.device) for m in ("exp_avg", "exp_avg_sq")},
                }


def discard_checkpoint(folder: Path) -> None:
    """Delete the checkpoint that a run left in a folder."""
    checkpoint = folder / REMEMBER_CHECKPOINT
    for leftover in (checkpoint, *unfinished_files(checkpoint)):
        leftover.unlink(missing_ok=True)


def _identity(run):
    """Digest that is the same for a run and for the checkpoint that it may go on from."""
    settings = dataclasses.asdict(run.settings)
    for free in ("max_steps", "checkpoint_seconds"):
        del settings[free]
    shapes = {name: list(p.shape) for name, p in run.parameters.items()}
    model = [
        run.model.r3mem_config.to_dict(),
        run.model.base_fingerprint(),
        str(run.model.peft_model.dtype),
        shapes,
    ]
    described = json.dumps([run.rows, settings, model], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()
