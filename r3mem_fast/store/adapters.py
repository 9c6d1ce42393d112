"""`UserAdapters`: adapters that have learned what users have said, each of them swapped into the one model."""

import contextlib
import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ..adapter_folder import put_weights, weights_of
from ..pipeline import R3MemPipeline
from ..training.remember import RememberReport
from ..training.settings import RememberSettings
from .database import Database, Item

_SPEAKERS = {"user": "User", "assistant": "Assistant"}


class UserAdapters:
    """Adapters of users, in a folder each.

    Args:
        pipeline: Pipeline whose model's adapters they take the place of. As it is now, its adapters are those that a
            new user starts with.
        database: What was said.
        folder: Folder of the adapters.
    """

    def __init__(self, pipeline: R3MemPipeline, database: Database, folder: Path):
        self._pipeline, self._database, self._folder = pipeline, database, folder
        self._fresh = weights_of(pipeline.model)
        self._in_use: tuple[str, R3MemPipeline] | None = None

    def consolidate(self, user: str, settings: RememberSettings | None, progress: bool) -> RememberReport:
        """Teach a user's adapter what was said since the last time; see `MemoryStore.consolidate`."""
        held = self._database.held(user)
        items = self._database.items("user = ? AND id > ?", (user, held.learned))
        if not items:
            raise ValueError(f"there is nothing new to learn of what {user!r} has said")
        name = f"{_prefix(user)}-{held.revision:x}-{items[-1].id}"
        pipeline, self._in_use = self._with(held.adapter), None  # until it has ended, its weights are nobody's
        report = pipeline.remember(_documents(items), folder=self._folder / name, settings=settings, progress=progress)
        self._in_use = (name, pipeline)
        is_kept = self._database.advance(user, held, replace(held, adapter=name, learned=items[-1].id))
        self.sweep(self._folder, self._database, [user])
        if not is_kept:
            raise ValueError(f"what {user!r} has said was changed meanwhile; consolidate again")
        return report

    def recalled(self, user: str, query: str) -> list[Item]:
        """Items that a user's adapter recalls, reading backward; none if what it recalls was never said."""
        held = self._database.held(user)
        while held.adapter is not None:
            try:
                pipeline = self._with(held.adapter)
                break
            except OSError:  # another process has put a newer one in its place
                before, held = held, self._database.held(user)
                if before == held:
                    raise
        else:
            return []
        text = pipeline.recall([query])[0]
        lines = [_without_speaker(line) for line in text.splitlines()]
        said = self._database.items("user = ? AND id <= ?", (user, held.learned))
        return [item for item in said if any(line and line in item.text for line in lines)]

    @staticmethod
    def sweep(folder: Path, database: Database, users: Iterable[str]) -> None:
        """Remove the adapters of some users that are in use no longer, and what was begun of others.

        Args:
            folder: Folder of the adapters.
            database: What was said.
            users: The users.
        """
        for user in users:
            for path in folder.glob(f"{_prefix(user)}-*"):
                if path.name != database.held(user).adapter:
                    with contextlib.suppress(FileNotFoundError):  # another process removes it, too
                        shutil.rmtree(path)

    def _with(self, name: str | None) -> R3MemPipeline:
        """A pipeline over the one model, with the adapters of a folder, or with new ones."""
        if self._in_use is not None and self._in_use[0] == name:
            return self._in_use[1]
        self._in_use = None
        model, tokenizer = self._pipeline.model, self._pipeline.tokenizer
        if name is None:
            put_weights(model, self._fresh)
            return R3MemPipeline(model, tokenizer)
        found = R3MemPipeline(self._folder / name, tokenizer, base=model)
        self._in_use = (name, found)
        return found


def _prefix(user):
    return hashlib.sha256(user.encode()).hexdigest()[:16]


def _documents(items):
    """Texts to be learned, by name: what was said in each run."""
    runs: dict[str | None, list[Item]] = {}
    for item in items:
        runs.setdefault(item.run_id, []).append(item)
    return {
        f"{run or 'conversation'} from {said[0].id}": "\n".join(
            f"{_SPEAKERS[item.role]}: {item.text}" for item in said
        )
        for run, said in runs.items()
    }


def _without_speaker(line):
    for speaker in _SPEAKERS.values():
        line = line.removeprefix(f"{speaker}: ")
    return line.strip()
