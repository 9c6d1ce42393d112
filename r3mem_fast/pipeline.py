"""`R3MemPipeline`: text in, text out. Remember documents in an adapter, recall their contexts from queries."""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from . import storage
from .hierarchy import LEVELS, EntityFinder, Pair, QueryBuilder, build_pairs
from .model import R3MemModel
from .models import default_dtype, load_model
from .training.collate import padded
from .training.remember import CHECKPOINT, RememberReport, RememberSettings, remember

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class R3MemPipeline:
    """A memory network over a model and its tokenizer.

    >>> pipeline = R3MemPipeline("smollm2-135m")
    >>> report = pipeline.remember(page)
    >>> pipeline.recall(report.pairs[0].query) == report.pairs[0].context

    model: `"smollm2-135m"`, a hub id, the folder of a model, the folder of an adapter that `save` wrote, an
        `R3MemModel`, or a `transformers` causal language model, which is changed in place; the last two with their
        tokenizer. config: for a model without adapters. device, dtype: of a model that is loaded here; by default the
        dtype that an adapter was trained in, and for a new one bfloat16 where the device computes in it natively,
        else float32. seed: of new adapters, which start the same every time.
    Raises OSError for a model or folder that is not there, ValueError for one that is damaged or foreign, TypeError
    for arguments that do not go together.
    """

    def __init__(self, model, tokenizer=None, *, config=None, device="cpu", dtype=None, seed=0):
        self.folder, self.remembered = None, []
        if isinstance(model, (str, Path)):
            if tokenizer is not None:
                raise TypeError("a model that is given by name brings its own tokenizer")
            if (Path(model) / storage.MANIFEST).is_file():
                if config is not None:
                    raise TypeError(f"{model} was saved with its config; another one does not fit its adapters")
                self._load(Path(model), device, dtype)
                return
            if (Path(model) / CHECKPOINT).is_file():
                raise ValueError(
                    f"{model} holds a run that was interrupted, and no adapter yet: remember the same documents "
                    "again, with the model that they were for and this folder"
                )
            model, tokenizer = load_model(model, dtype=dtype or default_dtype(device))
            model.to(device)
        elif tokenizer is None:
            raise TypeError("a model object needs its tokenizer: R3MemPipeline(model, tokenizer)")
        if not isinstance(model, R3MemModel):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = R3MemModel(model, config)
        elif config is not None:
            raise TypeError("an R3MemModel has its config already")
        self.model, self.tokenizer = model.eval(), tokenizer

    def _load(self, folder, device, dtype):
        manifest = storage.read_manifest(folder)
        # What was learned to the last token in one arithmetic need not be known in another.
        dtype = dtype or _DTYPES.get(manifest.get("dtype"), torch.float32)
        base, self.tokenizer = storage.load_base(folder, manifest, dtype)
        self.model = R3MemModel.from_pretrained(folder, base.to(device))
        self.folder, self.remembered = folder, manifest.get("remembered", [])

    def remember(
        self,
        documents: str | Sequence[str] | Mapping[str, str],
        *,
        folder=None,
        settings: RememberSettings | None = None,
        builder: QueryBuilder | None = None,
        entity_finder: EntityFinder | None = None,
        levels: Sequence[str] = LEVELS,
        progress=True,
    ) -> RememberReport:
        """Fine-tune documents into the adapter until greedy recall gives each of their contexts back exactly.

        documents: a text, several, or texts by name. Each is taken apart into a document, its paragraphs and their
        passages, and a query is written for each (`hierarchy.build_pairs`). What was remembered before is recalled
        first and learned again along with them, so that it is not forgotten; a document of the same name is replaced.
        folder: where the adapter is saved at the end, and a checkpoint meanwhile: a run that was interrupted goes on
        from there when it is started again with the same arguments, to the same result. Without, nothing is written.
        settings: `RememberSettings`. builder, entity_finder, levels: see `hierarchy.build_pairs`.

        Raises ValueError for an empty text, a context beyond the model's positions, a folder with another run or
        another adapter in it; IntegrityError if a pass could not be trusted. What could not be learned in
        `settings.max_steps` is no error: `report.exact` says so of each pair.
        """
        documents = _by_name(documents, {entry["document"] for entry in self.remembered})
        if folder is not None:
            folder = Path(folder)
            self._refuse_foreign(folder)
        earlier = [entry for entry in self.remembered if entry["document"] not in documents]
        pairs = build_pairs(
            documents,
            self.tokenizer,
            builder,
            entity_finder=entity_finder,
            levels=levels,
            taken={entry["query"] for entry in earlier},
        )
        rehearsed = self._rehearsed(earlier)
        report = remember(self.model, self.tokenizer, [*rehearsed, *pairs], settings, folder=folder, progress=progress)
        learned = {pair.query for pair in report.pairs}
        lost = [entry for entry in earlier if entry["query"] not in learned]
        report = dataclasses.replace(report, lost=tuple(entry["query"] for entry in lost))
        self.remembered = [{**entry, "exact": False} for entry in lost] + [
            {
                "level": pair.level,
                "document": pair.document,
                "query": pair.query,
                "entities": list(pair.entities),
                "builder": pair.builder,
                "tokens": len(self._ids(pair.context)),
                "sha256": _sha256(pair.context),
                "exact": exact,
            }
            for pair, exact in zip(report.pairs, report.exact, strict=True)
        ]
        if folder is not None:
            self.save(folder)
            (folder / CHECKPOINT).unlink(missing_ok=True)
        return report

    def recall(self, query: str | Sequence[str], *, max_new_tokens: int | None = None) -> str | list[str]:
        """The context that a query was remembered for, read backward, greedily; of several queries a list.

        A query that nothing was remembered for gives an empty string, as far as the adapter has learned to tell.
        max_new_tokens: at most so many; as many as the longest context that was remembered, or 256 if none is known.
        Raises ValueError for an empty query, or one longer than the model's positions.
        """
        queries = [query] if isinstance(query, str) else list(query)
        rows = [self._ids(re.sub(r"\s+", " ", text).strip()) for text in queries]
        if not rows or not all(rows):
            raise ValueError("the query is empty")
        if max_new_tokens is None:
            max_new_tokens = max((entry["tokens"] for entry in self.remembered), default=256) + 1
        ids, mask = padded(rows)
        found = self.model.recall(ids.to(self.model.device), mask.to(self.model.device), max_new_tokens=max_new_tokens)
        texts = [self.tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in found]
        return texts[0] if isinstance(query, str) else texts

    def save(self, folder):
        """Save the adapter, and what was remembered (queries and digests, no contexts), into a folder."""
        self.folder = Path(folder)
        dtype = str(self.model.peft_model.dtype).removeprefix("torch.")
        self.model.save_pretrained(folder, dtype=dtype, remembered=self.remembered)

    def _rehearsed(self, entries):
        """What was remembered before, as pairs: recalled, and taken if it is still what it was."""
        entries = sorted((entry for entry in entries if entry["exact"]), key=lambda entry: entry["tokens"])
        contexts = []
        for start in range(0, len(entries), 16):
            contexts += self.recall([entry["query"] for entry in entries[start : start + 16]])
        return [
            Pair(
                *(entry[name] for name in ("level", "document", "query")),
                context,
                tuple(entry["entities"]),
                entry["builder"],
            )
            for entry, context in zip(entries, contexts, strict=True)
            if _sha256(context) == entry["sha256"]
        ]

    def _refuse_foreign(self, folder):
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file; an adapter is saved as a folder")
        # With a checkpoint beside it: of the very run that made it, or refused where that is read.
        alone = (folder / storage.MANIFEST).is_file() and not (folder / CHECKPOINT).is_file()
        if alone and (self.folder is None or self.folder.resolve() != folder.resolve()):
            raise ValueError(
                f"{folder} holds an adapter already; choose another folder, or remember more with "
                f"R3MemPipeline({str(folder)!r})"
            )

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids


def _by_name(documents, taken):
    """Documents by name; those without one get numbers that are not taken. Raises ValueError if there are none."""
    if isinstance(documents, str):
        documents = [documents]
    if not isinstance(documents, Mapping):
        numbers = (n for n in itertools.count(1) if f"document {n}" not in taken)
        documents = {f"document {n}": text for n, text in zip(numbers, documents, strict=False)}
    if not documents:
        raise ValueError("there is no document to remember")
    if wrong := [name for name in documents if not isinstance(name, str)]:
        raise TypeError(f"a document's name must be a string, got {wrong[0]!r}")
    return dict(documents)


def _sha256(text):
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
