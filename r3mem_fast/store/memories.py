"""`Histories`: the memory of each user's conversation, a file that follows what the database holds.

A history is what `TurnCodec` makes of a user's items, in order. Whole segments of it are matched, as long as at least
`raw_tokens` of the newest stay as they are, and the database says up to which token. Segments are always cut at the
same places, so that a memory that was streamed, one that was made anew after something was deleted, and one of a user
who never said it are the same, bit for bit.
"""

import dataclasses
import hashlib
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..files import locked
from ..memory.layout import MemoryLayout
from ..memory.memory import Memory
from ..model import R3MemModel
from .beside import with_layout
from .database import Database
from .items import Held, Item
from .turns import TurnCodec

# Memories that stay on the model's device, and seconds that one process waits for another that writes a file.
_CACHED, _SECONDS_TO_WAIT = 16, 60.0
_SUFFIX = ".safetensors"


class History(NamedTuple):
    """A user's history as it is read: a memory, and what has been said since.

    Attributes:
        memory: Memory of one row, without unfinished tokens; None: the history is shorter than a segment.
        tail: Token ids of what comes behind it.
        last_role: Role of the last message; None: nothing was said.
        compressed: Number of the last item that is in the memory, wholly or in part; 0: none.
    """

    memory: Memory | None
    tail: list[int]
    last_role: str | None
    compressed: int = 0


