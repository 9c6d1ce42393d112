"""Writes texts of several kinds to one file, each text a line, for `r3mem train`.

python -m bench.mixed_texts novels wikipedia code help --data FOLDER -o mixed.jsonl
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from r3mem_fast.files import replacing

from .texts import KINDS, texts_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the texts that the command line names, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.mixed_texts", description=__doc__.split("\n")[0])
    parser.add_argument("kinds", nargs="+", choices=KINDS, help="see bench/texts.py")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a .jsonl file")
    options = parser.parse_args(arguments)
    texts = [{"kind": kind, "text": text} for kind in options.kinds for text in texts_of(kind, options.data)]
    with replacing(options.output) as path:
        path.write_text("".join(f"{json.dumps(text)}\n" for text in texts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
