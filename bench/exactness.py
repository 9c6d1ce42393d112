"""`r3mem check` over every dtype and number of side bits: exact inverse, gradients against stored activations.

    python -m bench.exactness --model smollm2-135m --output FILE

Prints the JSON line of each `r3mem check MODEL --dtype ... --bits ... --per-layer --json`.
"""

import argparse
import contextlib
import io
import itertools
import json
from collections.abc import Sequence

from r3mem_fast.cli import main as r3mem

from .records import add_output_option, write_records


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.exactness", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a folder or a hub id (%(default)s)")
    parser.add_argument("--tokens", default="512", help="of the text (%(default)s)")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    records, statuses = [], []
    for dtype, bits in itertools.product(["bfloat16", "float32"], ["1", "2", "4", "8"]):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            command = ["check", options.model, "--tokens", options.tokens, "--dtype", dtype, "--bits", bits]
            statuses.append(r3mem([*command, "--per-layer", "--json"]))
        print(printed.getvalue(), end="", flush=True)
        records.append(json.loads(printed.getvalue()))
    if options.output:
        write_records(options.output, records)
    return max(statuses)


if __name__ == "__main__":
    raise SystemExit(main())
