"""A server of the Model Context Protocol, whose tools add to a store, ask it, and look things up in it."""

import functools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from . import __version__
from .store.database import DATABASE
from .store.defaults import PASSAGES
from .store.items import Item
from .store.lookup import Found
from .store.texts import StoredTexts

try:
    from mcp.server import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError
    from mcp_types import ToolAnnotations
    from pydantic import Field
except ImportError as error:
    raise ImportError(
        f"r3mem mcp needs the package mcp, 2.0 or newer: pip install 'r3mem_fast[mcp]' ({error})"
    ) from error

if TYPE_CHECKING:
    from .store import MemoryStore

_INSTRUCTIONS = (
    "A memory of what users have said, kept on this machine. Add what should be remembered with add_memory, a message "
    "at a time. search_memories gives back what was said word for word; prefer it for facts. ask_memory has a small "
    "local model answer behind all that was said."
)
_READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
_ADDS = ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=False)
_DELETES = ToolAnnotations(read_only_hint=False, destructive_hint=True, open_world_hint=False)

User = Annotated[str | None, Field(description="Whose memory; that of the server's user if left out.")]
Run = Annotated[str | None, Field(description="Conversation that it belongs to; any if left out.")]
Way = Annotated[
    Literal["bm25", "embedding", "backward"],
    Field(description="bm25: by words. embedding: by nearness of meaning. backward: by what an adapter has learned."),
]


class Opening:
    """A store that is opened, and its model, in a thread of its own, so that a server answers at once.

    Args:
        folder: Folder of the store; made if it is not there.
        opened: Opens the store.
    """

    def __init__(self, folder: Path, opened: "Callable[[], MemoryStore]"):
        self.folder, self._opened = folder, opened
        self._lock = threading.Lock()
        self._store: MemoryStore | None = None

    def start(self) -> None:
        """Begin to load the model; what goes wrong is printed to standard error, and said when it is needed."""
        threading.Thread(target=self._try, daemon=True).start()

    def store(self) -> "MemoryStore":
        """The store; its model is loaded by what needs it, which waits until it is."""
        with self._lock:
            if self._store is None:
                self._store = self._opened()
            return self._store

    def is_there(self) -> bool:
        """Whether there is a store; before the first opening has made one, nothing is in it."""
        return (self.folder / DATABASE).is_file()

    def texts(self) -> StoredTexts:
        """What is in the store, which takes no waiting."""
        return StoredTexts(self.folder)

    def _try(self):
        try:
            self.store().answering()
        except Exception as error:  # tools that need the store try again, and say so
            print(f"r3mem mcp: {error}", file=sys.stderr, flush=True)


def memory_server(opening: Opening, user: str) -> MCPServer:
    """Make the server. Each call of a tool runs in a thread of its own.

    Args:
        opening: The store.
        user: Whose memory the tools are about, if a call names nobody.
    """
    server = MCPServer("r3mem", instructions=_INSTRUCTIONS, version=__version__, log_level="WARNING")
    tools = Tools(opening, user)
    server.add_tool(tools.add_memory, title="Add to the memory", annotations=_ADDS)
    server.add_tool(tools.search_memories, title="Search the memory", annotations=_READS)
    server.add_tool(tools.ask_memory, title="Ask the memory", annotations=_READS)
    server.add_tool(tools.list_memories, title="List the memory", annotations=_READS)
    server.add_tool(tools.delete_memory, title="Delete from the memory", annotations=_DELETES)
    return server


def _refusing(tool):
    """A tool whose result is an error that says what is wrong, where its arguments or the store are refused."""

    @functools.wraps(tool)
    def refusing(*arguments, **named):
        try:
            return tool(*arguments, **named)
        except KeyError as error:
            raise ToolError(error.args[0]) from error
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            raise ToolError(str(error)) from error

    return refusing


class Tools:
    """The tools; their docstrings and descriptions are what a client's model reads.

    Args:
        opening: The store.
        user: Whose memory they are about, if a call names nobody.
    """

    def __init__(self, opening: Opening, user: str):
        self._opening, self._user = opening, user

    @_refusing
    def add_memory(
        self,
        text: Annotated[str, Field(description="What was said, word for word.")],
        role: Annotated[Literal["user", "assistant"], Field(description="Who said it.")] = "user",
        run_id: Annotated[str | None, Field(description="Conversation that it belongs to.")] = None,
        metadata: Annotated[dict[str, Any] | None, Field(description="What is kept beside it.")] = None,
        user_id: User = None,
    ) -> Item:
        """Remember something that was said. It is kept word for word, and later answers are given behind it."""
        said = {"role": role, "content": text}
        store = self._opening.store()
        (item,) = store.add(said, user_id=user_id or self._user, run_id=run_id, metadata=metadata)
        return item

    @_refusing
    def search_memories(
        self,
        query: Annotated[str, Field(description="Words of what is looked for, or a question.")],
        limit: Annotated[int, Field(description="Items at most.", ge=1, le=100)] = 5,
        by: Way = "bm25",
        run_id: Run = None,
        user_id: User = None,
    ) -> list[Found]:
        """Find what was said about something, word for word, the best first."""
        user = user_id or self._user
        if not self._opening.is_there():
            return []
        if by != "bm25":
            return self._opening.store().search(query, by=by, user_id=user, run_id=run_id, limit=limit)
        with self._opening.texts() as texts:
            return texts.search(query, user_id=user, run_id=run_id, limit=limit)

    @_refusing
    def ask_memory(
        self,
        question: Annotated[str, Field(description="The question.")],
        passages: Annotated[
            int, Field(description="Items that are looked up and read word for word.", ge=0)
        ] = PASSAGES,
        max_new_tokens: Annotated[int, Field(description="Tokens of the answer at most.", ge=1)] = 128,
        user_id: User = None,
    ) -> str:
        """Have the local model answer a question behind what a user has said. Nothing is added to the memory."""
        return self._opening.store().ask(
            question,
            user_id=user_id or self._user,
            passages=passages,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )

    @_refusing
    def list_memories(
        self,
        limit: Annotated[int, Field(description="Items at most, the newest.", ge=1)] = 100,
        run_id: Run = None,
        user_id: User = None,
    ) -> list[Item]:
        """Show what was said, in the order in which it was added."""
        if not self._opening.is_there():
            return []
        with self._opening.texts() as texts:
            return texts.items(user_id=user_id or self._user, run_id=run_id)[-limit:]

    @_refusing
    def delete_memory(
        self,
        item_id: Annotated[
            int, Field(description="Number of the item, as search_memories and list_memories give it.")
        ],
        user_id: User = None,
    ) -> str:
        """Delete an item for good: its text and all that was made of it, as if it had never been said."""
        store = self._opening.store()
        if store.get(item_id).user_id != (user_id or self._user):
            raise ValueError(f"item {item_id} is not one of {user_id or self._user}")
        store.delete(item_id)
        return f"item {item_id} was deleted"
