"""`MemoryStore`: what users have said, kept in a folder, behind which a model answers."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import R3MemConfig
from ..memory.memory import Memory
from ..pipeline import R3MemPipeline
from ..training.remember import RememberReport
from ..training.settings import RememberSettings
from .adapters import UserAdapters
from .answering import Answering
from .database import DATABASE, Database
from .defaults import PASSAGES, RAW_TOKENS, SETTINGS
from .items import ANY, Item, check_names, check_whole, condition, given, numbers_of
from .lookup import Embedder, Found, Nearness
from .memories import Histories
from .opening import StoreModel, check_config, kept, lock_of
from .search import Search
from .turns import TurnCodec, as_messages

DEFAULT_CONFIG = R3MemConfig(**SETTINGS)
Messages = str | Mapping[str, Any] | Iterable[Mapping[str, Any]]


class MemoryStore:
    """Conversations of many users in a folder: nothing to start, nothing sent anywhere, no call to a model to `add`.

    >>> store = MemoryStore("memories")
    >>> store.add("My daughter Ida is allergic to peanuts.", user_id="anna")
    >>> store.ask("What must Ida not eat?", user_id="anna")

    The texts are kept in SQLite, word for word. Of each user's conversation a memory is made, a file: its newest turns
    are read as they are, older ones from keys and values that were matched to them (`R3MemConfig`), and what is beyond
    the memory's budget can be looked up alone. The memory follows from the texts, so that a process may be killed at
    any moment; it is brought up to date by `add` and by whatever reads it. Several processes may use a folder, and
    several threads a store.

    Args:
        folder: The folder, made if it is not there.
        model: What `R3MemPipeline` takes by name, or an `R3MemPipeline`, whose base model reads its memories: matched
            ones, or of anchors; None: what the folder was made with, "smollm2-135m" if new. It is loaded when needed.
        config: Sizes of memories and settings of adapters, or some of them by name in place of those that it would
            have (`{"memory_budget": 2048}`); None: what the folder was made with, `DEFAULT_CONFIG` for a new one.
        system: System prompt of all conversations; None: what the folder was made with, the template's for a new one.
        raw_tokens: Tokens, the newest ones, that are never compressed; None: what the folder was made with, 128 for a
            new one.
        embedder: Function from texts to vectors for `search(by="embedding")`; None: `minilm_embedder`.
        embedder_name: Name under which its vectors are kept; None: the function's.
        settings: More arguments of `R3MemPipeline` (`device`, `dtype`, ...).

    Raises:
        OSError: The folder cannot be made or written to.
        TypeError: The arguments do not go together.
        ValueError: The folder holds something else, or raw_tokens is below 0.
    """

    def __init__(
        self,
        folder: str | Path,
        model: "str | Path | R3MemPipeline | None" = None,
        *,
        config: R3MemConfig | Mapping[str, Any] | None = None,
        system: str | None = None,
        raw_tokens: int | None = None,
        embedder: Embedder | None = None,
        embedder_name: str | None = None,
        **settings: Any,
    ):
        if raw_tokens is not None and raw_tokens < 0:
            raise ValueError(f"raw_tokens must be 0 or more, got {raw_tokens}")
        check_config(model, config)
        self.folder = Path(folder)
        self.database = Database(self.folder / DATABASE)
        self._model = StoreModel(model, config, self.database, settings)
        nearness = Nearness(self.database, embedder, embedder_name)
        self._raw_tokens = kept(self.database, "raw_tokens", RAW_TOKENS) if raw_tokens is None else raw_tokens
        self._system = kept(self.database, "system", None) if system is None else system
        self._lock = lock_of(model)
        self._search = Search(self.database, nearness, lambda *asked: self._adapters().recalled(*asked), self._lock)
        self._answering: Answering | None = None
        self._sweep()  # a process may have been killed between deleting and this

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def __repr__(self) -> str:
        items = self.database.rows("SELECT count(*) FROM items")[0][0]
        return f"MemoryStore({str(self.folder)!r}, {items} items of {len(self.users())} users)"

    def close(self) -> None:
        """Close the folder's database."""
        self.database.close()

    def users(self) -> list[str]:
        """Users who have said something, in alphabetical order."""
        return [user for (user,) in self.database.rows("SELECT DISTINCT user FROM items ORDER BY user")]

    def add(
        self,
        messages: Messages,
        *,
        user_id: str,
        agent_id: str | None = None,
        run_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> list[Item]:
        """Add messages to a user's conversation; when this returns, they are on the disk.

        Whole segments that this completes are compressed, by a pass of the model over their tokens; nothing is
        generated. Should that fail, the messages are added all the same.

        Args:
            messages: A text, which the user says; a message `{"role": "user" or "assistant", "content": text}`; or
                several.
            user_id: Whose conversation it is.
            agent_id: Agent that they were said to.
            run_id: Conversation that they belong to; all of a user's are one memory.
            metadata: What is kept beside each, values for JSON.

        Returns:
            The items that were added.

        Raises:
            TypeError: A message or the metadata are of a wrong type.
            ValueError: A message or the name of the user is empty, or the memories are of another model.
        """
        said = as_messages(messages)
        check_names(user_id=user_id, agent_id=agent_id, run_id=run_id)
        with self._lock:
            reading = self.answering()
            reading.histories.history(user_id)  # what is wrong with the memory is found out before anything is added
            added = self.database.add(said, user=user_id, agent=agent_id, run=run_id, metadata=metadata)
            reading.histories.history(user_id)
            return added

    def ask(
        self,
        question: str | Sequence[str],
        *,
        user_id: str,
        passages: int = PASSAGES,
        by: str = "bm25",
        stream: bool = False,
        **settings: Any,
    ) -> Any:
        """Answer a question behind what a user has said. Neither is added to the conversation.

        Args:
            question: A question, or several, which are answered in one batch.
            user_id: Whose conversation it is.
            passages: Items that are looked up for the question and stand before it, word for word, as many as fit;
                those that are not in the memory yet are read anyway. 0: none, which is faster, and worth less.
            by: How they are looked up, see `search`.
            stream: Whether to return an iterator of the answer's pieces, as they are written; of one question.
            settings: Arguments of `transformers`' `generate`; 128 new tokens if no length is among them.

        Returns:
            The answer, a list of them for several questions, or an iterator.

        Raises:
            ValueError: A question is empty, the memories are of another model, or there are too many tokens.
        """
        questions = [question] if isinstance(question, str) else list(question)
        if not questions or not all(isinstance(text, str) and text.strip() for text in questions):
            raise ValueError("a question is empty")
        for text in questions:
            check_whole(text, "a question")
        if stream and not isinstance(question, str):
            raise ValueError("stream=True is for one question at a time")
        found = self._written([[("user", text)] for text in questions], user_id, passages, by, stream, settings)
        return found[0] if isinstance(question, str) and not stream else found

    def reply(
        self,
        messages: Messages,
        *,
        user_id: str,
        passages: int = PASSAGES,
        by: str = "bm25",
        stream: bool = False,
        **settings: Any,
    ) -> Any:
        """Continue a conversation: what the assistant says to messages that were not added yet. Nothing is added.

        Args:
            messages: As in `add`; the last one is the user's.
            user_id: Whose conversation it is.
            passages: As in `ask`, for the last message.
            by: As in `ask`.
            stream: As in `ask`.
            settings: As in `ask`.

        Returns:
            The reply, or an iterator of its pieces.

        Raises:
            ValueError: As `ask`, or the last message is not the user's.
        """
        found = self._written([as_messages(messages)], user_id, passages, by, stream, settings)
        return found if stream else found[0]

    def search(
        self,
        query: str,
        *,
        user_id: str,
        agent_id: str | None = None,
        run_id: str | None = None,
        limit: int = 5,
        by: str = "bm25",
    ) -> list[Found]:
        """Items that were said about something, word for word, the best first.

        Args:
            query: What is looked for.
            user_id: Whose conversation it is.
            agent_id: Agent that it was said to; None: any.
            run_id: Conversation that it belongs to; None: any.
            limit: Items at most.
            by: "bm25": by words, which needs no model. "embedding": by the nearness of meaning. "backward": by reading
                the network backward, if the conversation was consolidated; what is recalled counts if it was said,
                and where nothing is, items are looked up by words.

        Raises:
            ImportError: There is no embedder.
            ValueError: The query is empty, or `by` is none of these ways.
        """
        return self._search(query, user_id=user_id, limit=limit, by=by, agent_id=agent_id, run_id=run_id)

    def get(self, item_id: int) -> Item:
        """An item by its number. Raises KeyError if there is none."""
        (item,) = self._items([item_id])
        return item

    def _items(self, item_id: int | Sequence[int]) -> list[Item]:
        """Items by their numbers. Raises KeyError if one is not there."""
        numbers = numbers_of(item_id)
        found = {item.id: item for item in self.database.items(*condition(item_id=numbers))}
        for number in numbers:
            if number not in found:
                raise KeyError(f"there is no item {number}")
        return [found[number] for number in numbers]

    def get_all(self, *, user_id: str = ANY, agent_id: str = ANY, run_id: str = ANY) -> list[Item]:
        """Items of a user, an agent or a run, in the order in which they were added; without any, all.

        Raises:
            ValueError: One is given, and is None or empty: a name that an application has lost stands for nobody.
        """
        return self.database.items(*condition(**given(user_id=user_id, agent_id=agent_id, run_id=run_id)))

    def delete(
        self, item_id: int | Sequence[int] = ANY, *, user_id: str = ANY, agent_id: str = ANY, run_id: str = ANY
    ) -> int:
        """Delete items, or all of a user, an agent or a run; text, index, embeddings, memory and adapters.

        All of them go, or none.

        A memory that held some of it is made again from the texts that are left, when it is needed next, and is then
        the memory of a user who never said it, bit for bit. Adapters that were taught some of it, or later, go.

        Args:
            item_id: Number of an item, or several.
            user_id: Whose items are deleted.
            agent_id: Agent that they were said to.
            run_id: Conversation that they belong to.

        Returns:
            Number of items that are gone.

        Raises:
            KeyError: There is no such item.
            ValueError: Nothing says what is to be deleted, or what is given is None or empty.
        """
        chosen = given(item_id=item_id, user_id=user_id, agent_id=agent_id, run_id=run_id)
        if "item_id" in chosen:
            chosen["item_id"] = [item.id for item in self._items(item_id)]
        where, values = condition(**chosen)
        if not values:
            raise ValueError("say what is to be deleted: an item_id, a user_id, an agent_id or a run_id")
        with self._lock:
            gone = self.database.delete(where, values)
            self._sweep()
        return len(gone)

    def memory(self, user_id: str) -> Memory | None:
        """A user's memory, brought up to date; None while the conversation is too short to be compressed."""
        check_names(user_id=user_id)
        with self._lock:
            return self.answering().histories.history(user_id).memory

    def consolidate(
        self, *, user_id: str, settings: RememberSettings | None = None, progress: bool = True
    ) -> RememberReport:
        """Teach adapters of the user's own what was said since the last time, so that it is recalled backward.

        Each page of a run has an adapter, which stays as it is when more is learned (`AdapterShelf`). This is
        training, and takes minutes a page. If it is interrupted, the same call goes on.

        Args:
            user_id: Whose conversation it is.
            settings: How it is learned.
            progress: Show bars.

        Raises:
            ValueError: There is nothing new to learn, or the memories are another model's, or written by an adapter.
        """
        check_names(user_id=user_id)
        with self._lock:
            return self._adapters().consolidate(user_id, settings, progress)

    def rebuild(self, user_id: str | None = None) -> None:
        """Make memories anew from the texts, with the store's model and settings; adapters are removed.

        Args:
            user_id: Whose memory; None: all, also if they were made with another model.

        Raises:
            ValueError: One user's memory cannot be another model's than those of the others; or the user has said
                nothing.
        """
        if user_id is not None:
            check_names(user_id=user_id)
            if not self.database.items(*condition(user_id=user_id), more="LIMIT 1"):
                raise ValueError(f"nothing was said by {user_id!r}")
        with self._lock:
            if user_id is not None:
                self.answering()
            reading = self.answering(checked=False)
            self.database.forget_memories(self._identity(), user_id)
            self._sweep()
            for user in self.users() if user_id is None else [user_id]:
                reading.histories.history(user)

    def answering(self, *, checked: bool = True) -> Answering:
        """The model with what it needs to read users' histories; loads it when it is asked for first.

        Args:
            checked: Whether the folder's memories must be of this model and these settings.

        Raises:
            ValueError: They are not.
        """
        with self._lock:
            if self._answering is None:
                pipeline = self._model.pipeline(DEFAULT_CONFIG)
                turns, folder = TurnCodec(pipeline.codec, self._system), self.folder / "memories"
                parts = self.database.setting("turns")
                if parts is not None and kept(self.database, "turns", None) == turns.description:
                    turns = TurnCodec(pipeline.codec, self._system, json.loads(parts))
                model, layout = pipeline.model, self._model.layout
                histories = Histories(model, layout, turns, self.database, folder, self._raw_tokens)
                self._answering = Answering(pipeline, turns, histories)
            identity = self._identity_of(self._answering.turns)
            self._answering.histories.made_with = identity["made_with"]
            if checked:  # each time, as another process may have made the memories anew with another model
                self._model.check(identity)
            return self._answering

    def _identity(self):
        return self._identity_of(self.answering(checked=False).turns)

    def _identity_of(self, turns):
        made_with = {"turns": turns.description, "system": self._system, "raw_tokens": self._raw_tokens}
        return {**self._model.identity(**made_with), "turns": json.dumps(turns.parts)}

    def _adapters(self):
        return self.answering().adapters(self.database, self.folder / "adapters")

    def _sweep(self):
        """Remove files that the database names no longer."""
        if self._answering is not None:
            self._answering.histories.sweep()
        Histories.sweep_folder(self.folder / "memories", self.database)
        UserAdapters.sweep(self.folder / "adapters", self.database)

    def _written(self, conversations, user, passages, by, stream, settings):
        """Replies to messages behind what a user has said, a list, or the pieces of the only one."""
        check_names(user_id=user)
        if passages < 0:
            raise ValueError(f"passages must be 0 or more, got {passages}")
        self._search.check_way(by)  # not only when there is something to look up
        with self._lock:
            reading = self.answering()
            history, rows = reading.histories.history(user), []
            for said in conversations:
                found = []
                if passages and history.compressed:  # what comes later is read as it is anyway
                    found = self._search(said[-1][1], user_id=user, limit=passages, by=by, up_to=history.compressed)
                rows.append(reading.row(history, said, [one.item for one in found], settings))
            if stream:
                return reading.streamed(rows[0], history.memory, self._lock, settings)
            return reading.written(rows, history.memory, settings)
