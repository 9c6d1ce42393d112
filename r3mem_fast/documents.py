"""Reads documents in all forms that a caller may give, and cuts them or takes them apart as a model needs them."""

import itertools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from .data.text import read_text
from .hierarchy import LEVELS, contexts_of, cut_document, split_document

# Forms in which the pipeline takes documents: a text, several, or texts by name. A `Path` is a UTF-8 text file.
Documents = str | Path | Sequence[str | Path] | Mapping[str, str | Path]
# Labels of a memory's rows, `(level, name)` or None.
_Labels = tuple[tuple[str, str] | None, ...]


def by_name(documents: Documents, taken: Collection[str] = ()) -> dict[str, str]:
    """Read documents, and name those that have no name after their file, or by a number.

    Args:
        documents: Documents in any form.
        taken: Names that are in use already.

    Returns:
        Texts by name.

    Raises:
        OSError: A file cannot be read.
        TypeError: A name is no string.
        ValueError: There is no document, a file is given twice, or a text is the name of a file that is there.
    """
    if isinstance(documents, (str, Path)):
        documents = [documents]
    if not isinstance(documents, Mapping):
        numbers = (n for n in itertools.count(1) if f"document {n}" not in taken)
        documents = list(documents)
        names = [str(text) if isinstance(text, Path) else f"document {next(numbers)}" for text in documents]
        if len(set(names)) < len(names):
            raise ValueError("a file is named twice")
        documents = dict(zip(names, documents, strict=True))
    if not documents:
        raise ValueError("there is no document")
    if wrong := [name for name in documents if not isinstance(name, str)]:
        raise TypeError(f"a document's name must be a string, got {wrong[0]!r}")
    return {name: _text_of(text) for name, text in documents.items()}


def _text_of(text):
    """The text itself, or what a file holds. Raises ValueError if the text is the name of a file that is there."""
    if isinstance(text, Path):
        return read_text(text)
    # `Path.is_file` would raise an error for a string that cannot be a path.
    if isinstance(text, str) and "\n" not in text and os.path.splitext(text)[1] and os.path.isfile(text):
        raise ValueError(
            f"{text!r} is a file here: pass Path({text!r}) for what it holds. (To take the words themselves as the "
            "text, put a line break behind them.)"
        )
    return text


def in_order(documents: Documents, labels: Sequence[tuple[str, str] | None]) -> list[str]:
    """Read one document for each row of a memory, in the order of the rows.

    Args:
        documents: Documents in any form. If they have names, these must be the names of the rows.
        labels: Labels of the rows, `(level, name)` or None.

    Returns:
        Texts, one for each row.

    Raises:
        ValueError: There is not one for each row, or the names are other ones.
    """
    if isinstance(documents, Mapping):
        if None in labels:
            raise ValueError("the memory has rows without a name: give the documents in their order, as a list")
        names = [label[1] for label in labels if label is not None]
        if sorted(documents, key=str) != sorted(names, key=str):
            raise ValueError(f"the documents are {sorted(documents, key=str)}, the memory's rows {names}")
        return [_text_of(documents[name]) for name in names]
    given = [documents] if isinstance(documents, (str, Path)) else list(documents)
    texts = [_text_of(text) for text in given]
    if len(texts) != len(labels):
        raise ValueError(f"{len(texts)} documents and {len(labels)} rows of memory: one of each a row")
    return texts


def cut_to_length(
    documents: Mapping[str, str],
    count: Callable[[str], int],
    most: int,
    taken: Collection[str],
    *,
    anywhere: bool = False,
) -> tuple[dict[str, str], dict[str, str]]:
    """Cut documents that are too long into several, at chapters or paragraphs.

    Args:
        documents: Texts by name.
        count: Function that counts the tokens of a text.
        most: Tokens of a document at most.
        taken: Names that parts must not have.
        anywhere: Whether a sentence is cut, too, if it is too long.

    Returns:
        The documents with parts in place of those that were cut; and, by name of a part, the name of the document that
        it was cut from.

    Raises:
        ValueError: A part would have the name of another document.
    """
    cut: dict[str, str] = {}
    whole_of: dict[str, str] = {}
    for name, text in documents.items():
        # A token has one byte at least, so that most texts need not be counted.
        short = not isinstance(text, str) or len(text.encode("utf-8", "surrogatepass")) <= most
        parts = {name: text} if short else cut_document(text, name, count, most, anywhere=anywhere)
        if len(parts) > 1:
            if doubled := parts.keys() & (cut.keys() | documents.keys() | set(taken)):
                raise ValueError(f"two documents would be called {min(doubled)!r}; give one of them another name")
            whole_of |= dict.fromkeys(parts, name)
        cut |= parts
    return cut, whole_of


def texts_and_labels(
    documents: Documents,
    levels: tuple[str, ...],
    count: Callable[[str], int],
    before: Sequence[tuple[str, str] | None] | None,
) -> tuple[list[str], tuple[tuple[str, str] | None, ...]]:
    """Read the texts that are to be compressed, and label them.

    Args:
        documents: Documents in any form.
        levels: Some of `hierarchy.LEVELS`.
        count: Function that counts the tokens of a text.
        before: Labels of the rows of a memory that the texts continue; None: they continue none.

    Returns:
        The texts, and the label of each, a row of the memory.

    Raises:
        ValueError: A text is empty, or the documents do not fit the memory that they are to continue.
    """
    texts: list[str]
    labels: _Labels
    if before is None:
        named = by_level(by_name(documents), levels, count)
        texts, labels = list(named.values()), tuple(named)
    elif levels != ("document",):
        raise ValueError("only documents go on from a memory: other levels are compressed at one time")
    else:
        texts, labels = in_order(documents, before), tuple(before)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError("a text to compress is empty" if text == "" else f"no text: {type(text).__name__}")
    return texts, labels


def by_level(
    documents: Mapping[str, str], levels: Sequence[str], count: Callable[[str], int]
) -> dict[tuple[str, str], str]:
    """Take documents apart into texts by `(level, name)`.

    Args:
        documents: Texts by name.
        levels: Some of `hierarchy.LEVELS`.
        count: Function that counts the tokens of a text.

    Returns:
        Texts by `(level, name)`. A part is called "NAME, paragraph 1" or "NAME, passage 1", and so on.

    Raises:
        ValueError: A level is unknown, or a document holds no text.
    """
    if not levels or set(levels) - set(LEVELS):
        raise ValueError(f"levels must be some of {LEVELS}, got {levels!r}")
    texts: dict[tuple[str, str], str] = {}
    for name, text in documents.items():
        if "document" in levels:
            texts["document", name] = text
        if set(levels) - {"document"}:
            contexts = contexts_of(split_document(text, name, count), levels)
            for level, kind in (("paragraph", "paragraph"), ("entity", "passage")):
                for number, (context, _) in enumerate(contexts[level] if level in levels else (), 1):
                    texts[level, f"{name}, {kind} {number}"] = context
    return texts
