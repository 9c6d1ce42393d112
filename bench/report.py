"""A table of what `pytest bench --benchmark-only --benchmark-json FILE` measured, and the same as JSON lines.

python -m bench.report FILE --output bench/results/coupling_gpu.jsonl
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from .records import write_lines


def read(path: str | os.PathLike[str]) -> tuple[dict, list[dict]]:
    """Read a result file of pytest-benchmark.

    Returns:
        `(environment, records)`.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no result of pytest-benchmark.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        environment, benchmarks = result["machine_info"], result["benchmarks"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of pytest --benchmark-json: {error!r}") from None
    records = []
    for benchmark in benchmarks:
        stats = benchmark["stats"]
        record = {"benchmark": benchmark["name"], "group": benchmark["group"], **benchmark["extra_info"]}
        records.append({**record, "call_seconds": stats["median"], "call_rounds": stats["rounds"]})
    return environment, records


def table(records: list[dict]) -> str:
    """Format records as text."""
    lines = [f"{'what':52} {'implementation':14} {'ms':>9} {'GB/s':>8} {'of copy':>8}"]
    for record in records:
        milliseconds = record.get("milliseconds", record["call_seconds"] * 1e3)
        line = f"{record['group']:52} {record['implementation']:14} {milliseconds:>9.4f} "
        line += f"{record['least_bytes'] / milliseconds / 1e6:>8.1f} "
        lines.append(line + (f"{record['share']:>8.2f}" if "share" in record else f"{'-':>8}"))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the table, and the JSON lines if asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n")[0])
    parser.add_argument("file", help="of pytest --benchmark-json")
    parser.add_argument("--output", help="write environment and records to this file, one JSON line each")
    options = parser.parse_args(arguments)
    try:
        environment, records = read(options.file)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(table(records))
    if options.output:
        write_lines(options.output, [{"environment": environment}, *records])


if __name__ == "__main__":
    main()
