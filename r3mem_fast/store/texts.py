"""`StoredTexts`: what users have said, read from a store's folder without a model. Needs no torch."""

import os
from pathlib import Path

from .database import DATABASE, Database
from .items import Item, check_names, check_query, condition
from .lookup import Found, by_words

FOLDER = "R3MEM_STORE"
_DEFAULT_FOLDER = "~/.local/share/r3mem/store"


def store_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Folder of a store: the one that is named, else `$R3MEM_STORE`, else `~/.local/share/r3mem/store`."""
    return Path(folder or os.environ.get(FOLDER) or _DEFAULT_FOLDER).expanduser()


class StoredTexts:
    """Items of the store in a folder.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: There is no store.
        OSError: It cannot be opened.
        ValueError: The folder holds something else.
    """

    def __init__(self, folder: Path):
        if not (folder / DATABASE).is_file():
            raise FileNotFoundError(f"there is no store in {folder}: `r3mem store add` and MemoryStore.add make one")
        self.database = Database(folder / DATABASE, read_only=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.database.close()

    def items(
        self,
        *,
        item_id: int | None = None,
        user_id: str | None = None,
        agent_id: str | None = None,
        run_id: str | None = None,
    ) -> list[Item]:
        """Items in the order in which they were added; what is None may be anything."""
        where = condition(item_id=item_id, user_id=user_id, agent_id=agent_id, run_id=run_id)
        return self.database.items(*where)

    def search(
        self, query: str, *, user_id: str, agent_id: str | None = None, run_id: str | None = None, limit: int = 5
    ) -> list[Found]:
        """Items that have words of a query, the best by BM25 first.

        Args:
            query: What is looked for.
            user_id: Whose items.
            agent_id: Agent that they were said to; None: any.
            run_id: Conversation that they belong to; None: any.
            limit: Items at most.

        Raises:
            ValueError: The query or a name is empty, or limit is below 1.
        """
        check_names(user_id=user_id, agent_id=agent_id, run_id=run_id)
        check_query(query, limit)
        where, values = condition(user_id=user_id, agent_id=agent_id, run_id=run_id)
        return by_words(self.database, query, where, values, limit)
