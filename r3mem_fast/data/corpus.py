"""Texts to train on: text files, JSON lines, and folders of the `datasets` library."""

import json
from pathlib import Path

from .text import read_text


def read_texts(path, column: str = "text") -> list[str]:
    """The texts of a file or folder, one for each row of a table.

    path: a `.jsonl` file, of which each line is an object; a folder that `datasets` wrote (`save_to_disk`), with all
    of its splits; or else a UTF-8 text file, which is one text. column: of the texts, in the first two.
    Raises OSError if it cannot be read, ValueError if it is no such file, has no such column, or holds no text;
    ImportError for a folder without the package `datasets`.
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


def _rows_of_lines(path):
    with open(path, encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number}", json.loads(line)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None


def _rows_of_dataset(path, column):
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
        if column in split.column_names:  # others may be pictures, which would be decoded
            split = split.select_columns([column])
        for number, row in enumerate(split):
            yield f"row {number} {name}".strip(), row