class Histories:
    """Keeps the memories of users' histories. One thread at a time may use it; processes may share the folder.

    Args:
        model: The model, whose memories its base model reads.
        layout: Layout of the memories.
        turns: Codec of conversations.
        database: What was said.
        folder: Folder of the memories' files, made if it is not there.
        raw_tokens: Tokens, the newest ones, that are never compressed.

    Attributes:
        made_with: What the database must say that memories are made with, as a memory is written; None: anything.

    Raises:
        ValueError: What the chat template puts before a conversation does not fit into a segment, or the budget; or
            memories would be matched when a text has ended, which a conversation never has.
    """

    def __init__(
        self,
        model: R3MemModel,
        layout: MemoryLayout,
        turns: TurnCodec,
        database: Database,
        folder: Path,
        raw_tokens: int,
    ):
        if layout.waits:
            raise ValueError(
                'beyond_budget="rematch_once" matches a memory when its text has ended, and a conversation goes on: '
                'use "rematch" or "forget"'
            )
        self._model, self._layout, self._turns, self._database = model, layout, turns, database
        self._folder, self._raw_tokens = folder, raw_tokens
        self.made_with: str | None = None
        self._length = layout.segment_length
        self._cache: dict[str, Memory] = {}  # by name of the file, those that were used last at the end
        folder.mkdir(parents=True, exist_ok=True)
        self.sweep()
        if len(turns.opening) >= self._length:
            raise ValueError(
                f"the chat template puts {len(turns.opening)} tokens before a conversation, which do not fit into a "
                f"segment of {self._length}; use a longer segment_length"
            )
        if len(turns.opening) > layout.most_pinned:
            raise ValueError(
                f"the chat template puts {len(turns.opening)} tokens before a conversation, and at most "
                f"{layout.most_pinned} can stay as they are beside a budget of {layout.budget} slots; use a smaller "
                'memory_budget, or beyond_budget="forget"'
            )

    def history(self, user: str) -> History:
        """A user's history as it stands in the database; what is to be compressed of it is compressed, and kept."""
        while True:
            held, memory = self._held(user)
            items = self._database.items("user = ? AND id >= ?", (user, held.item))
            role = self._role_before(user, held.item)
            if self._database.held(user).revision != held.revision:
                continue  # something was deleted meanwhile: the items are not those that the memory goes on with
            ids, ends = self._encoded(items, role)
            begun = len(self._turns.opening) if memory is None else 0
            rest = self._turns.opening[:begun] + ids[held.tokens :]
            if memory is None or len(rest) >= self._raw_tokens:
                break
            self._forget(user, held)  # the newest items were deleted: who never said them would have compressed less
        last = items[-1].role if items else None
        count = (len(rest) - self._raw_tokens) // self._length
        if count < 1:
            return History(memory, rest, last, held.item)
        new, tail = rest[: count * self._length], rest[count * self._length :]
        before = with_layout(self._model.empty_memory(pinned=begun), self._layout) if memory is None else memory
        memory = self._model.compress(torch.tensor([new]), memory=before)
        boundary = _boundary(items, ends, held.tokens + len(new) - begun)
        self._keep(user, held, boundary, memory)
        return History(memory, tail, last, boundary[0])

    def sweep(self) -> None:
        """Remove files that are in use no longer: of what was deleted, and of writers that were killed."""
        known = self.sweep_folder(self._folder, self._database)
        self._cache = {name: memory for name, memory in self._cache.items() if name in known}

    @staticmethod
    def sweep_folder(folder: Path, database: Database) -> set[str]:
        """Remove files that are in use no longer from a folder; returns the names of those that are in use."""
        if not folder.exists():
            return set()
        with locked(folder, _SECONDS_TO_WAIT):
            known = {name for (name,) in database.rows("SELECT file FROM users WHERE file IS NOT NULL")}
            for path in (*folder.glob(f"*{_SUFFIX}"), *folder.glob(f".*{_SUFFIX}.*.tmp")):
                if path.name not in known:
                    path.unlink(missing_ok=True)
        return known

    def _held(self, user: str) -> tuple[Held, Memory | None]:
        """How far a user's memory has come, and the memory."""
        while True:
            held = self._database.held(user)
            if held.file is None:
                return held, None
            try:
                return held, self._read(held.file)
            except FileNotFoundError:  # another process has written a newer one
                if self._database.held(user) == held:  # or the file was lost: its text is read again
                    self._forget(user, held)
            except ValueError as error:
                raise ValueError(f"{error}. Make it anew from the texts: rebuild(), r3mem store rebuild") from None

    def _forget(self, user: str, held: Held) -> None:
        """Forget a memory, unless something has changed meanwhile; its text is read again."""
        if self._database.advance(user, held, dataclasses.replace(held, file=None, item=0, tokens=0)):
            self._drop(held.file)

    def _drop(self, name: str | None) -> None:
        if name is not None:
            (self._folder / name).unlink(missing_ok=True)
            self._cache.pop(name, None)

    def _read(self, name: str) -> Memory:
        memory = self._cache.pop(name, None)
        if memory is None:
            memory = Memory.load(self._folder / name, self._model, device=self._model.device)
        self._cache[name] = memory
        while len(self._cache) > _CACHED:
            del self._cache[next(iter(self._cache))]
        return memory

    def _keep(self, user: str, before: Held, boundary: tuple[int, int], memory: Memory) -> None:
        """Write a memory, and let the database name it, unless something has changed meanwhile."""
        name = f"{hashlib.sha256(user.encode()).hexdigest()[:16]}-{secrets.token_hex(8)}{_SUFFIX}"
        after = dataclasses.replace(before, file=name, item=boundary[0], tokens=boundary[1])
        with locked(self._folder, _SECONDS_TO_WAIT):
            memory.save(self._folder / name)
            kept = self._database.advance(user, before, after, self.made_with)
            self._drop(before.file if kept else name)
        if kept:
            self._cache[name] = memory

    def _role_before(self, user: str, item: int) -> str | None:
        """Role of the message before an item; None if there is none."""
        found = self._database.items("user = ? AND id < ?", (user, item), more="ORDER BY id DESC LIMIT 1")
        return found[0].role if found else None

    def _encoded(self, items: Sequence[Item], role: str | None) -> tuple[list[int], list[int]]:
        """Token ids of items behind a message of a role, and where those of each item end."""
        ids: list[int] = []
        ends = []
        for item in items:
            ids += self._turns.ids([(item.role, item.text)], role)
            ends.append(len(ids))
            role = item.role
        return ids, ends


def _boundary(items: Sequence[Item], ends: Sequence[int], tokens: int) -> tuple[int, int]:
    """Number of the item that a number of tokens ends in, and how many of its own tokens are among them."""
    place = next(place for place, end in enumerate(ends) if end >= tokens)
    return items[place].id, tokens - (ends[place - 1] if place else 0)
