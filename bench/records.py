"""Result files: records as JSON lines, below what they were measured on. They name no path and no host."""

import argparse
import datetime
import json
import os
import subprocess
from pathlib import Path

import r3mem_fast.environment
from r3mem_fast.files import replacing


def add_output_option(parser):
    """Give `parser` the option --output, for `write_records`: refused before minutes of measuring, not after."""
    text = "also write environment and records to this file, one JSON line each"
    parser.add_argument("--output", type=_file_in_a_folder, help=text)


def _file_in_a_folder(path):
    if not Path(path).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {Path(path).parent}")
    return path


def write_records(path, records):
    """Write the environment and the records, one JSON line each: the whole file, or nothing."""
    write_lines(path, [{"environment": environment()}, *records])


def add_record(record, records, options):
    """Add a record to those of a run that takes long: print it, and write all of them, at once.

    options: with `json` (print JSON) and `output` (a path, or None), see `add_output_option`.
    """
    records.append(record)
    print(json.dumps(record) if options.json else record, flush=True)
    if options.output:
        write_records(options.output, records)


def write_lines(path, lines):
    """Write one JSON line each: the whole file, or nothing."""
    with replacing(path) as unfinished:
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def environment() -> dict:
    """Time (UTC), commit, machine and versions, as plain values for JSON; None stands for what is not known."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        **r3mem_fast.environment.environment(),
        # By which timings on a busy machine can be told.
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }


def _commit():
    """The checked-out commit, with `+changes` where tracked files differ from it; None outside a checkout."""

    def git(*arguments):
        root = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
