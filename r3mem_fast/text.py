"""Text for checks and demonstrations, as token ids."""

import pydoc_data.topics
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
