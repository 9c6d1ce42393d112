"""Teach a small adapter a page, and have it give the page back, word for word.

python examples/remember_page.py page.txt --folder page      # about two minutes on two CPU cores
"""

import argparse
from pathlib import Path

from r3mem_fast import R3MemPipeline, RememberSettings


def main(arguments=None):
    """Remember, then recall what was remembered; returns how many contexts came back exactly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="a UTF-8 text file")
    parser.add_argument("--model", default="smollm2-135m", help="a folder or hub id (%(default)s)")
    parser.add_argument("--folder", help="where the adapter is saved (nowhere)")
    parser.add_argument("--max-steps", type=int, default=2000, help="of training (%(default)s)")
    options = parser.parse_args(arguments)

    pipeline = R3MemPipeline(options.model)
    settings = RememberSettings(max_steps=options.max_steps)
    report = pipeline.remember(options.page, folder=options.folder, settings=settings)
    print(report)
    for pair in report.pairs:
        found = pipeline.recall(pair.query)
        print(f"{pair.level}: {pair.query!r}: {'exact' if found == pair.context else 'NOT exact'}")
    return sum(report.exact)


if __name__ == "__main__":
    main()
