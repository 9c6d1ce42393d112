"""`AdapterShelf`: documents that are remembered apart, an adapter for each, so that none disturbs another."""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapter_folder import put_weights, weights_of
from ..config import R3MemConfig
from ..documents import Documents, by_name
from ..files import locked
from ..hierarchy import LEVELS, EntityFinder, QueryBuilder
from ..hierarchy.pairs import mentioned
from ..manifest import OF_A_DOCUMENT, adapters_in, interrupted_run, is_adapter, read_manifest
from ..pipeline import R3MemPipeline
from ..remembered import Entry, sha256
from ..training.remember import RememberReport
from ..training.settings import RememberSettings
from .items import check_query
from .lookup import WordIndex

_MODEL = "smollm2-135m"
# Queries that are asked at one time.
_BATCH = 16
# Digits of each of the two digests in the name of an adapter's folder, that of the document's name and its text's.
_DIGITS = len(OF_A_DOCUMENT) // (2 * len("[0-9a-f]"))
# Beginning of the name of a folder that is being removed.
_REMOVED = ".removed-"


class AdapterShelf:
    """Documents that are remembered apart: one base model, and an adapter for each document in a folder of its own.

    One adapter learns a page in minutes, and twenty pages hardly: they disturb each other, all are learned again with
    each new one, and other text is read worse. On a shelf a document takes as long as if it were the only one, and
    does not change when another is added or forgotten. A query finds its adapter by its words, and what comes back is
    checked against the digest of what was learned: it is the text, to the last character, or nothing.

    Several threads may recall: they take turns, also with stores of the same pipeline. Of two that remember or forget
    at one time the second is refused.

    >>> shelf = AdapterShelf("shelf")
    >>> reports = shelf.remember({"page 1": page})
    >>> shelf.recall(reports["page 1"].pairs[0].query) == page.strip()

    Args:
        folder: Folder of the adapters, made if it is not there.
        model: Base model, as `R3MemPipeline` takes it by name; None: that of the adapters that are there, else
            `"smollm2-135m"`. Or a pipeline, in whose model the adapters take turns while they are needed: a new
            document starts with those that it has.
        config: Settings of its adapters; None: those of the adapters that are there, else the defaults.
        settings: More keyword arguments of `R3MemPipeline`: `device`, `dtype`, `seed` and others.

    Raises:
        TypeError: Settings are given beside a pipeline, which has its own.
        ValueError: The folder holds an adapter itself, or one that is damaged, or the model is an adapter.
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
        self._loaded, self._lock = model if isinstance(model, R3MemPipeline) else None, threading.Lock()
        if self._loaded is not None and (config is not None or settings):
            raise TypeError("a pipeline has its settings already: give neither a config nor other settings beside it")
        if isinstance(model, (str, Path)) and is_adapter(model):
            raise ValueError(f"{model} is an adapter; those of a shelf are learned from a base model: name that")
        if is_adapter(folder):
            raise ValueError(
                f"{folder} holds one adapter for all that it remembers, and no others: load it with "
                f"R3MemPipeline({str(folder)!r}), or choose another folder"
            )
        self.entries()

    def __repr__(self):
        return f"AdapterShelf({str(self._folder)!r}, {len(self.documents)} documents)"

    @property
    def documents(self) -> tuple[str, ...]:
        """Names of the documents, the oldest first."""
        return tuple({_document_of(manifest): None for _, manifest in self._manifests()})

    def entries(self) -> list[Entry]:
        """Return what is remembered: an entry for each query, as `r3mem.json` has them.

        Raises:
            ValueError: An adapter is damaged.
        """
        return [entry for _, manifest in self._manifests() for entry in manifest["remembered"]]

    def remember(
        self,
        documents: Documents,
        *,
        settings: RememberSettings | None = None,
        builder: QueryBuilder | None = None,
        entity_finder: EntityFinder | None = None,
        levels: Sequence[str] = LEVELS,
        progress: bool = True,
    ) -> dict[str, RememberReport]:
        """Fine-tune an adapter for each document, until greedy recall gives each of its contexts back exactly.

        A document that is there with the same text is left alone if all of it is exact, else learned further; one of
        another text takes the place of that of the same name. When it is interrupted, the same call goes on where it
        was.

        Args:
            documents: A text, several, or texts by name; a `Path` is a UTF-8 text file. A text without a name is named
                after its digest.
            settings: How pairs are learned; None: the defaults.
            builder: Writes the queries, see `hierarchy.build_pairs`. No two documents have the same one.
            entity_finder: Finds entities, see there.
            levels: Levels of which contexts are remembered, see there.
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
                path = self._folder / f"{sha256(name)[:_DIGITS]}{sha256(text)[:_DIGITS]}"
                # A run that was killed between its last save and its end leaves its checkpoint beside the adapter.
                whole = is_adapter(path) and interrupted_run(path) is None
                if not (whole and all(entry["exact"] for entry in read_manifest(path)["remembered"])):
                    self._refuse_others()
                    others = [m for _, m in self._manifests() if _document_of(m) != name]
                    with adapter_in(self._pipeline(), path if is_adapter(path) else None) as pipeline:
                        reports[name] = pipeline.remember(
                            {name: text}, folder=path, settings=settings, builder=builder,
                            entity_finder=entity_finder, levels=levels,
                            taken=[entry["query"] for other in others for entry in other["remembered"]],
                            progress=progress,
                        )  # fmt: skip
                self._remove(other for other in self._of_name(name) if other != path)
        return reports

    def recall(self, query: str | Sequence[str], *, max_new_tokens: int | None = None) -> str | list[str]:
        """The context that a query was remembered for, read backward by the adapter that knows it, greedily.

        Args:
            query: A query, or several.
            max_new_tokens: Tokens at most, so that a longer context is not found; None: as many as the longest has.

        Returns:
            The context, exactly as it was remembered; a list of them for several queries. An empty string for a query
            that nothing was remembered for, or whose context was not learned to the last token; and for one that was
            not learned and mentions an entity of another document that neither this one nor the context has.

        Raises:
            ValueError: Nothing is remembered, a query is empty, or longer than the model's positions.
        """
        queries = [query] if isinstance(query, str) else list(query)
        while paths := adapters_in(self._folder):
            try:
                found = self._recalled(queries, paths, max_new_tokens)
                return found[0] if isinstance(query, str) else found
            except FileNotFoundError:  # another process has replaced or forgotten a document
                if all(path.is_dir() for path in paths):
                    raise
        raise ValueError(f"nothing is remembered in {self._folder}: remember documents there first")

    def _recalled(self, queries, paths, max_new_tokens):
        """Ask each query of its adapter, which is in one of the folders."""
        asked: dict[Path, list[int]] = {}
        entries = entries_in(paths)
        names = {path: {name for entry in some for name in entry["entities"]} for path, some in entries.items()}
        for index, (*_, path) in enumerate(asked_of(queries, entries)):
            asked.setdefault(path, []).append(index)
        found = [""] * len(queries)
        for path, indices in asked.items():
            others = sorted(set().union(*names.values()) - names[path])
            with adapter_in(self._pipeline(), path) as pipeline:
                learned = {entry["query"]: entry["sha256"] for entry in pipeline.remembered}
                for start in range(0, len(indices), _BATCH):
                    some = indices[start : start + _BATCH]
                    texts = pipeline.recall([queries[index] for index in some], max_new_tokens=max_new_tokens)
                    for index, text in zip(some, texts, strict=True):
                        own = learned.get(queries[index].strip())
                        is_known = sha256(text) in ([own] if own else learned.values())
                        strange = [] if own else mentioned(others, queries[index])
                        has_all = all(name.casefold() in text.casefold() for name in strange)
                        found[index] = text if is_known and has_all else ""
        return found

    def find(self, question: str, *, limit: int = 1, whole: bool = True) -> list[str]:
        """Learned queries, those that fit a question best by their words first, for `recall`; no model is asked.

        Adapters give back what they have learned for its own query alone: a question in other words is mostly answered
        with nothing. Queries without a word of the question come last, the oldest first.

        Args:
            question: The question.
            limit: Queries at most.
            whole: Whether to give, in place of the query of a passage, that of the document that it is of; of one that
                was too long, and cut, that of the part.

        Returns:
            The queries, the best first.

        Raises:
            ValueError: Nothing is remembered, the question is empty, or limit is below 1.
        """
        check_query(question, limit)
        entries = self.entries()
        if not entries:
            raise ValueError(f"nothing is remembered in {self._folder}: remember documents there first")
        queries: list[str] = [entry["query"] for entry in entries]
        given = queries
        if whole:
            of_document = {entry["document"]: entry["query"] for entry in entries if entry["level"] == "document"}
            given = [of_document.get(entry["document"]) or entry["query"] for entry in entries]
        return list(dict.fromkeys(given[place] for place in WordIndex(queries).ranked(question)))[:limit]

    @contextlib.contextmanager
    def adapter(self, document: str) -> Iterator[R3MemPipeline]:
        """Give the model a document's adapter inside a `with` block, in which no other thread uses the model.

        Args:
            document: Name of the document.

        Yields:
            A pipeline with the adapter.

        Raises:
            ValueError: There is no document of this name.
        """
        found = [path for path in self._of_name(document) if is_adapter(path)]
        self._refuse_unknown(document, found)
        with adapter_in(self._pipeline(), found[-1]) as pipeline:
            yield pipeline

    def forget(self, document: str) -> None:
        """Remove what was learned of a document, also if it was interrupted. Others stay as they are, to the bit.

        Args:
            document: Name of the document.

        Raises:
            InUseError: Another process writes to the folder (an OSError).
            ValueError: There is no document of this name.
        """
        with locked(self._folder):
            self._sweep()
            found = self._of_name(document)
            self._refuse_unknown(document, found)
            self._remove(found)

    def _refuse_unknown(self, document, found):
        """Raise ValueError if nothing was found of a document."""
        if not found:
            raise ValueError(f"no document {document!r} is remembered here; those that are: {[*self.documents]}")

    def _of_name(self, document: str) -> list[Path]:
        """Folders of a document, whole ones last: several while one replaces another, or if that was interrupted."""
        found = self._folder.glob(f"{sha256(document)[:_DIGITS]}{OF_A_DOCUMENT[: len(OF_A_DOCUMENT) // 2]}")
        whole = adapters_in(self._folder)
        return sorted(found, key=lambda path: whole.index(path) if path in whole else -1)

    def _manifests(self) -> list[tuple[Path, dict[str, Any]]]:
        """Folders and manifests of all adapters, the oldest first, but those that another process removes now."""
        found = []
        for path in adapters_in(self._folder):
            try:
                found.append((path, read_manifest(path)))
            except FileNotFoundError:
                if path.is_dir():
                    raise
        return found

    def _refuse_others(self):
        """Raise ValueError if adapters that are there are of another model, or of other settings."""
        model = self._pipeline().model
        for path, manifest in self._manifests():
            if (manifest["base_fingerprint"], _config_of(manifest)) != (model.base_fingerprint(), model.r3mem_config):
                raise ValueError(
                    f"{path} was made for another base model ({manifest['base_model']}) or with other settings than "
                    "these, and they could not take turns: leave model and config out, or choose another folder"
                )

    def _pipeline(self) -> R3MemPipeline:
        """The pipeline in whose model all adapters take turns."""
        with self._lock:
            if self._loaded is None:
                self._loaded = self._opened()
            return self._loaded

    def _opened(self):
        """Load the pipeline."""
        model: Any = self._model
        config, settings = self._config, dict(self._settings)
        if manifests := self._manifests():
            _, manifest = manifests[0]
            if not (model or manifest["base_model"]):
                raise ValueError(f"{self._folder} was made for a model that had no name: give that model")
            model, config = model or manifest["base_model"], config or _config_of(manifest)
            settings["dtype"] = settings.get("dtype") or manifest.get("dtype")
        return R3MemPipeline(model or _MODEL, config=config, **settings)

    def _remove(self, paths):
        """Remove folders: each is whole until it is gone, even if the process is killed meanwhile."""
        for path in paths:
            gone = path.with_name(f"{_REMOVED}{path.name}")
            os.replace(path, gone)
            shutil.rmtree(gone)

    def _sweep(self):
        """Finish removals of a process that was killed: of folders, and of documents that others have replaced."""
        for path in self._folder.glob(f"{_REMOVED}*"):
            shutil.rmtree(path)
        for document in self.documents:
            self._remove([path for path in self._of_name(document) if is_adapter(path)][:-1])


