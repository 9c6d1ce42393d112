"""Reads texts to train on: text files, JSON lines, and folders of the `datasets` library."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .text import read_text


def read_texts(path: str | os.PathLike[str], column: str = "text") -> list[str]:
    """Read the texts of a file or folder.

    Args:
        path: A `.jsonl` file, each line of which is an object; a folder that `datasets` wrote (`save_to_disk`), all
            splits of which are read; or else a UTF-8 text file, which is one text.
        column: Name of the column (the object's key) that holds the text, in the first two.

    Returns:
        The texts that are not blank, one for each row of the table.

    Raises:
        ImportError: The path is a folder, and the package `datasets` is not installed.
        OSError: The path cannot be read.
        ValueError: It is no such file or folder, has no such column, or holds no text.
    """
    path = Path(path)
    if path.is_dir():
        rows = _rows_of_dataset(path, column)
    elif path.suffix == ".jsonl":
        rows = _rows_of_lines(path)
    else:
        return [read_text(path)]
    texts = []
    for where, row in rows:
        text = row.get(column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            has = f"it has {sorted(row)}" if isinstance(row, dict) else "it is no object"
            raise ValueError(f"{path}, {where}: there is no text in {column!r} ({has}); name the column")
        if text.strip():
            texts.append(text)
    if not texts:
        raise ValueError(f"{path} holds no text")
    return texts


def _rows_of_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield `(where it stands, row)` of a file of JSON lines."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(text) if text.strip() else None
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 text ({error.reason})") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if text.strip():
                yield f"line {number}", row


def _rows_of_dataset(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    """Yield `(where it stands, row)` of a folder that `datasets` wrote."""
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"{path} is a folder, which the package `datasets` reads: pip install 'r3mem_fast[train]'"
        ) from None
    try:
        found = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise ValueError(f"{path} is no folder that `datasets` wrote with save_to_disk") from None
    splits = found.items() if isinstance(found, datasets.DatasetDict) else [("", found)]
    for name, split in splits:
        if column in split.column_names:  # the other columns may hold pictures, which would be decoded
            split = split.select_columns([column])
        for number, row in enumerate(split):
            yield f"row {number} {name}".strip(), row
