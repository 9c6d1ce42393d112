"""Perplexity of the reversible network, untrained, against the pretrained one: what side bits and grid cost.

    python -m bench.perplexity --model smollm2-135m --json

One record a setting: `bits`, `fraction_bits` (None: the ordinary network), `perplexity`, and its `ratio` to the
ordinary network's.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from r3mem_fast import MomentumCoupling, load_model, make_reversible, restore
from r3mem_fast.data.text import read_text, token_windows

from .records import add_output_option, write_records

# Side bits on the default grid, then other grids.
SETTINGS = [(8, 14), (4, 14), (2, 14), (1, 14), (4, 16), (4, 12), (4, 10)]


def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """Return a model's perplexity on int64 `[windows, tokens]`."""
    with torch.no_grad():
        return math.exp(statistics.fmean(model(input_ids=w[None], labels=w[None]).loss.item() for w in windows))


def _setting(text: str) -> tuple[int, int]:
    """Read side bits and binary places of the grid, "4,14"."""
    bits, fraction_bits = map(int, text.split(","))
    return bits, fraction_bits


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m bench.perplexity", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder or a hub id (%(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="in a window (%(default)s)")
    parser.add_argument("--windows", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--text", help="a text file, in place of Python's help topics")
    default = " ".join(f"{bits},{fraction_bits}" for bits, fraction_bits in SETTINGS)
    about = f"side bits and binary places ({default})"
    parser.add_argument("--settings", nargs="+", type=_setting, default=SETTINGS, metavar="BITS,PLACES", help=about)
    parser.add_argument("--json", action="store_true", help="print one JSON line a setting")
    add_output_option(parser)
    options = parser.parse_args(arguments)

    model, tokenizer = load_model(options.model, dtype=torch.float32)
    windows = token_windows(tokenizer, read_text(options.text), tokens=options.tokens, count=options.windows)
    text = "pydoc_data.topics" if options.text is None else Path(options.text).name
    common: dict[str, Any] = {
        "model": Path(options.model).name,
        "dtype": "float32",
        "text": text,
        "tokens": windows.numel(),
    }
    plain = perplexity(model, windows)
    records = [{**common, "bits": None, "fraction_bits": None, "perplexity": plain, "ratio": 1.0}]
    for bits, fraction_bits in options.settings:
        make_reversible(model, MomentumCoupling(bits=bits, fraction_bits=fraction_bits))
        value = perplexity(model, windows)
        restore(model)
        found = {"bits": bits, "fraction_bits": fraction_bits, "perplexity": value, "ratio": value / plain}
        records.append({**common, **found})
    for r in records:
        if options.json:
            print(json.dumps(r))
        else:
            setting = "ordinary network" if r["bits"] is None else f"{r['bits']} bits, grid 2^-{r['fraction_bits']}"
            print(f"{setting:24}{r['perplexity']:10.3f}{r['ratio']:10.4f}")
    if options.output:
        write_records(options.output, records)


if __name__ == "__main__":
    main()
