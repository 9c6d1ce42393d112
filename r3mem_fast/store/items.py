"""`Item`: something that was said; `Held`: how far what is made of a user's items has come."""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

# Halves of characters that UTF-16 writes as two.
_HALVES = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Item:
    """Something that was said, as it was said.

    Attributes:
        id: Its number, which no other item has or had.
        user_id: Whose memory it belongs to.
        agent_id: Agent that it was said to; None: not told.
        run_id: Conversation that it belongs to; None: not told.
        role: "user" or "assistant".
        text: What was said.
        metadata: What the application keeps beside it.
        created: When it was added, in seconds since 1970.
    """

    id: int
    user_id: str
    agent_id: str | None
    run_id: str | None
    role: str
    text: str
    metadata: dict[str, Any]
    created: float


@dataclasses.dataclass(frozen=True)
class Held:
    """How far a user's memory has come.

    Attributes:
        revision: A number that is drawn anew whenever something is deleted, so that older memories count no more.
        file: Name of the memory's file; None: there is none.
        item: Last item that is in it, wholly or in part; 0: none.
        tokens: Tokens of that item that are in it.
        adapter: Names of the folders of the adapters that have learned what was said, with spaces between them, each
            from `folder_after`; None: there are none.
        learned: Last item that they have learned; 0: none.
    """

    revision: int = 0
    file: str | None = None
    item: int = 0
    tokens: int = 0
    adapter: str | None = None
    learned: int = 0

    def without(self, item: int) -> "Held":
        """Which adapters are left, and up to where, if an item is deleted: those that were taught before it was.

        Args:
            item: Number of the item, of several the first.
        """
        if item > self.learned:
            return self
        names = (self.adapter or "").split()
        earlier = [name for name in names if _begins_after(name) < item]
        learned = _begins_after(earlier.pop()) if earlier else 0
        return dataclasses.replace(self, adapter=" ".join(earlier) or None, learned=learned)


class _Any:
    """The default of a name that may be anything; None is not: it may be a name that an application has lost."""

    def __repr__(self) -> str:
        return "ANY"


ANY: Any = _Any()
_AFTER = "-after-"


def folder_after(prefix: str, item: int) -> str:
    """Name of a folder of adapters that learn what was said after an item.

    Args:
        prefix: Beginning of the name, without a space.
        item: Number of the item; 0: there is none before.
    """
    return f"{prefix}{_AFTER}{item}"


def _begins_after(name):
    """The item after which the adapters of a folder begin; those of earlier versions have learned everything."""
    _, mark, item = name.partition(_AFTER)
    return int(item) if mark else 0


def check_names(**names: str | None) -> None:
    """Check names of users, agents and runs.

    Args:
        names: Names by what they name; only a `user_id` must be there.

    Raises:
        TypeError: One is no text.
        ValueError: One is empty.
    """
    for what, name in names.items():
        if name is not None and not isinstance(name, str):
            raise TypeError(f"{what} must be a text, got {type(name).__name__}")
        if name == "" or (name is None and what == "user_id"):
            raise ValueError(f"{what} is empty")
        check_whole(name or "", what)


def check_whole(text: str, what: str) -> None:
    """Check that a text can be written as UTF-8.

    Args:
        text: The text.
        what: What it is, for the message.

    Raises:
        ValueError: It holds half a character: an argument of a command whose bytes are no UTF-8 has some.
    """
    if _HALVES.search(text):
        raise ValueError(f"{what} holds half a character (a lone surrogate), which no file can hold as UTF-8")


def check_query(query: str, limit: int) -> None:
    """Check what is looked for, and how many items at most. Raises ValueError if it is empty, or limit below 1."""
    if not query.strip():
        raise ValueError("the query is empty")
    check_whole(query, "the query")
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")


def numbers_of(item_id: Any) -> list[int]:
    """Numbers of items, of one number or several.

    Args:
        item_id: An int, or a list or tuple of some.

    Raises:
        KeyError: What is given is no number of an item.
    """
    numbers = list(item_id) if isinstance(item_id, (list, tuple)) else [item_id]
    for number in numbers:
        if type(number) is not int:
            raise KeyError(f"there is no item {number!r}")
    return numbers


def given(**names: Any) -> dict[str, Any]:
    """Return those of some names, or of an item's number, that are not `ANY`.

    Args:
        names: Names of users, agents and runs, and an `item_id`, by what they name.

    Raises:
        TypeError: A name is no text.
        ValueError: One is None, or empty.
    """
    chosen = {what: name for what, name in names.items() if name is not ANY}
    for what, name in chosen.items():
        if name is None:
            raise ValueError(f"{what} is None; leave it out to mean any")
    check_names(**{what: name for what, name in chosen.items() if what != "item_id"})
    return chosen


def condition(
    *,
    item_id: int | Sequence[int] | None = None,
    user_id: str | None = None,
    agent_id: str | None = None,
    run_id: str | None = None,
) -> tuple[str, tuple[Any, ...]]:
    """Condition in SQL for items, and the values of its parameters; what is None may be anything.

    Args:
        item_id: Number of the item, or several.
        user_id: Whose it is.
        agent_id: Agent that it was said to.
        run_id: Conversation that it belongs to.
    """
    wanted = {"items.user": user_id, "items.agent": agent_id, "items.run": run_id}
    parts = [(f"{column} = ?", value) for column, value in wanted.items() if value is not None]
    if item_id is not None:
        numbers = [item_id] if isinstance(item_id, int) else list(item_id)
        # As JSON, because numbers may be more, and larger, than parameters of SQLite can be.
        parts.insert(0, ("items.id IN (SELECT value FROM json_each(?))", json.dumps(numbers)))
    return " AND ".join(part for part, _ in parts) or "1", tuple(value for _, value in parts)
