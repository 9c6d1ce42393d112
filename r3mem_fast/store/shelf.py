"""`AdapterShelf`: documents that are remembered apart, an adapter for each, so that none disturbs another."""

import hashlib
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapter_folder import put_weights, weights_of
from ..config import R3MemConfig
from ..documents import Documents, by_name
from ..files import locked
from ..hierarchy import LEVELS, EntityFinder, QueryBuilder
from ..manifest import adapters_in, interrupted_run, is_adapter, read_manifest
from ..pipeline import R3MemPipeline
from ..remembered import Entry, sha256
from ..training.remember import RememberReport
from ..training.settings import RememberSettings
from .lookup import WordIndex

_MODEL = "smollm2-135m"
# Queries that are asked at one time.
_BATCH = 16
# Beginning of the name of a folder that is being removed.
_REMOVED = ".removed-"


class AdapterShelf:
    """Documents that are remembered apart: one base model, and an adapter for each document in a folder of its own.

    One adapter learns a page in minutes, and twenty pages hardly: they disturb each other, all are learned again with
    each new one, and other text is read worse. On a shelf a document takes as long as if it were the only one, and
    does not change when another is added or forgotten. A query finds its adapter by its words, and what comes back is
    checked against the digest of what was learned: it is the text, to the last character, or nothing.

    >>> shelf = AdapterShelf("shelf")
    >>> reports = shelf.remember({"page 1": page})
    >>> shelf.recall(reports["page 1"].pairs[0].query) == page

    Args:
        folder: Folder of the adapters, made if it is not there.
        model: Base model, as `R3MemPipeline` takes it by name; None: that of the adapters that are there, else
            `"smollm2-135m"`. Or a pipeline, in whose model the adapters take turns: a new document starts with those
            that it has now.
        config: Settings of its adapters; None: those of the adapters that are there, else the defaults.
        settings: More keyword arguments of `R3MemPipeline`: `device`, `dtype`, `seed` and others.

    Raises:
        TypeError: Settings are given beside a pipeline, which has its own.
        ValueError: The folder holds an adapter itself, or one that is damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        model: str | Path | R3MemPipeline | None = None,
        *,
        config: R3MemConfig | None = None,
        **settings: Any,
    ):
        self._folder, self._model, self._config, self._settings = Path(folder), model, config, settings
        if isinstance(model, R3MemPipeline) and (config is not None or settings):
            raise TypeError("a pipeline has its settings already: give neither a config nor other settings beside it")
        if is_adapter(folder):
            raise ValueError(
                f"{folder} holds one adapter for all that it remembers, and no others: load it with "
                f"R3MemPipeline({str(folder)!r}), or choose another folder"
            )
        self._loaded: R3MemPipeline | None = model if isinstance(model, R3MemPipeline) else None
        self._fresh: dict[str, Any] = {} if self._loaded is None else weights_of(self._loaded.model)
        # The folder whose adapter the model has at the moment.
        self._in_use: tuple[Path, R3MemPipeline] | None = None
        self.entries()

    def __repr__(self):
        return f"AdapterShelf({str(self._folder)!r}, {len(self.documents)} documents)"

    @property
    def documents(self) -> tuple[str, ...]:
        """Names of the documents, the oldest first."""
        return tuple(self._folders())

    def entries(self) -> list[Entry]:
        """Return what is remembered: an entry for each query, as `r3mem.json` has them.

        Raises:
            ValueError: An adapter is damaged.
        """
        return [entry for path in adapters_in(self._folder) for entry in read_manifest(path)["remembered"]]

    def remember(
        self,
        documents: Documents,
        *,
        settings: RememberSettings | None = None,
        builder: QueryBuilder | None = None,
        entity_finder: EntityFinder | None = None,
        levels: Sequence[str] = LEVELS,
        taken: Collection[str] = (),
        progress: bool = True,
    ) -> dict[str, RememberReport]:
        """Fine-tune an adapter for each document, until greedy recall gives each of its contexts back exactly.

        A document that is there with the same text is learned further if a context of it is not exact, else left
        alone; one of another text takes the place of that of the same name. When it is interrupted, the same call goes
        on where it was.

        Args:
            documents: A text, several, or texts by name; a `Path` is a UTF-8 text file. A text without a name is named
                after its digest.
            settings: How pairs are learned; None: the defaults.
            builder: Writes the queries, see `hierarchy.build_pairs`.
            entity_finder: Finds entities, see there.
            levels: Levels of which contexts are remembered, see there.
            taken: Queries that ask for something else already, see there; those of the other documents do.
            progress: Show bars.

        Returns:
            Reports by name, of those that were learned now.

        Raises:
            InUseError: Another process writes to the folder (an OSError).
            IntegrityError: A pass could not be trusted.
            ValueError: A text is empty, a passage beyond the model's positions cannot be cut, or the adapters that
                are there belong to another model or have other settings.
        """
        reports = {}
        with locked(self._folder):
            self._sweep()
            for name, text in _named(documents).items():
                path = self._folder / hashlib.sha256(f"{name}\0{text}".encode()).hexdigest()[:16]
                # A run that was killed between its last save and its end leaves its checkpoint beside the adapter.
                whole = is_adapter(path) and interrupted_run(path) is None
                if not (whole and all(entry["exact"] for entry in read_manifest(path)["remembered"])):
                    pipeline, self._in_use = self._with(path if is_adapter(path) else None), None
                    others = [entry["query"] for entry in self.entries() if _document_of(entry) != name]
                    reports[name] = pipeline.remember(
                        {name: text}, folder=path, settings=settings, builder=builder, entity_finder=entity_finder,
                        levels=levels, taken=[*taken, *others], progress=progress,
                    )  # fmt: skip
                    self._in_use = (path, pipeline)
                for other in self._folders().get(name, []):
                    if other != path:
                        self._remove(other)
        return reports

    def recall(self, query: str | Sequence[str], *, max_new_tokens: int | None = None) -> str | list[str]:
        """The context that a query was remembered for, read backward by the adapter that knows it, greedily.

        Args:
            query: A query, or several.
            max_new_tokens: Tokens of a context at most; None: as many as the longest of its document has.

        Returns:
            The context, exactly as it was remembered; a list of them for several queries. An empty string for a query
            that nothing was remembered for, or whose context was not learned to the last token.

        Raises:
            ValueError: Nothing is remembered, a query is empty, or longer than the model's positions.
        """
        queries = [query] if isinstance(query, str) else list(query)
        asked: dict[Path, list[int]] = {}
        paths = adapters_in(self._folder)
        if not paths:
            raise ValueError(f"nothing is remembered in {self._folder}: remember documents there first")
        for index, path in enumerate(asked_of(queries, paths)):
            asked.setdefault(path, []).append(index)
        found = [""] * len(queries)
        for path, indices in asked.items():
            pipeline = self._with(path)
            known = {entry["sha256"] for entry in pipeline.remembered}
            for start in range(0, len(indices), _BATCH):
                some = indices[start : start + _BATCH]
                texts = pipeline.recall([queries[index] for index in some], max_new_tokens=max_new_tokens)
                for index, text in zip(some, texts, strict=True):
                    found[index] = text if sha256(text) in known else ""
        return found[0] if isinstance(query, str) else found

    def pipeline(self, document: str) -> R3MemPipeline:
        """Return a pipeline with a document's adapter, which it has until the shelf is asked for something else.

        Args:
            document: Name of the document.

        Raises:
            ValueError: There is no document of this name.
        """
        return self._with(self._folders_of(document)[-1])

    def forget(self, document: str) -> None:
        """Remove a document's adapter. The others stay as they are, to the bit.

        Args:
            document: Name of the document.

        Raises:
            InUseError: Another process writes to the folder (an OSError).
            ValueError: There is no document of this name.
        """
        with locked(self._folder):
            self._sweep()
            for path in self._folders_of(document):
                self._remove(path)

    def _folders_of(self, document):
        """Folders of a document's adapters; raises ValueError if there is none."""
        found = self._folders()
        if document not in found:
            raise ValueError(f"no document {document!r} is remembered here; those that are: {[*found]}")
        return found[document]

    def _folders(self):
        """Folders of each document's adapters by name, the oldest first: one, or two while one replaces another."""
        found: dict[str, list[Path]] = {}
        for path in adapters_in(self._folder):
            found.setdefault(_document_of(read_manifest(path)["remembered"][0]), []).append(path)
        return found

    def _with(self, path: Path | None) -> R3MemPipeline:
        """A pipeline over the one model, with the adapter of a folder, or with a new one."""
        if path is not None and self._in_use is not None and self._in_use[0] == path:
            return self._in_use[1]
        pipeline, self._in_use = self._shared(), None
        model, tokenizer = pipeline.model, pipeline.tokenizer
        if path is None:
            put_weights(model, self._fresh)
            return R3MemPipeline(model, tokenizer)
        found = R3MemPipeline(path, tokenizer, base=model)
        self._in_use = (path, found)
        return found

    def _shared(self) -> R3MemPipeline:
        """The pipeline whose model all adapters take turns in."""
        if self._loaded is None:
            model: Any = self._model
            config, settings = self._config, dict(self._settings)
            if paths := adapters_in(self._folder):
                manifest = read_manifest(paths[0])
                model = model or manifest["base_model"] or None
                config = config or R3MemConfig.from_dict(manifest["r3mem_config"])
                settings["dtype"] = settings.get("dtype") or manifest.get("dtype")
            self._loaded = R3MemPipeline(model or _MODEL, config=config, **settings)
            self._fresh = weights_of(self._loaded.model)
        return self._loaded

    def _remove(self, path: Path) -> None:
        """Remove an adapter: whole until it is gone, even if the process is killed meanwhile."""
        if self._in_use is not None and self._in_use[0] == path:
            self._in_use = None
        gone = path.with_name(f"{_REMOVED}{path.name}")
        os.replace(path, gone)
        shutil.rmtree(gone)

    def _sweep(self) -> None:
        """Remove what a process left that was killed while it removed an adapter."""
        for path in self._folder.glob(f"{_REMOVED}*"):
            shutil.rmtree(path)


def asked_of(queries: Sequence[str], folders: Sequence[Path]) -> list[Path]:
    """Find the adapter that each query is for: the one that knows it, or that has the query of most of its words.

    Args:
        queries: The queries.
        folders: Folders of adapters, at least one.

    Returns:
        One of the folders for each query.
    """
    entries = [(path, entry["query"]) for path in folders for entry in read_manifest(path)["remembered"]]
    of_query = {query: path for path, query in entries}
    index = WordIndex([query for _, query in entries])
    return [of_query.get(query) or entries[index.ranked(query)[0]][0] for query in queries]


def _document_of(entry: Entry) -> str:
    """Name of the document that an entry is of, as it was given."""
    return entry.get("part_of") or entry["document"]


def _named(documents):
    """Read documents; one without a name has always the same, so that an interrupted call finds what it has done."""
    if not isinstance(documents, Mapping):
        texts = [documents] if isinstance(documents, (str, Path)) else list(documents)
        documents = {str(t) if isinstance(t, Path) else f"document {sha256(t)[:8]}": t for t in texts}
    return by_name(documents)
