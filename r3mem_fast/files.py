"""Files that are written whole or not at all."""

import contextlib
import os
from pathlib import Path


@contextlib.contextmanager
def replacing(path):
    """A path to write to, in place of `path` once all is written: the whole new file, or the old one."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        yield unfinished
        flush(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def flush(path):
    """Have the operating system write a file to its disk now."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
