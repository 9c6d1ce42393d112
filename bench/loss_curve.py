"""The loss curve of reversible training against the same network with stored activations, or adapters' dtypes.

    python -m bench.loss_curve --model smollm2-135m --steps 200 --json
    python -m bench.loss_curve --compare adapters --learning-rate 2e-5 --json

LoRA (r = 16, all linear layers) by AdamW, one seed, the same windows in the same order. The runs alternate step by
step in one process, each with adapters of its own. Prints one record: all curves, and their largest differences.

The first comparison is in float32. The second has weights in bfloat16 and three kinds of adapters: in float32 under
autocast (`float32`), in bfloat16 with float32 master weights (`masters`), and, as a control, in bfloat16 without
(`bfloat16`). It differs the more, the smaller the learning rate is.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

from r3mem_fast import MasterAdamW, MomentumCoupling, load_model, make_reversible
from r3mem_fast.data.text import read_text, token_windows
from r3mem_fast.reversible.convert import stack_of
from r3mem_fast.reversible.stack import Mode

from .records import add_output_option, write_records

# Arms of each comparison. The others are compared with the first.
_ARMS = {"activations": ("reversible", "stored"), "adapters": ("float32", "masters", "bfloat16")}


class Run:
    """One training run: a reversible model with adapters, and its optimizer.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model_name: str, arm: str, *, bits: int, learning_rate: float) -> None:
        """Load a model, and set it up for an arm.

        Args:
            model_name: Name of the model.
            arm: Name of the arm.
            bits: Side bits.
            learning_rate: Learning rate.
        """
        dtype = torch.bfloat16 if arm in _ARMS["adapters"] else torch.float32
        base, self.tokenizer = load_model(model_name, dtype=dtype)
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        self.model = make_reversible(model, MomentumCoupling(bits=bits)).train()
        stack_of(model).mode = Mode.STORED if arm == "stored" else Mode.REVERSIBLE
        self._autocast = arm == "float32"
        parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter in parameters if arm == "bfloat16" else ():
            parameter.data = parameter.data.to(dtype)
        kind = MasterAdamW if arm == "masters" else torch.optim.AdamW
        self._optimizer = kind(parameters, lr=learning_rate)

    def step(self, window: torch.Tensor) -> float:
        """Make one training step on int64 `[1, tokens]`, and return its loss."""
        with torch.autocast(window.device.type, torch.bfloat16, enabled=self._autocast):
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
    parser.add_argument("--compare", default="activations", choices=_ARMS, help="what the arms are (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="(%(default)s)")
    parser.add_argument("--text", help="a text file to train on, in place of Python's help topics")
    parser.add_argument("--json", action="store_true", help="print the record as one JSON line")
    add_output_option(parser)
    options = parser.parse_args(arguments)

    arms = _ARMS[options.compare]
    runs = {arm: Run(options.model, arm, bits=options.bits, learning_rate=options.learning_rate) for arm in arms}
    tokenizer = runs[arms[0]].tokenizer
    windows = token_windows(tokenizer, read_text(options.text), tokens=options.tokens, count=options.steps)
    curves: dict[str, list[float]] = {arm: [] for arm in arms}
    for window in tqdm(windows[:, None], desc="steps", file=sys.stderr):
        for arm, run in runs.items():
            curves[arm].append(run.step(window))
    first, second, *controls = arms
    differences = {
        arm: max(abs(a - b) for a, b in zip(curves[first], curves[arm], strict=True)) for arm in (second, *controls)
    }
    record = {
        "model": Path(options.model).name,
        "dtype": "float32" if options.compare == "activations" else "bfloat16",
        "bits": options.bits,
        "steps": options.steps,
        "tokens": options.tokens,
        "learning_rate": options.learning_rate,
        "text": "pydoc_data.topics" if options.text is None else Path(options.text).name,
        "max_abs_difference": differences[second],
        **{f"max_abs_difference_of_{arm}": differences[arm] for arm in controls},
        **curves,
    }
    if options.json:
        print(json.dumps(record))
    else:
        for name, curve in curves.items():
            print(f"{name:12}" + "  ".join(f"{loss:.4f}" for loss in curve[:: max(1, len(curve) // 10)]))
        for arm, difference in differences.items():
            print(f"largest difference of any of {options.steps} losses, {arm} from {first}: {difference:.2e}")
    if options.output:
        write_records(options.output, [record])


if __name__ == "__main__":
    main()
