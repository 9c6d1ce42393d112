"""Reads text for checks and demonstrations, and cuts it into windows of token ids or into pages."""

import os
import pydoc_data.topics
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def read_text(path: str | os.PathLike[str] | None = None) -> str:
    """Read a text.

    Args:
        path: A UTF-8 text file, with or without a byte order mark; None: the topics of Python's own help, real English
            that every machine has.

    Returns:
        The text.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not UTF-8, or holds no text.
    """
    if path is None:
        return "\n".join(pydoc_data.topics.topics.values())
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise ValueError(f"{path} holds no text")
    return text


def opening_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the token ids that a tokenizer puts before a text, such as that of a beginning; often there are none.

    Models that were pretrained with them may be of no use without: attention rests on the first of them.

    Args:
        tokenizer: The tokenizer.
    """
    found, text = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    starts = (start for start in range(len(found)) if found[start : start + len(text)] == text)
    return found[: next(starts, 0)]


def token_windows(
    tokenizer: "PreTrainedTokenizerBase", text: str, *, tokens: int, count: int | None = None
) -> "torch.Tensor":
    """Cut a text into windows of token ids, one after the other, each behind what the tokenizer puts before a text.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        tokens: Tokens of a window, with those before the text.
        count: Number of windows; None: as many as the text has.

    Returns:
        int64 `[count, tokens]`.

    Raises:
        ValueError: The text is too short, or a window has no room for a token of it.
    """
    # Imported here, because `r3mem --help` reads this module and needs no torch.
    import torch

    opening = torch.tensor(opening_ids(tokenizer), dtype=torch.int64)
    of_text = tokens - len(opening)
    if of_text < 1:
        raise ValueError(f"a window of {tokens} tokens has no room behind the {len(opening)} that begin a text")
    if count is not None:
        # No token of real text is longer than 64 characters, and tokenising all of the text could take seconds.
        text = text[: 64 * count * tokens + 1024]
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    found = len(ids) // of_text
    if found < (count or 1):
        raise ValueError(f"the text has {len(ids)} tokens; {(count or 1) * of_text} are needed")
    count = found if count is None else count
    return torch.cat([opening.expand(count, -1), ids[: count * of_text].view(count, of_text)], 1)


def pages_of(
    text: str, tokenizer: "PreTrainedTokenizerBase", count: int, *, tokens: int = 200, offset: int = 0
) -> dict[str, str]:
    """Cut a text into pages of whole paragraphs, whose lines are joined.

    Args:
        text: The text, with blank lines between paragraphs.
        tokenizer: Counts the tokens.
        count: Number of pages.
        tokens: Fewest tokens of a page; the most are 1.2 times as many.
        offset: Number of pages to skip at the beginning.

    Returns:
        The pages by name, `page {offset}` and so on.

    Raises:
        ValueError: The text has fewer pages.
    """
    paragraphs = [re.sub(r"\s+", " ", block).strip() for block in re.split(r"\n\s*\n", text)]
    pages: list[str] = []
    page: list[str] = []
    size = 0
    for paragraph in (p for p in paragraphs if len(p.split()) > 8):
        page.append(paragraph)
        size += len(tokenizer(paragraph, add_special_tokens=False).input_ids) + 1
        if size >= tokens:
            if size <= 1.2 * tokens:
                pages.append("\n\n".join(page))
            page, size = [], 0
        if len(pages) == offset + count:
            return {f"page {offset + n}": found for n, found in enumerate(pages[offset:])}
    raise ValueError(f"the text has {len(pages)} pages of {tokens} tokens; {offset + count} are needed")