@contextlib.contextmanager
def adapter_in(pipeline: R3MemPipeline, folder: Path | None) -> Iterator[R3MemPipeline]:
    """Give a pipeline's model the adapter of a folder inside a `with` block; in the end it has its own again.

    Args:
        pipeline: The pipeline.
        folder: Folder of the adapter, of the same base model and settings; None: a new one, as the model's own.

    Yields:
        A pipeline over the same model, with what the adapter remembers.

    Raises:
        OSError: A file of the adapter is missing.
        ValueError: A file is damaged, or base model or settings are other ones.
    """
    model, tokenizer = pipeline.model, pipeline.tokenizer
    with pipeline.lock:  # which stores of the pipeline hold while its model reads
        own = weights_of(model)
        try:
            yield R3MemPipeline(model, tokenizer) if folder is None else R3MemPipeline(folder, tokenizer, base=model)
        finally:
            put_weights(model, own)


def entries_in(folders: Sequence[Path]) -> dict[Path, list[Entry]]:
    """Read what the adapters of some folders remember. Raises OSError if one of them is gone."""
    return {path: read_manifest(path)["remembered"] for path in folders}


def asked_of(queries: Sequence[str], entries: Mapping[Path, Sequence[Entry]]) -> list[list[Path]]:
    """Find the adapters that each query is for: those that know it, else the one that has a query most like it.

    Args:
        queries: The queries.
        entries: What each adapter remembers, by its folder; at least one does.

    Returns:
        Some of the folders for each query, at least one.
    """
    known = [(path, entry["query"]) for path, some in entries.items() for entry in some]
    of_query: dict[str, list[Path]] = {}
    for path, query in known:
        of_query.setdefault(query, []).append(path)
    index = WordIndex([query for _, query in known])
    return [of_query.get(query.strip()) or [known[index.ranked(query)[0]][0]] for query in queries]


def _config_of(manifest: dict[str, Any]) -> R3MemConfig:
    return R3MemConfig.from_dict(manifest["r3mem_config"])


def _document_of(manifest: dict[str, Any]) -> str:
    """Name of the document that an adapter is of, as it was given."""
    entry = manifest["remembered"][0]
    return entry.get("part_of") or entry["document"]


def _named(documents):
    """Read documents; one without a name has always the same, so that an interrupted call finds what it has done."""
    if not isinstance(documents, Mapping):
        texts = [documents] if isinstance(documents, (str, Path)) else list(documents)
        documents = {str(t) if isinstance(t, Path) else f"document {sha256(t)[:_DIGITS]}": t for t in texts}
    return by_name(documents)
