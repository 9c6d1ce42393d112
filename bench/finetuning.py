"""What adapters learn under each coupling, and what they are worth in the plain network: evidence for the default.

    python -m bench.finetuning BOOK.txt OTHER.txt --json --output FILE

LoRA (r = 16, all linear layers) on the first part of a book, by AdamW, with the same windows in the same order and the
same seed in each arm. Then perplexity of the book's last part, and of another text, in the network as it was trained
and in the plain network with the same adapters. One record an arm; arms that the output file holds are not run again.

The first arm is gradient checkpointing, which computes what plain fine-tuning does. `seed-1` is the same with another
seed for the adapters' first weights: what differs by chance. `calibrated` has the side bits that `calibrate` chooses by
the text to train on. `adapter-4` trains adapters between the streams, of as many parameters, in place of LoRA; the plain
network has no place for them.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

from r3mem_fast import (
    AdaptedCoupling,
    BDIACoupling,
    MomentumCoupling,
    ScaledCoupling,
    calibrate,
    load_model,
    make_reversible,
    restore,
)
from r3mem_fast.data.text import token_windows
from r3mem_fast.reversible.coupling import Coupling

from .records import add_output_option, add_record
from .texts import book

_LAST_LOSSES = 50
_CALIBRATION_WINDOWS = 16


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way of fine-tuning.

    Attributes:
        coupling: Makes the coupling of a model, given int64 `[windows, tokens]` of the text; None: checkpointing.
        seed: Seed of the adapters' first weights.
    """

    coupling: Callable[[Any, torch.Tensor], Coupling] | None
    seed: int = 0


def _fixed(coupling: Coupling) -> Arm:
    return Arm(lambda model, windows: coupling)


def _calibrated(model: Any, windows: torch.Tensor) -> Coupling:
    rows = windows[torch.linspace(0, len(windows) - 1, _CALIBRATION_WINDOWS).long()]
    return calibrate(model, rows, 1.10).coupling


BASELINE = "checkpointing"
ARMS = {
    BASELINE: Arm(None),
    "momentum-8": _fixed(MomentumCoupling(bits=8)),
    "momentum-4": _fixed(MomentumCoupling(bits=4)),
    "momentum-2": _fixed(MomentumCoupling(bits=2)),
    "balanced-4": _fixed(MomentumCoupling(bits=4, balanced=True)),
    "balanced-2": _fixed(MomentumCoupling(bits=2, balanced=True)),
    "calibrated": Arm(_calibrated),
    "bdia-4": _fixed(BDIACoupling(bits=4)),
    "meft-8": _fixed(ScaledCoupling(bits=8)),
    "meft-4": _fixed(ScaledCoupling(bits=4)),
    "adapter-4": _fixed(AdaptedCoupling(bits=4, rank=141)),
    "seed-1": Arm(None, seed=1),
}


def window_losses(model: Any, windows: torch.Tensor) -> list[float]:
    """Return a model's loss on each of int64 `[windows, tokens]`, in nats a token."""
    model.eval()
    with torch.no_grad():
        return [model(input_ids=w[None], labels=w[None], use_cache=False).loss.item() for w in windows]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m bench.finetuning", description=__doc__.split("\n")[0])
    parser.add_argument("book", type=Path, help="a UTF-8 text file to train on")
    parser.add_argument("other", type=Path, help="another text to measure on")
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder or a hub id (%(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="(all)")
    parser.add_argument("--steps", type=int, default=300, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="in a window (%(default)s)")
    parser.add_argument("--windows", type=int, default=64, help="of each text to measure on (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="(%(default)s)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of weights (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_output_option(parser)
    options = parser.parse_args(arguments)

    done: list[dict[str, Any]] = []
    if options.output and Path(options.output).exists():
        done = [json.loads(line) for line in Path(options.output).read_text(encoding="utf-8").splitlines()[1:]]
    for name in options.arms:
        if name not in {record["arm"] for record in done}:
            add_record({"arm": name, **_run(ARMS[name], options)}, done, options)


def _run(arm: Arm, options: argparse.Namespace) -> dict[str, Any]:
    base, tokenizer = load_model(options.model, dtype=getattr(torch, options.dtype))
    text = token_windows(tokenizer, book(options.book), tokens=options.tokens)
    if len(text) < options.steps + options.windows:
        raise ValueError(f"{options.book.name} has {len(text)} windows; {options.steps + options.windows} are needed")
    held_out = {
        "book": text[-options.windows :],
        "other": token_windows(tokenizer, book(options.other), tokens=options.tokens, count=options.windows),
    }
    coupling = None if arm.coupling is None else arm.coupling(base, text[: options.steps])
    torch.manual_seed(arm.seed)
    between_streams = coupling is not None and coupling.adapter_rank is not None
    model: Any = base.requires_grad_(False)
    if not between_streams:
        model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    model.train()
    if coupling is None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        make_reversible(model, coupling)
    losses = _train(model, text[: options.steps], options)
    trained = {name: window_losses(model, windows) for name, windows in held_out.items()}
    plain = trained
    if coupling is not None:
        restore(model)
        plain = {name: window_losses(model, windows) for name, windows in held_out.items()}
    with contextlib.nullcontext() if between_streams else model.disable_adapter():
        before = {name: window_losses(model, windows) for name, windows in held_out.items()}
    return {
        "model": Path(options.model).name,
        "dtype": options.dtype,
        "steps": options.steps,
        "tokens": options.tokens,
        "learning_rate": options.learning_rate,
        "book": options.book.name,
        "other": options.other.name,
        "coupling": None if coupling is None else repr(coupling),
        "training_loss": sum(losses[-_LAST_LOSSES:]) / len(losses[-_LAST_LOSSES:]),
        "as_trained": trained,
        "plain": plain,
        "without_adapters": before,
        "losses": losses,
    }


def _train(model: Any, windows: torch.Tensor, options: argparse.Namespace) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.learning_rate)
    losses = []
    for window in tqdm(windows[:, None], desc="steps", file=sys.stderr):
        loss = model(input_ids=window, labels=window, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    main()
