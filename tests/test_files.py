"""One writer at a time: folders and files that another process holds, or that cannot be written to."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file

from r3mem_fast.files import (
    LOCK,
    InUseError,
    check_writable,
    is_held,
    locked,
    locked_file,
    permissions_of,
    replacing,
)

HOLD = """
import sys
from r3mem_fast.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """A folder that another process holds until it is killed."""
    folder = tmp_path / "held"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield folder, process
    process.kill()
    process.wait()


def test_another_process_is_told_and_a_killed_one_holds_nothing(held):
    folder, process = held
    with pytest.raises(InUseError, match=r"another process is writing to .*held.*wait for it to end"), locked(folder):
        pass
    process.kill()
    process.wait()
    with locked(folder):
        assert folder.is_dir()


def test_whether_a_folder_is_held(held, tmp_path):
    folder, process = held
    assert is_held(folder) and not is_held(tmp_path) and not is_held(tmp_path / "none")
    process.kill()
    process.wait()
    assert not is_held(folder)


def test_a_reader_waits(held):
    folder, process = held
    threading.Timer(0.3, process.kill).start()
    with locked(folder, wait=30):
        assert process.wait(timeout=30) != 0


def test_a_thread_may_ask_twice_and_another_may_not(tmp_path):
    outcomes = []

    def other():
        try:
            with locked(tmp_path):
                outcomes.append("held")
        except InUseError:
            outcomes.append("refused")

    with locked(tmp_path), locked(tmp_path, wait=10), locked(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert outcomes == ["refused"]
    other()
    assert outcomes == ["refused", "held"]


def test_nothing_is_left_of_a_folder_that_was_not_used(tmp_path):
    with pytest.raises(ValueError, match="no"), locked(tmp_path / "new" / "folder"):
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "new"):
        (tmp_path / "new" / "file").write_text("x")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [LOCK, "file"]


def test_places_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file"), locked(tmp_path / "file"):
        pass
    with pytest.raises(OSError, match="cannot make the folder"), locked(tmp_path / "file" / "below"):
        pass
    with pytest.raises(OSError, match="cannot write to /proc"):  # where not even root can
        check_writable("/proc")
    with pytest.raises(IsADirectoryError, match="name a file in it"), locked_file(tmp_path):
        pass
    with pytest.raises(FileNotFoundError, match="there is no folder"), locked_file(tmp_path / "none" / "file"):
        pass


def test_a_file_that_is_held(tmp_path):
    with locked_file(tmp_path / "memory"):
        lock = tmp_path / ".memory.lock"
        assert lock.exists()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), locked_file(tmp_path / "memory"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_a_new_file_is_readable_as_the_umask_says(tmp_path, umask, mode):
    path = tmp_path / "tensors"
    before = os.umask(umask)
    try:
        for expected in (mode, 0o640):
            with replacing(path) as unfinished:
                save_file({"some": torch.zeros(2)}, unfinished)
            assert permissions_of(path) == expected and list(tmp_path.iterdir()) == [path]
            path.chmod(0o640)  # which the file that replaces it has, too
    finally:
        os.umask(before)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "tensors"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
