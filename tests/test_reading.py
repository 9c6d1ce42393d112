"""How histories are read, segment by segment."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("beyond", ["forget", "rematch", "rematch_once"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_segment_waits_for_the_device(beyond, attention):
    """The host asks once at the end whether all went well, and not in between: with a device that counts that."""
    command = [sys.executable, str(Path(__file__).parent / "far_device.py"), beyond, attention]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    few, many = json.loads(printed.splitlines()[-1]).values()
    assert few.pop("upload") > 0 and many.pop("upload") > 0  # which do not wait
    assert few == many == {"_local_scalar_dense": 1}


def test_only_padding_makes_the_attention_ask():
    """Rows that begin at different places ask the device once more in the segment that is padded."""
    command = [sys.executable, str(Path(__file__).parent / "far_device.py"), "forget", "sdpa", "ragged"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    few, many = json.loads(printed.splitlines()[-1]).values()
    assert few["_local_scalar_dense"] == many["_local_scalar_dense"] <= 3


def test_diagonals_wait_once():
    """To see that layers are given nothing of the tokens; and for nothing in a segment."""
    command = [sys.executable, str(Path(__file__).parent / "far_device.py"), "forget", "sdpa", "diagonal"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    few, many = json.loads(printed.splitlines()[-1]).values()
    assert few.pop("upload") > 0 and many.pop("upload") > 0 and few == {"_local_scalar_dense": 1}
    assert many.pop("equal") <= 4 and many == few


def test_what_is_captured_uploads_nothing_and_waits_for_nothing():
    """Once segments are alike, they are one graph each, whose constants are on the device already."""
    command = [sys.executable, str(Path(__file__).parent / "far_device.py"), "forget", "sdpa", "graphs"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    few, many = json.loads(printed.splitlines()[-1]).values()
    assert "captured" not in few and many["captured"] == 1 and many["_local_scalar_dense"] == 1
