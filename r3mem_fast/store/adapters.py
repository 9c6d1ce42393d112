"""`UserAdapters`: adapters that have learned what users have said, each of them swapped into the one model."""

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ..files import is_held, locked
from ..manifest import adapters_in, is_adapter
from ..pipeline import R3MemPipeline
from ..training.remember import RememberReport
from ..training.settings import RememberSettings
from .database import Database
from .items import Held, Item, folder_after
from .shelf import AdapterShelf, adapter_in, asked_of, entries_in

# Tokens of a page at most, if it is of several items: as many as an adapter learns in minutes.
_PAGE_TOKENS = 256
# Letters of a piece of a text that tells it from others.
_LEAST_LETTERS = 20
_SPEAKERS = {"user": "User", "assistant": "Assistant"}


class UserAdapters:
    """Adapters of users: each learns a page of what one of them has said, and none disturbs another.

    Args:
        pipeline: Pipeline whose model's adapters they take the place of while they are needed. Everything is learned
            from those that it has.
        database: What was said.
        folder: Folder of the adapters. In it a folder for each time that a user's were taught, an `AdapterShelf`'s.
    """

    def __init__(self, pipeline: R3MemPipeline, database: Database, folder: Path):
        self._pipeline, self._database, self._folder = pipeline, database, folder

    def consolidate(self, user: str, settings: RememberSettings | None, progress: bool) -> RememberReport:
        """Teach adapters of a user what was said since the last time; see `MemoryStore.consolidate`."""
        if self._pipeline.model.is_anchored:
            raise ValueError(
                "the memories of this store are written by an adapter, whose place those of a conversation would "
                "take; consolidate it in a store with the base model"
            )
        held = self._database.held(user)
        items = self._database.items("user = ? AND id > ?", (user, held.learned))
        if not items:
            raise ValueError(f"there is nothing new to learn of what {user!r} has said")
        # Named after where it begins, so that it goes on where it was interrupted, whatever has been said since.
        name = folder_after(_begun(user, held.revision), held.learned)
        with locked(self._folder / name):
            shelf = AdapterShelf(self._folder / name, self._pipeline)
            pages = _pages(items, self._pipeline.codec.count)
            reports = shelf.remember(pages, settings=settings, progress=progress)
            names = name if held.adapter is None else f"{held.adapter} {name}"
            is_kept = self._database.put_adapters(user, held, names, items[-1].id)
        self.sweep(self._folder, self._database)
        if not is_kept:
            raise ValueError(f"what {user!r} has said was changed meanwhile; consolidate again")
        return RememberReport.joined(list(reports.values()))

    def recalled(self, user: str, query: str) -> list[Item]:
        """Items that a user's adapters recall, reading backward; none if what they recall was never said."""
        held = self._database.held(user)
        while paths := self._adapters_of(held):
            try:
                texts = [self._asked(path, query) for path in asked_of([query], entries_in(paths))[0]]
                break
            except OSError:  # another process has removed it
                before, held = held, self._database.held(user)
                if before == held:
                    raise
        else:
            return []
        lines = {_without_speaker(line) for text in texts for line in text.splitlines()} - {""}
        said = self._database.items("user = ? AND id <= ?", (user, held.learned))
        lengths = [max((len(line) for line in lines if _is_of(line, item.text)), default=0) for item in said]
        best = sorted(range(len(said)), key=lambda place: -lengths[place])
        return [said[place] for place in best if lengths[place]]

    def _asked(self, path: Path, query: str) -> str:
        """What the adapter of a folder recalls for a query."""
        with adapter_in(self._pipeline, path) as pipeline:
            return pipeline.recall([query])[0]

    @staticmethod
    def sweep(folder: Path, database: Database) -> None:
        """Remove adapters that are in use no longer; those that another process is training are left to that.

        What was begun stays, to be gone on with, if nothing that it learns was deleted.

        Args:
            folder: Folder of the adapters.
            database: What was said.
        """
        users = database.rows("SELECT user, revision, learned, adapter FROM users")
        known = {name for *_, names in users for name in (names or "").split()}
        known |= {folder_after(_begun(user, revision), learned) for user, revision, learned, _ in users}
        for path in folder.glob("*-*"):
            if path.name not in known and not is_held(path):
                with contextlib.suppress(FileNotFoundError):  # another process removes it, too
                    shutil.rmtree(path)

    def _adapters_of(self, held: Held) -> list[Path]:
        """Folders of all adapters of a user; earlier versions had one in place of a shelf."""
        paths = [self._folder / name for name in (held.adapter or "").split()]
        return [adapter for path in paths for adapter in ([path] if is_adapter(path) else adapters_in(path))]


def _begun(user, revision):
    """Beginning of the names of a user's adapters that nothing was deleted since."""
    return f"{hashlib.sha256(user.encode()).hexdigest()[:16]}-{revision:x}"


def _is_of(line, text):
    """Whether a recalled line is one of a text, or a long enough piece of it; a short one is in many texts."""
    return line in text and (len(line) >= _LEAST_LETTERS or line in map(str.strip, text.splitlines()))


def _pages(items: Sequence[Item], count: Callable[[str], int]) -> dict[str, str]:
    """Texts to be learned, by name: pages of what was said in a run, in whole items.

    Args:
        items: What was said, at least one item.
        count: Counts the tokens of a text.
    """
    pages: dict[str, str] = {}
    name, run = "", None
    for item in items:
        line = f"{_SPEAKERS[item.role]}: {item.text}"
        longer = f"{pages[name]}\n{line}" if name else line
        if not name or item.run_id != run or count(longer) > _PAGE_TOKENS:
            name, run, longer = f"{item.run_id or 'conversation'} from {item.id}", item.run_id, line
        pages[name] = longer
    return pages


def _without_speaker(line):
    for speaker in _SPEAKERS.values():
        line = line.removeprefix(f"{speaker}: ")
    return line.strip()
