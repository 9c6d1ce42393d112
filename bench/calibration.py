"""Side bits and perplexity, untrained: all layers alike, balanced or not, and as `calibrate` chooses.

    python -m bench.calibration --data FOLDER --json --output FILE

`calibrate` sees Python's help topics; every choice is measured on them, and on novels, Wikipedia, dialogue and code.
One record a choice: its mean bits, and its perplexity over that of the plain network for each kind of text.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from r3mem_fast import MomentumCoupling, calibrate, load_model
from r3mem_fast.data.text import token_windows
from r3mem_fast.reversible.calibration import perplexity_ratio

from .records import add_output_option, add_record
from .texts import texts_of

_CALIBRATED_ON = "help"
_KINDS = (_CALIBRATED_ON, "novels", "wikipedia", "dialogue", "code")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m bench.calibration", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder or a hub id (%(default)s)")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets, see bench/texts.py")
    parser.add_argument("--ratios", type=float, nargs="*", default=[1.10, 1.03], help="to calibrate to (%(default)s)")
    parser.add_argument("--rows", type=int, default=12, help="of each kind of text (%(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="of a row (%(default)s)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of weights (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_output_option(parser)
    options = parser.parse_args(arguments)

    model, tokenizer = load_model(options.model, dtype=getattr(torch, options.dtype))
    layers = model.config.num_hidden_layers
    rows = {kind: _rows(tokenizer, texts_of(kind, options.data), options) for kind in _KINDS}
    common = {
        "model": Path(options.model).name,
        "dtype": options.dtype,
        "rows": options.rows,
        "tokens": options.tokens,
    }
    records: list[dict[str, Any]] = []

    def add(choice: str, coupling: MomentumCoupling, **more: Any) -> None:
        bits = coupling.bits_of_layers(layers)
        ratios = {kind: perplexity_ratio(model, of_kind, coupling) for kind, of_kind in rows.items()}
        add_record(
            {**common, "choice": choice, "mean_bits": statistics.fmean(bits), "bits": bits, "ratios": ratios, **more},
            records,
            options,
        )

    for ratio in options.ratios:
        found = calibrate(model, rows[_CALIBRATED_ON], ratio)
        more = {"asked": ratio, "upper": found.upper, "evaluations": found.evaluations}
        add(f"calibrated to {ratio}", found.coupling, **more)
    for bits in (4, 2, 1):
        for balanced in (True, False):
            add(f"{bits}{', balanced' if balanced else ''}", MomentumCoupling(bits=bits, balanced=balanced))


def _rows(tokenizer: Any, texts: list[str], options: argparse.Namespace) -> torch.Tensor:
    """Rows from all over some texts, int64 `[rows, tokens]`."""
    windows = torch.cat([token_windows(tokenizer, text, tokens=options.tokens) for text in texts])
    return windows[torch.linspace(0, len(windows) - 1, options.rows).long()]


if __name__ == "__main__":
    main()
