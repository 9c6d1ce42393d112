"""The command `r3mem calibrate`."""

import argparse
import dataclasses
import json
from typing import Any

from .common import begin, device_of, say
from .options import add_machine_options, fraction_bits, positive


def add_commands(commands: Any) -> None:
    """Add the command `calibrate`."""
    what = "choose the side bits of every layer: the fewest that keep to a perplexity"
    calibrate = commands.add_parser("calibrate", help=what)
    calibrate.set_defaults(run=_calibrate)
    calibrate.add_argument("model", metavar="MODEL", help="smollm2-135m, a folder or a hub id")
    calibrate.add_argument(
        "--max-perplexity-ratio",
        type=float,
        default=1.10,
        help="perplexity of the reversible network, untrained, over that of the plain one (%(default)s)",
    )
    calibrate.add_argument("--text", help="a UTF-8 text file (Python's help topics)")
    calibrate.add_argument("--held-out", nargs="+", metavar="FILE", help="other texts to measure the choice on")
    calibrate.add_argument("--rows", type=positive, default=12, help="rows of a text (%(default)s)")
    calibrate.add_argument("--tokens", type=positive, default=256, help="tokens of a row (%(default)s)")
    calibrate.add_argument("--json", action="store_true", help="print one JSON object")
    calibrate.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="of the weights (%(default)s)"
    )
    calibrate.add_argument(
        "--fraction-bits", type=fraction_bits, default=14, help="binary places of the streams (%(default)s)"
    )
    add_machine_options(calibrate)


def _calibrate(options: argparse.Namespace) -> int:
    begin(options, f"Loading {options.model}")
    import torch

    from .. import calibrate, load_model
    from ..data.text import read_text, token_windows
    from ..reversible.calibration import perplexity_ratio

    texts = [read_text(path) for path in (options.text, *(options.held_out or ()))]
    model, tokenizer = load_model(options.model, dtype=options.dtype, device=device_of(options))

    def rows_of(text: str) -> torch.Tensor:
        windows = token_windows(tokenizer, text, tokens=options.tokens)
        places = torch.linspace(0, len(windows) - 1, min(options.rows, len(windows))).long()
        return windows[places].to(model.device)

    rows = [rows_of(text) for text in texts]
    found = calibrate(
        model,
        rows[0],
        options.max_perplexity_ratio,
        fraction_bits=options.fraction_bits,
        progress=lambda line: say(options, line),
    )
    held_out = {
        path: perplexity_ratio(model, of_text, found.coupling)
        for path, of_text in zip(options.held_out or (), rows[1:], strict=True)
    }
    if options.json:
        print(json.dumps({"model": options.model, **dataclasses.asdict(found), "held_out": held_out}))
        return 0
    print(found)
    for path, ratio in held_out.items():
        print(f"{path}: perplexity {ratio:.3f} x that of the plain network")
    print(f"make_reversible(model, {found.coupling!r})")
    return 0
