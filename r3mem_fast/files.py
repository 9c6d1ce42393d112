"""Files that are written whole or not at all, by one process at a time."""

import contextlib
import glob
import os
import tempfile
import threading
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".r3mem.lock"


class InUseError(OSError):
    """Another process is writing to a folder or a file."""


@contextlib.contextmanager
def locked(folder, wait=0.0):
    """Keep every other process and thread from writing to a folder while this lasts; the folder is made if need be.

    The thread that holds a folder may ask for it again. A folder that was made here and is still empty at the end is
    taken away.

    Args:
        folder: Path of the folder.
        wait: Seconds to wait for another process to end.

    Raises:
        InUseError: Another process, or another thread, holds the folder.
        OSError: The folder cannot be made or written to.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a folder is needed there")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {folder}: {error.strerror}; choose another place") from None
    check_writable(folder)
    with _held(folder / LOCK, folder, wait):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if made and [path.name for path in folder.iterdir()] == [LOCK]:
                    (folder / LOCK).unlink()
                    for path in made:
                        path.rmdir()


@contextlib.contextmanager
def locked_file(path):
    """Keep every other process and thread from writing to a file while this lasts.

    Raises:
        InUseError: Another process, or another thread, holds the file.
        OSError: The file's folder is not there or cannot be written to, or the path is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to; make it first")
    check_writable(path.absolute().parent)
    lock = path.with_name(f".{path.name}.lock")
    with _held(lock, path, wait=0.0):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows does not let go of what is open
                lock.unlink()


def is_held(folder) -> bool:
    """Whether a process is writing to a folder right now."""
    lock = Path(folder) / LOCK
    if not lock.exists():
        return False
    try:
        with FileLock(str(lock.absolute()), is_singleton=True).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a folder that can be read only, which nobody writes to
        return False


def _held(lock, what, wait):
    # One object for each path, by which a thread that holds it may ask again.
    lock = FileLock(str(lock.absolute()), is_singleton=True)
    try:
        return lock.acquire(timeout=wait)
    except Timeout:
        raise InUseError(
            f"another process is writing to {what}, and of two writers one would lose its work: wait for it to end, "
            "or choose another place"
        ) from None


def check_writable(folder):
    """Raise OSError, with what to do, if no file can be made in a folder."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".r3mem-"):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror or error}; choose another place") from None


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
