"""`UserAdapters`: adapters that have learned what users have said, each of them swapped into the one model."""

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ..adapter_folder import put_weights, weights_of
from ..files import is_held
from ..manifest import adapters_in, is_adapter, read_manifest
from ..pipeline import R3MemPipeline
from ..training.remember import RememberReport
from ..training.settings import RememberSettings
from .database import Database
from .items import Held, Item
from .shelf import AdapterShelf, asked_of

# Tokens of a page at most, if it is of several items: as many as an adapter learns in minutes.
_PAGE_TOKENS = 256
# Letters of a piece of a text that tells it from others.
_LEAST_LETTERS = 20
_SPEAKERS = {"user": "User", "assistant": "Assistant"}


class UserAdapters:
    """Adapters of users: each learns a page of what one of them has said, and none disturbs another.

    Args:
        pipeline: Pipeline whose model's adapters they take the place of. As it is now, its adapters are those that
            everything is learned from.
        database: What was said.
        folder: Folder of the adapters. In it a folder for each time that a user's were taught, an `AdapterShelf`'s.
    """

    def __init__(self, pipeline: R3MemPipeline, database: Database, folder: Path):
        self._pipeline, self._database, self._folder = pipeline, database, folder
        self._fresh = weights_of(pipeline.model)
        self._in_use: tuple[Path, R3MemPipeline] | None = None

    def consolidate(self, user: str, settings: RememberSettings | None, progress: bool) -> RememberReport:
        """Teach adapters of a user what was said since the last time; see `MemoryStore.consolidate`."""
        held = self._database.held(user)
        items = self._database.items("user = ? AND id > ?", (user, held.learned))
        if not items:
            raise ValueError(f"there is nothing new to learn of what {user!r} has said")
        name = f"{_begun(user, held.revision)}{items[-1].id}"
        taken = [entry["query"] for path in self._adapters_of(held) for entry in read_manifest(path)["remembered"]]
        self._in_use = None  # until it has ended, its weights are nobody's
        put_weights(self._pipeline.model, self._fresh)
        shelf = AdapterShelf(self._folder / name, self._pipeline)
        reports = shelf.remember(
            _pages(items, self._pipeline.codec.count), settings=settings, taken=taken, progress=progress
        )
        names = name if held.adapter is None else f"{held.adapter} {name}"
        is_kept = self._database.put_adapters(user, held, names, items[-1].id)
        self.sweep(self._folder, self._database, ended=user)
        if not is_kept:
            raise ValueError(f"what {user!r} has said was changed meanwhile; consolidate again")
        return RememberReport.joined(list(reports.values()))

    def recalled(self, user: str, query: str) -> list[Item]:
        """Items that a user's adapters recall, reading backward; none if what they recall was never said."""
        held = self._database.held(user)
        while (paths := self._adapters_of(held)) or held.adapter:
            try:
                pipeline = self._with(asked_of([query], paths)[0])
                break
            except (OSError, IndexError):  # another process has removed it
                before, held = held, self._database.held(user)
                if before == held:
                    raise
        else:
            return []
        text = pipeline.recall([query])[0]
        lines = {_without_speaker(line) for line in text.splitlines()} - {""}
        said = self._database.items("user = ? AND id <= ?", (user, held.learned))
        lengths = [max((len(line) for line in lines if _is_of(line, item.text)), default=0) for item in said]
        best = sorted(range(len(said)), key=lambda place: -lengths[place])
        return [said[place] for place in best if lengths[place]]

    @staticmethod
    def sweep(folder: Path, database: Database, ended: str | None = None) -> None:
        """Remove adapters that are in use no longer; those that another process is training are left to that.

        Args:
            folder: Folder of the adapters.
            database: What was said.
            ended: User of whom nothing is left to go on with. What was begun of others stays, if nothing that it
                learns was deleted.
        """
        users = database.rows("SELECT user, revision, adapter FROM users")
        known = {name for _, _, names in users for name in (names or "").split()}
        going = tuple(_begun(user, revision) for user, revision, _ in users if user != ended)
        for path in folder.glob("*-*"):
            if path.name not in known and not path.name.startswith(going) and not is_held(path):
                with contextlib.suppress(FileNotFoundError):  # another process removes it, too
                    shutil.rmtree(path)

    def _adapters_of(self, held: Held) -> list[Path]:
        """Folders of all adapters of a user; earlier versions had one in place of a shelf."""
        paths = [self._folder / name for name in (held.adapter or "").split()]
        return [adapter for path in paths for adapter in ([path] if is_adapter(path) else adapters_in(path))]

    def _with(self, path: Path | None) -> R3MemPipeline:
        """A pipeline over the one model, with the adapter of a folder, or with new ones."""
        if self._in_use is not None and self._in_use[0] == path:
            return self._in_use[1]
        self._in_use = None
        model, tokenizer = self._pipeline.model, self._pipeline.tokenizer
        if path is None:
            put_weights(model, self._fresh)
            return R3MemPipeline(model, tokenizer)
        found = R3MemPipeline(path, tokenizer, base=model)
        self._in_use = (path, found)
        return found


def _begun(user, revision):
    """Beginning of the names of a user's adapters that nothing was deleted since."""
    return f"{hashlib.sha256(user.encode()).hexdigest()[:16]}-{revision:x}-"


def _is_of(line, text):
    """Whether a recalled line is one of a text, or a long enough piece of it; a short one is in many texts."""
    return line in text and (len(line) >= _LEAST_LETTERS or line in map(str.strip, text.splitlines()))


def _pages(items: Sequence[Item], count: Callable[[str], int]) -> dict[str, str]:
    """Texts to be learned, by name: pages of what was said in each run, in whole items.

    Args:
        items: What was said.
        count: Counts the tokens of a text.
    """
    pages: dict[str, str] = {}
    newest: dict[str | None, str] = {}  # page of each run
    for item in items:
        line, name = f"{_SPEAKERS[item.role]}: {item.text}", newest.get(item.run_id)
        longer = line if name is None else f"{pages[name]}\n{line}"
        if name is None or count(longer) > _PAGE_TOKENS:
            name, longer = f"{item.run_id or 'conversation'} from {item.id}", line
            newest[item.run_id] = name
        pages[name] = longer
    return pages


def _without_speaker(line):
    for speaker in _SPEAKERS.values():
        line = line.removeprefix(f"{speaker}: ")
    return line.strip()
