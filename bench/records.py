"""Writes result files: records as JSON lines, below what they were measured on. They name no path and no host."""

import argparse
import datetime
import json
import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import r3mem_fast.environment
from r3mem_fast.files import replacing


def add_output_option(parser: argparse.ArgumentParser) -> None:
    """Give a parser the option --output; an impossible path is refused before minutes of measuring, not after."""
    text = "also write environment and records to this file, one JSON line each"
    parser.add_argument("--output", type=_file_in_a_folder, help=text)


def _file_in_a_folder(path: str) -> str:
    if not Path(path).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {Path(path).parent}")
    return path


def write_records(path: str | os.PathLike[str], records: Iterable[dict]) -> None:
    """Write the environment and the records, one JSON line each: the whole file, or nothing."""
    write_lines(path, [{"environment": environment()}, *records])


def add_record(record: dict[str, Any], records: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Add a record to those of a run that takes long: print it, and write all of them, at once.

    Args:
        record: The new record.
        records: Those before it; the new one is appended.
        options: Has `json` (whether to print JSON) and `output` (a path, or None), see `add_output_option`.
    """
    records.append(record)
    print(json.dumps(record) if options.json else record, flush=True)
    if options.output:
        write_records(options.output, records)


def add_records(found: Iterable[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print and write records as they are found; see `add_record`."""
    records: list[dict[str, Any]] = []
    for record in found:
        add_record(record, records, options)


def run(
    parser: argparse.ArgumentParser,
    measured: Callable[[argparse.Namespace], Iterable[dict[str, Any]]],
    arguments: Sequence[str] | None,
) -> int:
    """Give a parser the options --json and --output, and print and write what is measured; returns the exit status.

    Args:
        parser: The parser, with all other options of the command.
        measured: Function that makes records for the options.
        arguments: Arguments of the command line; None: those of the process.
    """
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_output_option(parser)
    options = parser.parse_args(arguments)
    add_records(measured(options), options)
    return 0


def write_lines(path: str | os.PathLike[str], lines: Iterable[Any]) -> None:
    """Write one JSON line each: the whole file, or nothing."""
    with replacing(path) as unfinished:
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def environment() -> dict[str, Any]:
    """Return time (UTC), commit, machine and versions, as plain values for JSON; None means unknown."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        **r3mem_fast.environment.environment(),
        # Tells timings on a busy machine from others.
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }


def _commit() -> str | None:
    """Return the checked-out commit, with `+changes` where tracked files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
