"""`TurnCodec`: token ids of a conversation, turn by turn, so that a memory can be streamed through it."""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..codec import TextCodec
from .items import check_whole

ROLES = ("user", "assistant")
# Stand for what is said in a chat template; no template holds them.
_WORDS = ("\u2047first\u2047", "\u2047answer\u2047", "\u2047second\u2047")
# What stands between two messages of one speaker.
_PAUSE = "\n\n"
# A conversation with a model that has no chat template.
_PLAIN = ("User:", "\n\nAssistant:", "\n\nUser:", "\n\nAssistant:")


def as_messages(messages: str | Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Read messages in the forms that applications have them in.

    Args:
        messages: A text, which the user says; a message `{"role": "user" or "assistant", "content": text}`; or some.

    Returns:
        Role and text of each.

    Raises:
        TypeError: A message is no mapping, or its content is no text.
        ValueError: There is no message, one has no words, or its role is another one.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    elif isinstance(messages, Mapping):
        messages = [messages]
    elif not isinstance(messages, Iterable):
        raise TypeError(f"messages are a text, a message, or several, got {type(messages).__name__}")
    found = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise TypeError(f'a message is {{"role": ..., "content": ...}}, got {type(message).__name__}')
        role, text = message.get("role"), _text_of(message.get("content"))
        if role == "system":
            raise ValueError(
                "what a system prompt says holds for all that is remembered: give it to the store, "
                "MemoryStore(folder, system=...)"
            )
        if role not in ROLES:
            raise ValueError(f"a message is said by {' or '.join(ROLES)}, got role={role!r}")
        if not isinstance(text, str):
            raise TypeError(f"the content of a message must be a text, got {type(text).__name__}")
        if not text.strip():
            raise ValueError("a message is empty")
        check_whole(text, "a message")
        found.append((role, text))
    if not found:
        raise ValueError("there is no message")
    return found


def _text_of(content):
    """The text of a message's content: itself, or its parts, `{"type": "text", "text": ...}` each, in lines."""
    if not isinstance(content, (list, tuple)):
        return content
    if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        raise TypeError("the content of a message must be a text, or parts of the type text alone")
    return "\n".join(str(part.get("text", "")) for part in content)


class TurnCodec:
    """Encodes conversations so that the ids of more turns are appended to those of the turns before.

    A model's chat template says what stands between turns; without one, the names of the speakers do. Messages of one
    speaker in a row make one turn, with an empty line between them.

    Args:
        codec: Codec with the model's tokenizer.
        system: The system prompt; None: what the template has of its own.
        parts: What stands between turns, as another codec's `parts`: a template that tells today's date would give
            other ones tomorrow. None: what the template gives now.
    """

    def __init__(self, codec: TextCodec, system: str | None = None, parts: Sequence[str] | None = None):
        self.codec, self._system = codec, system
        self._is_plain = getattr(codec.tokenizer, "chat_template", None) is None
        if parts is not None:
            self.parts = tuple(parts)

    @functools.cached_property
    def parts(self) -> tuple[str, ...]:
        """What stands before the user's first words, before an answer, before the next words, and before a reply.

        Raises:
            ValueError: The chat template does not hold turns as they are said.
        """
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        if self._is_plain:
            return (f"{self._system}\n\n{_PLAIN[0]}", *_PLAIN[1:]) if system else _PLAIN
        roles = ("user", "assistant", "user")
        talk = [{"role": role, "content": words} for role, words in zip(roles, _WORDS, strict=True)]
        # A model that thinks first would have its thoughts remembered.
        text = self.codec.tokenizer.apply_chat_template(
            [*system, *talk], add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
        rest, parts = text, []
        for words in _WORDS:
            before, found, rest = rest.partition(words)
            if not found:
                raise ValueError("the tokenizer's chat template does not hold what is said in a conversation as it is")
            parts.append(before)
        return parts[0], parts[1], parts[2], rest

    @functools.cached_property
    def opening(self) -> list[int]:
        """Token ids before the user's first words."""
        return self.codec.begun(self.parts[0]) if self._is_plain else self.codec.ids(self.parts[0])

    @functools.cached_property
    def description(self) -> str:
        """Digest of what the ids of a conversation depend on beside the tokenizer: the template, the system prompt."""
        template = getattr(self.codec.tokenizer, "chat_template", None)
        return hashlib.sha256(json.dumps([template, self._system]).encode()).hexdigest()

    def ids(self, messages: Sequence[tuple[str, str]], before: str | None = None) -> list[int]:
        """Token ids of messages behind others.

        Args:
            messages: Role and text of each.
            before: Role of the message before them; None: there is none, and `opening` stands before.
        """
        found: list[int] = []
        for role, text in messages:
            found += self._between(before, role) + self._said(text)
            before = role
        return found

    def reply(self, messages: Sequence[tuple[str, str]], before: str | None) -> list[int]:
        """Token ids of messages behind others, up to the assistant's next words; see `ids`.

        Raises:
            ValueError: The last message is not the user's.
        """
        if messages[-1][0] != "user":
            raise ValueError("the last message must be the user's, so that it can be replied to")
        return self.ids(messages, before) + self.codec.ids(self.parts[3])

    def _between(self, before, role):
        if before == role:
            return self.codec.ids(_PAUSE)
        if before is None and role == "user":
            return []
        return self.codec.ids(self.parts[1 if role == "assistant" else 2])

    def _said(self, text):
        # Nobody ends a turn, or begins another's, by saying so.
        return self.codec.said(f" {text}" if self._is_plain else text)
