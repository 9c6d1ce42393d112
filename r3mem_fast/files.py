"""Files that are written whole or not at all."""

import contextlib
import glob
import os
import threading
from pathlib import Path


@contextlib.contextmanager
def replacing(path):
    """A path to write to, in place of `path` once all is written: the whole new file, or the old one.

    Of several writers at one time each writes its own, and the last one's stays. A process that is killed may leave
    one of `unfinished_files` behind.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield unfinished
        flush(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def unfinished_files(path):
    """What writers of this path have not finished."""
    return Path(path).parent.glob(f".{glob.escape(Path(path).name)}.*.tmp")


def flush(path):
    """Have the operating system write a file to its disk now."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
