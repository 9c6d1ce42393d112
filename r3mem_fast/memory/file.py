"""Writes and checks the files of a `Memory` and a `Prefix`, and reads the header of a memory's.

Needs no torch, so that looking at a file is quick.

The file is a safetensors file. Its metadata have one entry (several would come in another order every time), JSON with
the kind, the format version, what the memory was made with, and a checksum of every byte.
"""

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import replacing

FORMAT_VERSION = 1
MATCHED_VERSION = 2  # of a matched memory, which earlier versions cannot read
CARRIED_VERSION = 3  # of a memory that carries states of recurrent layers
ADAPTIVE_VERSION = 4  # of a memory whose heads have other numbers of slots
CARRIED = "carried."  # before the names of these states
KIND = "r3mem_fast memory"
METADATA = "r3mem"
_VERSIONS = (FORMAT_VERSION, MATCHED_VERSION, CARRIED_VERSION, ADAPTIVE_VERSION)
NO_DIGEST = "0" * 64  # stands in the checksum's place while it is computed
_DIGEST = re.compile(rb'digest\\": ?\\"([0-9a-f]{64})\\"')
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclasses.dataclass(frozen=True)
class Header:
    """The description of a memory in its file.

    Attributes:
        metadata: Kind, format version, layout, origin and labels.
        nbytes: Bytes of all tensors.
        dtype: Name of the states' dtype.
        integers: Values of the int64 tensors, by name.
    """

    metadata: dict[str, Any]
    nbytes: int
    dtype: str
    integers: dict[str, list[int]]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of the memory, each a dictionary with `level`, `name`, `segments`, `tokens` and `unfinished`.

        `level` and `name` are None for a row without a label. The others are numbers: compressed segments, tokens
        seen, and tokens of the segment that is not finished; of a matched memory also `slots` and `pinned`.
        """
        names = {"segments": "num_segments", "tokens": "tokens_seen", "unfinished": "unfinished_lengths"}
        columns = {name: self.integers[tensor] for name, tensor in names.items()}
        labels = self.metadata["labels"]
        if "slots" in self.integers:
            none = [0] * len(labels)
            columns |= {"slots": self._slots(len(labels))}
            columns |= {name: self.integers.get(name, none) for name in ("pinned", "refined")}
        return [
            {
                "level": label and label[0],
                "name": label and label[1],
                **{n: values[row] for n, values in columns.items()},
            }
            for row, label in enumerate(labels)
        ]

    def _slots(self, rows: int) -> list[int]:
        """Slots of each row: of a head on average, rounded up, where heads have other numbers of them."""
        counts = self.integers.get("head_slots")
        if not counts:
            return self.integers["slots"]
        heads = len(counts) // rows
        return [-(-sum(counts[row * heads : (row + 1) * heads]) // heads) for row in range(rows)]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Check a memory file's checksum and read its header.

    Args:
        path: Path of the file.

    Returns:
        The header.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is damaged, no memory, or of another format.
    """
    try:
        with opened(path) as content:
            return _header(content)
    except _UnreadableError as error:
        raise ValueError(f"{path} is no memory that this version of r3mem_fast can read: {error}") from None
    except ValueError as error:  # mmap raises it for an empty file
        raise ValueError(f"{path} is damaged, or no memory of r3mem_fast: {error}") from None


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[mmap.mmap]:
    """Map a file that has a checksum, once all of its bytes agree with that.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is empty, has no header or no checksum, or is damaged.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start, expected = _digest(content)
        if content[start : start + len(expected)] != expected.encode():
            raise ValueError("its content does not match its checksum")
        yield content


def write(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file with its checksum, whole or not at all.

    Args:
        path: The file, replaced if it is there. Folders above it are made.
        content: A safetensors file, in whose metadata `NO_DIGEST` stands at `digest`.
    """
    sealed = bytearray(content)
    start, checksum = _digest(sealed)
    sealed[start : start + len(checksum)] = checksum.encode()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        unfinished.write_bytes(sealed)


class _UnreadableError(ValueError):
    """Says that a file is whole, but is not what this version reads."""


def _digest(content: Any) -> tuple[int, str]:
    """Compute the checksum of a file.

    Args:
        content: All bytes of the file: bytes, a bytearray or an mmap.

    Returns:
        Index at which the checksum stands in the file, and the checksum as it should be: BLAKE2b of all bytes, with
        zeros in the checksum's place, as 64 hexadecimal digits.

    Raises:
        ValueError: The file has no header, or the header names no checksum.
    """
    header = _end_of_header(content)
    found = _DIGEST.findall(content[:header])
    if len(found) != 1:
        raise ValueError("its header names no checksum")
    start = content[:header].index(found[0], 8)
    view = memoryview(content)
    try:
        checksum = hashlib.blake2b(view[:start], digest_size=32)
        checksum.update(NO_DIGEST.encode())
        checksum.update(view[start + len(NO_DIGEST) :])
    finally:
        view.release()
    return start, checksum.hexdigest()


def _end_of_header(content: Any) -> int:
    header = 8 + int.from_bytes(content[:8], "little")
    if not 8 < header <= len(content):
        raise ValueError("it has no header")
    return header


def _header(content: Any) -> Header:
    begin = _end_of_header(content)
    try:
        tensors = json.loads(content[8:begin])
        metadata = json.loads(tensors.pop("__metadata__")[METADATA])
        if metadata["kind"] != KIND or metadata["format_version"] not in _VERSIONS:
            raise ValueError(
                f"it is {metadata['kind']!r} of format {metadata['format_version']!r}; this version reads {KIND!r} of "
                f"formats {', '.join(map(str, _VERSIONS))}"
            )
        integers: dict[str, list[int]] = {}
        nbytes = 0
        for name, tensor in tensors.items():
            start, end = tensor["data_offsets"]
            nbytes += end - start
            if tensor["dtype"] == "I64":
                integers[name] = list(struct.unpack(f"<{(end - start) // 8}q", content[begin + start : begin + end]))
        dtype = tensors["states"]["dtype"]
        return Header(metadata, nbytes, _DTYPES.get(dtype, dtype), integers)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise _UnreadableError(error) from None
