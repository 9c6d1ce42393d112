"""Writes texts of several kinds to one file, each text a line, for `r3mem train`.

python -m bench.mixed_texts novels wikipedia code help --data FOLDER -o mixed.jsonl
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from r3mem_fast import load_model
from r3mem_fast.files import replacing

from .texts import KINDS, first_part, texts_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the texts that the command line names, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.mixed_texts", description=__doc__.split("\n")[0])
    parser.add_argument("kinds", nargs="+", choices=KINDS, help="see bench/texts.py")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--hold-out", type=float, default=0.0, help="share of each text, at its end (%(default)s)")
    parser.add_argument("--model", default="smollm2-135m", help="whose tokens are counted (%(default)s)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a .jsonl file")
    options = parser.parse_args(arguments)
    texts = [{"kind": kind, "text": text} for kind in options.kinds for text in texts_of(kind, options.data)]
    if options.hold_out:
        _, tokenizer = load_model(options.model)
        for text in texts:
            ids = tokenizer(text["text"], add_special_tokens=False, verbose=False).input_ids
            text["text"] = tokenizer.decode(first_part(ids, options.hold_out))
    with replacing(options.output) as path:
        path.write_text("".join(f"{json.dumps(text)}\n" for text in texts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
