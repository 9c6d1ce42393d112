"""Writes files whole or not at all, by one process at a time."""

import contextlib
import glob
import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".r3mem.lock"


class InUseError(OSError):
    """Says that another process, or another thread, is writing to a folder or a file."""


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str], wait: float = 0.0) -> Iterator[None]:
    """Keep every other process and thread from writing to a folder inside the `with` block.

    The thread that holds a folder may ask for it again. A folder that is not there is made, and removed at the end if
    it is still empty then.

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
def locked_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keep every other process and thread from writing to a file inside the `with` block.

    Args:
        path: Path of the file, which need not exist.

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
            with contextlib.suppress(OSError):  # Windows does not remove an open file
                lock.unlink()


def is_held(folder: str | os.PathLike[str]) -> bool:
    """Whether a process is writing to a folder right now.

    Args:
        folder: Path of the folder.
    """
    lock = Path(folder) / LOCK
    if not lock.exists():
        return False
    try:
        with FileLock(str(lock.absolute()), is_singleton=True).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # the folder is read-only, so nobody writes to it
        return False


def _held(lock: Path, what: Path, wait: float) -> contextlib.AbstractContextManager:
    """Acquire the lock file of `what`; leaving the context that is returned gives it back."""
    # A singleton for each path lets the thread that holds it ask again.
    singleton = FileLock(str(lock.absolute()), is_singleton=True)
    try:
        return singleton.acquire(timeout=wait)
    except Timeout:
        raise InUseError(
            f"another process is writing to {what}, and of two writers one would lose its work: wait for it to end, "
            "or choose another place"
        ) from None


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Make sure that files can be made in a folder.

    Args:
        folder: Path of the folder.

    Raises:
        OSError: No file can be made there; the message says what to do.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".r3mem-"):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror or error}; choose another place") from None


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Replace a file by a new one, so that at any time either the old or the whole new file is there.

    Of several writers at one time each writes a file of its own, and the last one's stays. A process that is killed
    may leave one of `unfinished_files` behind. The new file has the permissions of the old one, or those that the
    process's umask gives a new one.

    Args:
        path: Path of the file, which need not exist.

    Yields:
        The path to write the new file to. It takes the place of `path` at the end of the block, unless that raised.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        unfinished.touch()
        mode = permissions_of(path if path.exists() else unfinished)
        yield unfinished
        unfinished.chmod(mode)
        flush(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def permissions_of(path: str | os.PathLike[str]) -> int:
    """Return who may read and write a file, as `chmod` takes it.

    Some versions of safetensors write files that only their owner may read, whatever the umask says.

    Args:
        path: Path of the file.
    """
    return stat.S_IMODE(os.stat(path).st_mode)


def unfinished_files(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Find the files that `replacing` has begun and not finished.

    Args:
        path: Path of the file to be replaced.

    Returns:
        The paths of the unfinished files.
    """
    return Path(path).parent.glob(f".{glob.escape(Path(path).name)}.*.tmp")


def flush(path: str | os.PathLike[str]) -> None:
    """Have the operating system write a file to its disk now.

    Args:
        path: Path of the file.
    """
    with open(path, "rb") as file:
        os.fsync(file.fileno())
