"""Which families of models can do what: a tiny random one of every causal language model of transformers.

    python -m bench.families --output FILE

One record a family, as `r3mem families` reports it: what was tried (see `r3mem_fast.families`), each "yes" or why not;
`refused` says why no tiny model could be made.
"""

import argparse
import dataclasses
from collections.abc import Sequence

from r3mem_fast.families import try_families

from .records import add_output_option, add_record


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.families", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a family (all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    records: list[dict] = []
    for report in try_families(options.names):
        add_record(dataclasses.asdict(report), records, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
