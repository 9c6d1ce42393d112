"""`UserAdapters`: adapters that have learned what users have said, each of them swapped into the one model."""

import contextlib
import hashlib
import shutil
from pathlib import Path

from ..adapter_folder import put_weights, weights_of
from ..files import is_held
from ..manifest import interrupted_run, is_adapter
from ..pipeline import R3MemPipeline
from ..training.remember import RememberReport
from ..training.settings import RememberSettings
from .database import Database
from .items import Item

# Letters of a piece of a text that tells it from others.
_LEAST_LETTERS = 20
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
        name = f"{_begun(user, held.revision)}{items[-1].id}"
        # A process may have been killed between saving the whole adapter and telling the database of it.
        is_whole = is_adapter(self._folder / name) and interrupted_run(self._folder / name) is None
        pipeline = self._with(name if is_whole else held.adapter)
        self._in_use = None  # until it has ended, its weights are nobody's
        report = pipeline.remember(_documents(items), folder=self._folder / name, settings=settings, progress=progress)
        self._in_use = (name, pipeline)
        is_kept = self._database.put_adapter(user, held, name, items[-1].id)
        self.sweep(self._folder, self._database, ended=user)
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
        lines = {_without_speaker(line) for line in text.splitlines()} - {""}
        said = self._database.items("user = ? AND id <= ?", (user, held.learned))
        lengths = [max((len(line) for line in lines if _is_of(line, item.text)), default=0) for item in said]
        best = sorted(range(len(said)), key=lambda place: -lengths[place])
        return [said[place] for place in best if lengths[place]]

    @staticmethod
    def sweep(folder: Path, database: Database, ended: str | None = None) -> None:
        """Remove adapters that are in use no longer; one that another process is training is left to that.

        Args:
            folder: Folder of the adapters.
            database: What was said.
            ended: User of whom nothing is left to go on with. What was begun of others stays, if nothing that it
                learns was deleted.
        """
        users = database.rows("SELECT user, revision, adapter FROM users")
        known = {adapter for _, _, adapter in users}
        going = tuple(_begun(user, revision) for user, revision, _ in users if user != ended)
        for path in folder.glob("*-*"):
            if path.name not in known and not path.name.startswith(going) and not is_held(path):
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


def _begun(user, revision):
    """Beginning of the names of a user's adapters that nothing was deleted since."""
    return f"{hashlib.sha256(user.encode()).hexdigest()[:16]}-{revision:x}-"


def _is_of(line, text):
    """Whether a recalled line is one of a text, or a long enough piece of it; a short one is in many texts."""
    return line in text and (len(line) >= _LEAST_LETTERS or line in map(str.strip, text.splitlines()))


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
