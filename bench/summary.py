"""Result files as tables in the terminal, whatever they hold: what a run of `bench/gpu.sh` prints last.

    python -m bench.summary FILE...

A table has the values that differ from record to record; what all have in common stands above it.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .markdown import table


def summary(lines: Sequence[dict[str, Any]]) -> str:
    """Format the records of a result file.

    Args:
        lines: Its lines: the environment, then records.

    Returns:
        Text of several lines.
    """
    environment, records = lines[0].get("environment", {}), lines[1:]
    said = ("gpu", "cpu", "torch", "triton", "transformers", "commit", "date")
    head = ", ".join(f"{name} {environment[name]}" for name in said if environment.get(name) is not None)
    names = list(dict.fromkeys(name for record in records for name in record))
    common = {name: records[0].get(name) for name in names if len({str(r.get(name)) for r in records}) == 1}
    if len(records) == 1:
        common = {}
    columns = [name for name in names if name not in common]
    rows = [tuple(_cell(record.get(name)) for name in columns) for record in records]
    shared = ", ".join(f"{name} {value}" for name, value in common.items())
    return "\n".join(part for part in (head, shared, table(tuple(columns), rows) if rows else "no record") if part)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_cell, value))
    return "–" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; return 1 if a file is not there, or is no result file."""
    parser = argparse.ArgumentParser(prog="python -m bench.summary", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="result files, JSON lines")
    status = 0
    for path in parser.parse_args(arguments).files:
        print(f"\n{path.name}")
        try:
            print(summary([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]))
        except (OSError, ValueError, IndexError) as error:
            print(f"no results: {error}")
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
