"""`Search`: looks up what was said, in every way that a store knows."""

import threading
from collections.abc import Callable
from typing import Any

from .database import Database
from .defaults import WAYS
from .items import Item, check_names, check_query, condition
from .lookup import Found, Nearness, by_words


class Search:
    """Looks up items of a user.

    Args:
        database: What was said.
        nearness: Finds items by their embeddings.
        recalled: Gives the items that a user's adapters recall for a query, reading backward.
        lock: Held while a model is asked.
    """

    def __init__(
        self,
        database: Database,
        nearness: Nearness,
        recalled: Callable[[str, str], list[Item]],
        lock: threading.RLock,
    ):
        self._database, self._nearness, self._recalled, self._lock = database, nearness, recalled, lock

    def __call__(
        self, query: str, *, user_id: str, limit: int, by: str, up_to: int | None = None, **names: Any
    ) -> list[Found]:
        """Find items, see `MemoryStore.search`.

        Args:
            query: What is looked for.
            user_id: Whose conversation it is.
            limit: Items at most.
            by: How they are looked up.
            up_to: Number of the last item that may be found; None: any.
            names: An `agent_id` and a `run_id` that they must have; None: any.
        """
        check_names(user_id=user_id, **names)
        check_query(query, limit)
        self.check_way(by)
        where, values = condition(user_id=user_id, **names)
        if up_to is not None:
            where, values = f"{where} AND items.id <= ?", (*values, up_to)
        if by == "embedding":
            with self._lock:
                return self._nearness.search(query, where, values, limit)
        if by == "backward" and self._database.held(user_id).adapter is not None:
            with self._lock:
                recalled = self._recalled(user_id, query)
            known = {item.id for item in self._database.items(where, values)}
            if found := [Found(item, 1.0, "backward") for item in recalled if item.id in known]:
                return found[:limit]
        return by_words(self._database, query, where, values, limit)

    def check_way(self, by: str) -> None:
        """Check that items can be looked up in a way, without looking any up.

        Args:
            by: The way.

        Raises:
            ImportError: There is no embedder.
            ValueError: There is no such way.
        """
        if by not in WAYS:
            raise ValueError(f"by must be one of {WAYS}, got {by!r}")
        if by == "embedding":
            with self._lock:
                self._nearness.load()
