"""The loss curve of reversible training against the same network with stored activations.

    python -m bench.loss_curve --model smollm2-135m --steps 200 --json

LoRA (r = 16, all linear layers) by AdamW, one seed, the same windows in the same order, float32. The two runs
alternate step by step in one process, each with adapters of its own. Prints one record: both curves, and their
largest difference.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

from r3mem_fast import MomentumCoupling, load_model, make_reversible
from r3mem_fast.data.text import read_text, token_windows
from r3mem_fast.reversible.convert import stack_of
from r3mem_fast.reversible.stack import Mode

from .records import add_output_option, write_records


class Run:
    """One training run: a reversible model with adapters, and its optimizer.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model_name: str, *, bits: int, stored: bool) -> None:
        """Load a model and make it reversible with so many side bits; `stored` keeps activations all the same."""
        base, self.tokenizer = load_model(model_name, dtype=torch.float32)
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        self.model = make_reversible(model, MomentumCoupling(bits=bits)).train()
        stack_of(model).mode = Mode.STORED if stored else Mode.REVERSIBLE
        self._optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)

    def step(self, window: torch.Tensor) -> float:
        """Make one training step on int64 `[1, tokens]`, and return its loss."""
        loss = self.model(input_ids=window, labels=window, use_cache=False).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m bench.loss_curve", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder or a hub id (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="in a window (%(default)s)")
    parser.add_argument("--bits", type=int, default=4, choices=[1, 2, 4, 8], help="side bits (%(default)s)")
    parser.add_argument("--text", help="a text file to train on, in place of Python's help topics")
    parser.add_argument("--json", action="store_true", help="print the record as one JSON line")
    add_output_option(parser)
    options = parser.parse_args(arguments)

    reversible, stored = (Run(options.model, bits=options.bits, stored=stored) for stored in (False, True))
    windows = token_windows(reversible.tokenizer, read_text(options.text), tokens=options.tokens, count=options.steps)
    curves: dict[str, list[float]] = {"reversible": [], "stored": []}
    for window in tqdm(windows[:, None], desc="steps", file=sys.stderr):
        curves["reversible"].append(reversible.step(window))
        curves["stored"].append(stored.step(window))
    difference = max(abs(a - b) for a, b in zip(curves["reversible"], curves["stored"], strict=True))
    record = {
        "model": Path(options.model).name,
        "dtype": "float32",
        "bits": options.bits,
        "steps": options.steps,
        "tokens": options.tokens,
        "text": "pydoc_data.topics" if options.text is None else Path(options.text).name,
        "max_abs_difference": difference,
        **curves,
    }
    if options.json:
        print(json.dumps(record))
    else:
        for name, curve in curves.items():
            print(f"{name:12}" + "  ".join(f"{loss:.4f}" for loss in curve[:: max(1, len(curve) // 10)]))
        print(f"largest difference of any of {options.steps} losses: {difference:.2e}")
    if options.output:
        write_records(options.output, [record])


if __name__ == "__main__":
    main()
