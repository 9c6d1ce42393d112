"""`R3MemPipeline`: text in, text out. Remember documents in an adapter, recall them; compress histories, read them."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from . import adapter_folder, fingerprints
from .data.models import load_model
from .data.text import read_text
from .devices import DTYPES, as_device, as_dtype, default_dtype
from .files import locked, unfinished_files
from .hierarchy import (
    LEVELS,
    EntityFinder,
    Pair,
    QueryBuilder,
    build_pairs,
    contexts_of,
    cut_document,
    split_document,
)
from .manifest import MANIFEST, REMEMBER_CHECKPOINT, TRAIN_CHECKPOINTS, interrupted_run, read_manifest
from .memory.memory import Memory
from .model import R3MemModel
from .training.collate import padded
from .training.history import TrainReport, TrainSettings, discard_checkpoints, train
from .training.remember import MAX_QUERY_OF_CONTEXT, RememberReport, RememberSettings, remember

# Rows that are compressed or read at one time.
_BATCH = 16
_NEW_TOKENS = 64


class R3MemPipeline:
    """A memory network over a model and its tokenizer.

    >>> pipeline = R3MemPipeline("smollm2-135m")
    >>> report = pipeline.remember(page)
    >>> pipeline.recall(report.pairs[0].query) == report.pairs[0].context

    With memory tokens (`config=R3MemConfig(num_memory_tokens=16)`) it also makes memories:

    >>> memory = pipeline.compress(book)
    >>> pipeline.generate("Who owns Pemberley?", memory=memory)
    >>> pipeline.expand(pipeline.compress(page)) == page  # of a page that was remembered

    Args:
        model: `"smollm2-135m"`, a hub id (of a model or of an adapter), the folder of a model, the folder of an
            adapter that `save` wrote, `"smollm2-135m-memory"` (an adapter that comes with this package), an
            `R3MemModel`, or a `transformers` causal language model, which is changed in place; the last two with their
            tokenizer.
        tokenizer: Of a model that is not given by name.
        base: Of an adapter: its base model, by a name as `load_model` takes it, if it lies elsewhere than when the
            adapter was made. Its fingerprint tells whether it is the right one.
        config: For a model without adapters.
        device: Of a model that is loaded here; None: the CPU, or what `device_map` says.
        dtype: Of such a model; None: the dtype that an adapter was trained in, and for a new one bfloat16 where the
            device computes in it natively, else float32.
        attn_implementation: Of such a model too, see `load_model`.
        seed: Of new adapters, which start the same every time.
        settings: Other keywords of `load_model` (`revision`, `device_map`, `token`, ...).

    Raises:
        OSError: A model or folder is not there.
        ValueError: One is damaged or foreign, or a dtype or a device is none.
        TypeError: The arguments do not go together.
    """

    def __init__(
        self,
        model,
        tokenizer=None,
        *,
        base=None,
        config=None,
        device=None,
        dtype=None,
        attn_implementation=None,
        seed=0,
        **settings,
    ):
        self.folder, self.remembered, self._seen = None, [], None
        dtype = None if dtype is None else as_dtype(dtype)
        if device is not None:
            as_device(device)
        if isinstance(model, (str, Path)):
            if tokenizer is not None:
                raise TypeError("a model that is given by name brings its own tokenizer")
            settings |= {"device": device, "attn_implementation": attn_implementation}
            if folder := adapter_folder.adapter_named(model, **settings):
                if config is not None:
                    raise TypeError(f"{model} was saved with its config; another one does not fit its adapters")
                self._load(folder, base, dtype, settings)
                return
            if base is not None:
                raise TypeError(f"base is of an adapter, and {model} is a model of its own")
            if run := interrupted_run(model):
                raise ValueError(f"{model} holds no adapter yet. {run}")
            model, tokenizer = load_model(model, dtype=dtype or default_dtype(device or "cpu"), **settings)
        elif tokenizer is None:
            raise TypeError("a model object needs its tokenizer: R3MemPipeline(model, tokenizer)")
        elif given := sorted([*settings, *(["base"] if base is not None else [])]):
            raise TypeError(f"{given[0]} is for a model that is given by name")
        if not isinstance(model, R3MemModel):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = R3MemModel(model, config)
        elif config is not None:
            raise TypeError("an R3MemModel has its config already")
        self.model, self.tokenizer = model.eval(), tokenizer

    def __repr__(self):
        model = self.model
        base = model.peft_model.get_base_model()
        memories = f", {model.layout.num_memory_tokens} memory tokens" if model.layout else ""
        folder = "" if self.folder is None else f", folder={str(self.folder)!r}"
        return (
            f"R3MemPipeline({base.name_or_path or type(base).__name__!r}, {str(model.peft_model.dtype)[6:]} on "
            f"{model.device}, {len(self.remembered)} contexts remembered{memories}{folder})"
        )

    @property
    def learned_to_expand(self) -> bool:
        """Whether the adapter has learned to give back a text from its memory, as far as is known of it."""
        return any(entry.get("expanded") for entry in self.remembered)

    def _load(self, folder, base, dtype, settings):
        manifest = read_manifest(folder)
        # What was learned to the last token in one arithmetic need not be known in another.
        dtype = dtype or DTYPES.get(manifest.get("dtype"), torch.float32)
        # These are of the adapter.
        settings = {key: value for key, value in settings.items() if key != "revision"}
        found, self.tokenizer = adapter_folder.load_base(folder, manifest, base, dtype=dtype, **settings)
        self.model = R3MemModel.from_pretrained(folder, found)
        self.remembered = manifest.get("remembered", [])
        self._is_saved_in(folder)

    def _is_saved_in(self, folder):
        self.folder = Path(folder)
        self._seen = _digest(self.folder / MANIFEST)

    def remember(
        self,
        documents: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
        *,
        folder=None,
        settings: RememberSettings | None = None,
        builder: QueryBuilder | None = None,
        entity_finder: EntityFinder | None = None,
        levels: Sequence[str] = LEVELS,
        progress=True,
    ) -> RememberReport:
        """Fine-tune documents into the adapter until greedy recall gives each of their contexts back exactly.

        documents: a text, several, or texts by name; a `Path` is a UTF-8 text file, which is read. Each is taken apart
        into a document, its paragraphs and their passages, and a query is written for each (`hierarchy.build_pairs`).
        One that is longer than the model's positions is cut into several, at chapters or paragraphs
        (`hierarchy.cut_document`). What was remembered before is recalled first and learned again along with them, so
        that it is not forgotten; a document of the same name is replaced.
        folder: where the adapter is saved at the end, and a checkpoint meanwhile: a run that was interrupted goes on
        from there when it is started again with the same arguments, to the same result. Without, nothing is written.
        settings: `RememberSettings`. builder, entity_finder, levels: see `hierarchy.build_pairs`.

        Raises ValueError for an empty text, a passage beyond the model's positions that cannot be cut, a folder with
        another run or another adapter in it, or one that was changed since it was loaded; InUseError (an OSError) if
        another process writes to the folder; IntegrityError if a pass could not be trusted. What could not be learned
        in `settings.max_steps` is no error: `report.exact` says so of each pair.
        """
        taken = {name for entry in self.remembered for name in (entry["document"], entry.get("part_of"))}
        documents = _by_name(documents, taken)
        with contextlib.nullcontext() if folder is None else locked(folder):
            if folder is not None:
                folder = Path(folder)
                self._refuse_foreign(folder)
            return self._remember(documents, folder, settings, builder, entity_finder, levels, progress)

    def _remember(self, documents, folder, settings, builder, entity_finder, levels, progress):
        earlier = [e for e in self.remembered if not {e["document"], e.get("part_of")} & documents.keys()]
        whole_of = {entry["document"]: entry["part_of"] for entry in earlier if entry.get("part_of")}
        documents, parts = self._cut(documents, taken={entry["document"] for entry in earlier})
        whole_of |= parts
        pairs = build_pairs(
            documents,
            self.tokenizer,
            builder,
            entity_finder=entity_finder,
            levels=levels,
            taken={entry["query"] for entry in earlier},
            progress=progress,
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
                "expanded": expanded,
                **({"part_of": whole_of[pair.document]} if pair.document in whole_of else {}),
            }
            for pair, exact, expanded in zip(
                report.pairs, report.exact, report.expanded or [None] * len(report.pairs), strict=True
            )
        ]
        if folder is not None:
            self.save(folder)
            checkpoint = folder / REMEMBER_CHECKPOINT
            for leftover in (checkpoint, *unfinished_files(checkpoint)):
                leftover.unlink(missing_ok=True)
        return report

    def train(
        self,
        texts: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
        *,
        folder,
        settings: TrainSettings | None = None,
        adapter_dtype=None,
        progress=True,
    ) -> TrainReport:
        """Train the adapter to write memories of texts, and to read on behind them.

        texts: a text, several, or texts by name, of any length; a `Path` is a text file. folder: where the adapter is
        saved at the end, and checkpoints meanwhile: a run that was interrupted goes on from the last when it is
        started again with the same arguments, to the same result. settings: `TrainSettings`; how segments are read,
        and what is learned from them, is the model's `R3MemConfig`. adapter_dtype: see `save`. What was remembered
        before may be forgotten.

        Raises ValueError for texts that are not longer than a segment, a folder with another run or another adapter in
        it; IntegrityError if a pass could not be trusted.
        """
        folder = Path(folder)
        texts = _by_name(texts, ())
        with locked(folder):
            self._refuse_foreign(folder, TRAIN_CHECKPOINTS)
            rows = [self._ids(text) for text in texts.values()]
            report = train(self.model, rows, settings, folder=folder, progress=progress)
            # What was known before may be known no more.
            self.remembered = [
                {**entry, "exact": False, **({"expanded": False} if entry.get("expanded") else {})}
                for entry in self.remembered
            ]
            self.save(folder, adapter_dtype=adapter_dtype)
            discard_checkpoints(folder)
        return report

    def recall(self, query: str | Sequence[str], *, max_new_tokens: int | None = None) -> str | list[str]:
        """The context that a query was remembered for, read backward, greedily; of several queries a list.

        A query that nothing was remembered for gives an empty string, as far as the adapter has learned to tell.
        max_new_tokens: at most so many; as many as the longest context that was remembered, or 256 if none is known.
        Raises ValueError for an empty query, or one longer than the model's positions.
        """
        if not self.remembered:
            warnings.warn("this adapter remembers nothing that could be recalled, as far as is known", stacklevel=2)
        rows = self._query_rows([query] if isinstance(query, str) else query)
        texts = self._decoded(self.model.recall(*self._batch(rows), max_new_tokens=self._longest(max_new_tokens)))
        return texts[0] if isinstance(query, str) else texts

    def compress(
        self,
        documents: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
        *,
        memory: Memory | str | Path | None = None,
        levels: Sequence[str] = ("document",),
        finish=False,
        progress=True,
    ) -> Memory:
        """Compress texts of any length into a memory, a row each, labelled with level and name.

        documents: a text, several, or texts by name; a `Path` is a text file. They are compressed as they stand, white
        space included (`remember` leaves out what stands around a text). memory: of what came before, or the file of
        it; it must have as many rows, and where documents and rows have names, the same ones. levels: also the
        paragraphs ("paragraph") and passages ("entity") of each document as rows of their own, named "NAME, paragraph
        1" and so on; only without a memory before. finish, progress: see `R3MemModel.compress`.

        Raises ValueError for an empty text, rows or names that do not agree, a model without memory tokens, or a
        memory of another model or tokenizer.
        """
        self.model.check_memories()
        if memory is not None:
            memory = self._memory(memory)
            if tuple(levels) != ("document",):
                raise ValueError("only documents go on from a memory: other levels are compressed at one time")
            texts = _in_order(documents, memory.labels)
            labels = memory.labels
        else:
            texts = self._by_level(_by_name(documents, ()), tuple(levels))
            texts, labels = list(texts.values()), tuple(texts)
        for text in texts:
            if not isinstance(text, str) or not text:
                raise ValueError("a text to compress is empty" if text == "" else f"no text: {type(text).__name__}")
        rows = [self._ids(text) for text in texts]
        parts = []
        for start in range(0, len(rows), _BATCH):
            before = None if memory is None else memory[start : start + _BATCH]
            ids, mask = padded(rows[start : start + _BATCH])
            parts.append(self.model.compress(ids, mask, memory=before, finish=finish, progress=progress))
        joined = Memory.cat(parts)
        origin = dataclasses.replace(joined.origin, tokenizer=self._tokenizer_fingerprint)
        return dataclasses.replace(joined, origin=origin).labelled(labels)

    def expand(
        self,
        memory: Memory | str | Path,
        query: str | Sequence[str] | None = None,
        *,
        max_new_tokens: int | None = None,
    ) -> str | list[str]:
        """The text that a memory was made of, read backward, greedily; of a memory of several rows a list.

        memory: a memory, or the file of one. query: for each row, read after the memory; None: the memory alone.
        max_new_tokens: as of `recall`. Exact for what was remembered by a model with memory tokens; of other text it
        gives what the adapter has learned to.
        Raises ValueError for another model's or tokenizer's memory, queries of another number than rows.
        """
        if not self.learned_to_expand:
            warnings.warn(
                "this adapter has not learned to give back a text from its memory, as far as is known: what comes is "
                "made up. `remember` of a model with memory tokens teaches it",
                stacklevel=2,
            )
        memory = self._memory(memory)
        queries = None
        if query is not None:
            queries = self._query_rows([query] if isinstance(query, str) else query)
            if len(queries) != len(memory):
                raise ValueError(f"{len(queries)} queries and {len(memory)} rows of memory: one of each a row")
        texts = []
        for start in range(0, len(memory), _BATCH):
            asked = () if queries is None else self._batch(queries[start : start + _BATCH])
            part = memory[start : start + _BATCH]
            texts += self._decoded(self.model.expand(part, *asked, max_new_tokens=self._longest(max_new_tokens)))
        return texts[0] if len(memory) == 1 else texts

    def generate(
        self, prompt: str | Sequence[str], *, memory: Memory | str | Path | None = None, **settings
    ) -> str | list[str]:
        """What the model writes behind a memory and a prompt, read forward; of several prompts a list.

        memory: a memory, or the file of one, of as many rows as prompts; one of one row serves all of them.
        settings: as of `transformers`' `generate`: `do_sample`, `temperature`, `num_beams`, `streamer` and others;
        64 new tokens if no length is among them, and no generation_config.
        Raises ValueError for an empty prompt, another model's or tokenizer's memory, or more tokens than positions.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        rows = [self._ids(text) for text in prompts]
        if not rows or not all(rows):
            raise ValueError("the prompt is empty")
        if memory is not None:
            memory = self._memory(memory)
            memory = memory.rows([0] * len(rows)) if len(memory) == 1 else memory
        ids, mask = self._batch(rows)
        if not settings.keys() & {"max_new_tokens", "max_length", "generation_config"}:
            settings["max_new_tokens"] = _NEW_TOKENS
        found = self.model.generate(ids, mask, memory=memory, **settings)
        found = found if isinstance(found, torch.Tensor) else found.sequences
        texts = self.tokenizer.batch_decode(
            found[:, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return texts[0] if isinstance(prompt, str) and len(texts) == 1 else texts

    def save(self, folder, *, adapter_dtype=None):
        """Save the adapter, and what was remembered (queries and digests, no contexts), into a folder.

        adapter_dtype: that its weights are rounded to in the files; torch.bfloat16 makes them half as large.
        """
        with locked(folder):
            self._refuse_changed(Path(folder))
            self.model.save_pretrained(folder, adapter_dtype=adapter_dtype, **self._details())
            self._is_saved_in(folder)

    def push_to_hub(self, repo_id: str, *, adapter_dtype=None, **settings) -> str:
        """Send what `save` would write to the Hugging Face hub; see `R3MemModel.push_to_hub`.

        Queries are among it, contexts are not. `R3MemPipeline(repo_id)` loads it.
        """
        return self.model.push_to_hub(repo_id, adapter_dtype=adapter_dtype, details=self._details(), **settings)

    def _details(self):
        dtype = str(self.model.peft_model.dtype).removeprefix("torch.")
        return {"dtype": dtype, "remembered": self.remembered}

    def _cut(self, documents, taken):
        """Documents, of which those beyond the model's positions are cut into several; and of each part its whole."""
        model = self.model
        if model.max_tokens is None:
            return documents, {}
        before = 0 if model.layout is None else model.layout.first_position
        most = max(1, int((model.max_tokens - before) / MAX_QUERY_OF_CONTEXT) - 16)
        cut, whole_of = {}, {}
        for name, text in documents.items():
            # A token has a byte at least: most texts need not be counted.
            short = not isinstance(text, str) or len(text.encode("utf-8", "surrogatepass")) <= most
            parts = {name: text} if short else cut_document(text, name, lambda piece: len(self._ids(piece)), most)
            if len(parts) > 1:
                if doubled := parts.keys() & (cut.keys() | documents.keys() | taken):
                    raise ValueError(f"two documents would be called {min(doubled)!r}; give one of them another name")
                whole_of |= dict.fromkeys(parts, name)
            cut |= parts
        return cut, whole_of

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

    def _refuse_foreign(self, folder, checkpoint=REMEMBER_CHECKPOINT):
        """Raise ValueError for a folder with an adapter that is not the one that this pipeline has, as it is there."""
        if not (folder / MANIFEST).is_file() or self._refuse_changed(folder):
            return
        if not (folder / checkpoint).exists():
            # With a checkpoint beside it: of the very run that made it, or refused where that is read.
            raise ValueError(
                f"{folder} holds an adapter already; choose another folder, or go on from it with "
                f"R3MemPipeline({str(folder)!r})"
            )

    def _refuse_changed(self, folder):
        """Whether a folder is this pipeline's own. Raises ValueError if it is, and is not as it was last seen."""
        own = self.folder is not None and self.folder.resolve() == folder.resolve()
        if own and (folder / MANIFEST).is_file() and _digest(folder / MANIFEST) != self._seen:
            raise ValueError(
                f"{folder} was changed after this pipeline loaded it (by another process?), which would be lost; "
                f"load it again: R3MemPipeline({str(folder)!r})"
            )
        return own

    def _memory(self, memory):
        """A memory, or the file of one. Raises ValueError if it is another model's or tokenizer's."""
        if not isinstance(memory, Memory):
            memory = Memory.load(memory, device=self.model.device)
        self.model.check_memory(memory)
        if memory.origin.tokenizer not in (None, self._tokenizer_fingerprint):
            raise ValueError("the memory was made with another tokenizer than the model's")
        return memory

    @functools.cached_property
    def _tokenizer_fingerprint(self):
        return fingerprints.tokenizer_fingerprint(self.tokenizer)

    def _by_level(self, documents, levels):
        """Texts by `(level, name)`."""
        if not levels or set(levels) - set(LEVELS):
            raise ValueError(f"levels must be some of {LEVELS}, got {levels!r}")
        texts = {}
        for name, text in documents.items():
            if "document" in levels:
                texts["document", name] = text
            if set(levels) - {"document"}:
                contexts = contexts_of(split_document(text, name, lambda piece: len(self._ids(piece))))
                for level, kind in (("paragraph", "paragraph"), ("entity", "passage")):
                    for number, (context, _) in enumerate(contexts[level] if level in levels else (), 1):
                        texts[level, f"{name}, {kind} {number}"] = context
        if not texts:
            raise ValueError(f"the documents have no {' or '.join(levels)} that is not the whole of one")
        return texts

    def _query_rows(self, queries):
        rows = [self._ids(re.sub(r"\s+", " ", text).strip()) for text in queries]
        if not rows or not all(rows):
            raise ValueError("the query is empty")
        return rows

    def _longest(self, max_new_tokens):
        if max_new_tokens is None:
            return max((entry["tokens"] for entry in self.remembered), default=256) + 1
        return max_new_tokens

    def _batch(self, rows):
        return tuple(tensor.to(self.model.device) for tensor in padded(rows))

    def _decoded(self, rows):
        return [self.tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in rows]

    def _ids(self, text):
        # Not verbose: a history may be longer than the model's positions.
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _by_name(documents, taken):
    """Documents by name; those without one get that of their file, or numbers that are not taken.

    Raises ValueError if there are none, or if one is the name of a file, given as if it were a text.
    """
    if isinstance(documents, (str, Path)):
        documents = [documents]
    if not isinstance(documents, Mapping):
        numbers = (n for n in itertools.count(1) if f"document {n}" not in taken)
        documents = list(documents)
        names = [str(text) if isinstance(text, Path) else f"document {next(numbers)}" for text in documents]
        if len(set(names)) < len(names):
            raise ValueError("a file is named twice")
        documents = dict(zip(names, documents, strict=True))
    if not documents:
        raise ValueError("there is no document")
    if wrong := [name for name in documents if not isinstance(name, str)]:
        raise TypeError(f"a document's name must be a string, got {wrong[0]!r}")
    return {name: _text_of(text) for name, text in documents.items()}


def _text_of(text):
    """A text, or what a file holds. Raises ValueError for a name of a file that is given as a text."""
    if isinstance(text, Path):
        return read_text(text)
    # `os.path`, which is False for a string that cannot be a path, where `Path.is_file` raises.
    if isinstance(text, str) and "\n" not in text and os.path.splitext(text)[1] and os.path.isfile(text):
        raise ValueError(
            f"{text!r} is a file here: pass Path({text!r}) for what it holds. (To take the words themselves as the "
            "text, put a line break behind them.)"
        )
    return text


def _in_order(documents, labels):
    """The texts of documents, one for each row of a memory. Raises ValueError if they do not agree."""
    if isinstance(documents, Mapping):
        names = [None if label is None else label[1] for label in labels]
        if sorted(documents, key=str) != sorted(names, key=str):
            raise ValueError(f"the documents are {sorted(documents, key=str)}, the memory's rows {names}")
        return [_text_of(documents[name]) for name in names]
    texts = [documents] if isinstance(documents, (str, Path)) else list(documents)
    texts = [_text_of(text) for text in texts]
    if len(texts) != len(labels):
        raise ValueError(f"{len(texts)} documents and {len(labels)} rows of memory: one of each a row")
    return texts


def _digest(path):
    return hashlib.sha256(path.read_bytes()).digest()


def _sha256(text):
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
