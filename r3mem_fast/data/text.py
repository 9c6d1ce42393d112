"""Text for checks and demonstrations, as token ids."""

import pydoc_data.topics
import re
from pathlib import Path


def read_text(path=None) -> str:
    """A UTF-8 text file, or, without one, the topics of Python's own help: real English that every machine has.

    Raises OSError if the file cannot be read, ValueError if it is not UTF-8 or holds no text.
    """
    if path is None:
        return "\n".join(pydoc_data.topics.topics.values())
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise ValueError(f"{path} holds no text")
    return text


def token_windows(tokenizer, text, *, tokens, count=None):
    """`text` as windows of `tokens` token ids: int64 `[count, tokens]`, as many as fit if `count` is None.

    Raises ValueError if the text is too short.
    """
    if count is not None:
        # No token is longer than this in real text, and tokenising all of it could take seconds.
        text = text[: 64 * count * tokens + 1024]
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    found = len(ids) // tokens
    if found < (count or 1):
        raise ValueError(f"the text has {len(ids)} tokens; {(count or 1) * tokens} are needed")
    count = found if count is None else count
    return ids[: count * tokens].view(count, tokens)


def pages_of(text, tokenizer, count, *, tokens=200, offset=0):
    """`count` pages of whole paragraphs, by name, of `tokens` to 1.2 times as many tokens, after the first `offset`.

    Lines of a paragraph are joined. Raises ValueError if the text has fewer.
    """
    paragraphs = [re.sub(r"\s+", " ", block).strip() for block in re.split(r"\n\s*\n", text)]
    pages, page, size = [], [], 0
    for paragraph in (p for p in paragraphs if len(p.split()) > 8):
        page.append(paragraph)
        size += len(tokenizer(paragraph, add_special_tokens=False).input_ids) + 1
        if size >= tokens:
            if size <= 1.2 * tokens:
                pages.append("\n\n".join(page))
            page, size = [], 0
        if len(pages) == offset + count:
            return {f"page {offset + n}": page for n, page in enumerate(pages[offset:])}
    raise ValueError(f"the text has {len(pages)} pages of {tokens} tokens; {offset + count} are needed")
