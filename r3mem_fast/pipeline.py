"""`R3MemPipeline`: text in, text out. Remember documents in an adapter, recall them; compress histories, read them."""

import contextlib
import dataclasses
import threading
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from . import remembered
from .adapter_folder import OwnFolder
from .codec import TextCodec
from .config import R3MemConfig
from .documents import Documents, by_name, in_order, texts_and_labels
from .files import locked
from .hierarchy import LEVELS, EntityFinder, QueryBuilder
from .loading import load
from .manifest import REMEMBER_CHECKPOINT, TRAIN_CHECKPOINTS
from .memory.memory import Memory
from .model import R3MemModel
from .questions import AskingTexts, SegmentQuestions
from .remembering import remember_documents
from .training.collate import padded
from .training.history import TrainReport, discard_checkpoints, train
from .training.refine import RefineReport, refine
from .training.remember import RememberReport, discard_checkpoint
from .training.settings import RefineSettings, RememberSettings, TrainSettings

_BATCH, _NEW_TOKENS = 16, 64  # rows at one time; tokens where no length is asked for


class R3MemPipeline:
    """A memory network over a model and its tokenizer.

    >>> pipeline = R3MemPipeline("smollm2-135m")
    >>> report = pipeline.remember(page)
    >>> pipeline.recall(report.pairs[0].query) == report.pairs[0].context

    It also makes memories, with no training, and with memory tokens (`config=R3MemConfig(num_memory_tokens=16)`) some
    that can be expanded:

    >>> pipeline.generate("Who owns Pemberley?", memory=pipeline.compress(book, chat=True))
    >>> pipeline.expand(pipeline.compress(page)) == page  # of a page that was remembered

    Args:
        model: `"smollm2-135m"`, a hub id (of a model or of an adapter), the folder of a model, the folder of an
            adapter that `save` wrote, `"smollm2-135m-anchors"` (an adapter that comes with this package), an
            `R3MemModel`, or a `transformers` causal language model, which is changed in place; the last two with their
            tokenizer.
        tokenizer: Tokenizer of a model that is not given by name.
        base: Base model of an adapter, as `load_model` takes it, if it lies elsewhere now; its fingerprint must fit.
        config: Settings, for a model without adapters.
        device: Device of a model that is loaded here; None: the CPU, or what `device_map` says.
        dtype: Dtype of such a model; None: that which an adapter was trained in, and for a new one bfloat16 where the
            device computes in it natively, else float32.
        attn_implementation: Attention of such a model, see `load_model`.
        seed: Seed of new adapters, which start the same every time.
        settings: Other keywords of `load_model` (`revision`, `device_map`, `token`, ...).

    Raises:
        OSError: A model or folder is not there.
        ValueError: One is damaged or foreign, or a dtype or a device is none.
        TypeError: The arguments do not go together.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None,
        *, base: str | Path | R3MemModel | None = None, config: R3MemConfig | None = None,
        device: str | torch.device | None = None, dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None, seed: int = 0, **settings,
    ):  # fmt: skip
        loaded = load(
            model, tokenizer, base=base, config=config, device=device, dtype=dtype,
            attn_implementation=attn_implementation, seed=seed, **settings,
        )  # fmt: skip
        self.model, self.tokenizer, self.remembered = loaded.model.eval(), loaded.tokenizer, loaded.remembered
        self._own, self.lock = OwnFolder(), threading.RLock()  # stores hold the lock while the model reads
        if loaded.folder is not None:
            self._own.seen(loaded.folder)
        self.codec = TextCodec(loaded.tokenizer)
        self.model.questions_of = self.model.questions_of or SegmentQuestions(self.codec)

    def __repr__(self):
        model, base = self.model, self.model.peft_model.get_base_model()
        memories = f", {model.reader.layout.num_memory_tokens} memory tokens" if model.learns_memories else ""
        folder = "" if self.folder is None else f", folder={str(self.folder)!r}"
        return (
            f"R3MemPipeline({base.name_or_path or type(base).__name__!r}, {str(model.peft_model.dtype)[6:]} on "
            f"{model.device}, {len(self.remembered)} contexts remembered{memories}{folder})"
        )

    @property
    def folder(self) -> Path | None:
        """Where it was loaded from or saved to last; None: nowhere."""
        return self._own.path

    @property
    def learned_to_expand(self) -> bool:
        """Whether the adapter has learned to give back a text from its memory, as far as is known of it."""
        return any(entry.get("expanded") for entry in self.remembered)

    def remember(
        self, documents: Documents,
        *, folder: str | Path | None = None, settings: RememberSettings | None = None,
        builder: QueryBuilder | None = None, entity_finder: EntityFinder | None = None,
        levels: Sequence[str] = LEVELS, taken: Collection[str] = (), progress: bool = True,
    ) -> RememberReport:  # fmt: skip
        """Fine-tune documents into the adapter until greedy recall gives each of their contexts back exactly.

        Each document is taken apart into itself, its paragraphs and their passages, and a query is written for each
        (`hierarchy.build_pairs`). One that is longer than the model's positions is cut into several, at chapters or
        paragraphs (`hierarchy.cut_document`). What was remembered before is recalled first and learned again along
        with them, so that it is not forgotten; a document of the same name is replaced.

        What was not learned in `settings.max_steps` is no error: `report.exact` says so of each pair.

        Args:
            documents: A text, several, or texts by name; a `Path` is a UTF-8 text file, which is read.
            folder: Where the adapter is saved at the end, and a checkpoint meanwhile: a run that was interrupted goes
                on from there when it is started again with the same arguments, to the same result. None: nothing is
                written.
            settings: How pairs are learned; None: the defaults.
            builder: Writes the queries, see `hierarchy.build_pairs`.
            entity_finder: Finds entities, see there.
            levels: Levels of which contexts are remembered, see there.
            taken: Queries that ask for something else already, see there; those that were remembered before are.
            progress: Show bars.

        Raises:
            InUseError: Another process writes to the folder (an OSError).
            IntegrityError: A pass could not be trusted.
            ValueError: A text is empty, a passage beyond the model's positions cannot be cut, or the folder holds
                another run or another adapter, or was changed since it was loaded.
        """
        named = ((entry["document"], entry.get("part_of")) for entry in self.remembered)
        documents = by_name(documents, {name for names in named for name in names if name is not None})
        with contextlib.nullcontext() if folder is None else locked(folder):
            if folder is not None:
                folder = Path(folder)
                self._own.refuse_foreign(folder, REMEMBER_CHECKPOINT)
            report, self.remembered = remember_documents(
                self.model, self.codec, documents, self.remembered, lambda queries: list(self.recall(queries)),
                folder=folder, settings=settings, progress=progress, builder=builder, entity_finder=entity_finder,
                levels=levels, taken=taken,
            )  # fmt: skip
            if folder is not None:
                self.save(folder)
                discard_checkpoint(folder)
        return report

    def train(
        self, texts: Documents, *, folder: str | Path, settings: TrainSettings | None = None,
        adapter_dtype: torch.dtype | None = None, progress: bool = True,
    ) -> TrainReport:  # fmt: skip
        """Train the adapter to write memories of texts, and to read on behind them.

        How segments are read, and what is learned from them, is the model's `R3MemConfig`. What was remembered before
        may be forgotten.

        Args:
            texts: A text, several, or texts by name, of any length; a `Path` is a UTF-8 text file.
            folder: Where the adapter is saved at the end, and checkpoints meanwhile: a run that was interrupted goes
                on from the last when it is started again with the same arguments, to the same result.
            settings: How it is trained; None: the defaults.
            adapter_dtype: See `save`.
            progress: Show a bar.

        Raises:
            IntegrityError: A pass could not be trusted.
            ValueError: No text is longer than a segment, or the folder holds another run or another adapter.
        """
        folder = Path(folder)
        texts = by_name(texts)
        with locked(folder):
            self._own.refuse_foreign(folder, TRAIN_CHECKPOINTS)
            rows = [self.codec.ids(text) for text in texts.values()]
            report = train(self.model, rows, settings, folder=folder, progress=progress)
            # What was known before may be known no more.
            self.remembered = remembered.as_not_exact(self.remembered)
            self.save(folder, adapter_dtype=adapter_dtype)
            discard_checkpoints(folder)
        return report

    def recall(self, query: str | Sequence[str], *, max_new_tokens: int | None = None) -> str | list[str]:
        """The context that a query was remembered for, read backward, greedily.

        Args:
            query: A query, or several.
            max_new_tokens: Tokens of a context at most; None: as many as the longest that was remembered has, 256 if
                none is known.

        Returns:
            The context, a list of them for several queries. A query that nothing was remembered for gives an empty
            string, as far as the adapter has learned to tell.

        Raises:
            ValueError: A query is empty, or longer than the model's positions.
        """
        if not self.remembered:
            warnings.warn("this adapter remembers nothing that could be recalled, as far as is known", stacklevel=2)
        rows = self.codec.queries(query)
        texts = self.codec.texts(self.model.recall(*self._batch(rows), max_new_tokens=self._longest(max_new_tokens)))
        return texts[0] if isinstance(query, str) else texts

    def compress(
        self,
        documents: Documents | None,
        *, memory: Memory | str | Path | None = None, levels: Sequence[str] = ("document",), finish: bool = False,
        chat: bool = False, memory_tokens: int | None = None, memory_budget: int | None = None, progress: bool = True,
    ) -> Memory:  # fmt: skip
        """Compress texts of any length into a memory, a row each, labelled with level and name.

        Texts are compressed as they stand, white space included (`remember` leaves out what stands around a text).

        Args:
            documents: A text, several, or texts by name; a `Path` is a UTF-8 text file. None: nothing new; to end (by
                `finish`) what a memory waits for.
            memory: The memory of what came before, or its file. It must have as many rows and, where documents and
                rows have names, the same ones.
            levels: Levels that are compressed, a row each: "document", and the paragraphs ("paragraph") and passages
                ("entity") of each document, named "NAME, paragraph 1" and so on; these only without a memory before.
            finish: See `R3MemModel.compress`.
            chat: Whether a text stands in a user's turn: what the chat template puts before it is kept as it is, and
                `generate` asks its prompt in the same turn. For matched memories; a memory before says it itself.
            memory_tokens: Slots of a segment, for matched and anchored memories; None: the model's.
            memory_budget: Slots of a row's memory; None: for as many segments as the model's has.
            progress: Show a bar.

        Raises:
            ValueError: A text is empty, rows or names do not agree, the memory is another model's, or there is no chat
                template.
        """
        self.model.check_memories()
        memory = None if memory is None else self._memory(memory)
        sizes: dict[str, Any] = {"memory_tokens": memory_tokens, "memory_budget": memory_budget}
        if documents is None:
            if chat or tuple(levels) != ("document",):
                raise ValueError("chat and levels say how texts are read: leave them out where there are none")
            return self.model.compress(None, memory=memory, finish=finish, progress=progress, **sizes)
        known, before = (None, None) if memory is None else (memory.labels, memory.pinned_slots().tolist())
        texts, labels = texts_and_labels(documents, tuple(levels), self.codec.count, known)
        begins = memory is None and self.model.reader.layout.most_pinned > 0  # room for what begins a text
        rows, pinned = self.codec.histories(texts, chat=chat, begins=begins, behind=before)
        parts = []
        for start in range(0, len(rows), _BATCH):
            some = None if memory is None else memory[start : start + _BATCH]
            ids, mask = padded(rows[start : start + _BATCH])
            parts.append(
                self.model.compress(ids, mask, some, finish=finish, pinned=pinned, progress=progress, **sizes)
            )
        joined = Memory.cat(parts)
        origin = dataclasses.replace(joined.origin, tokenizer=self.codec.fingerprint)
        return dataclasses.replace(joined, origin=origin).labelled(labels)

    def refine(
        self, memory: Memory | str | Path, documents: Documents, settings: RefineSettings | None = None,
        *, checkpoint: str | Path | None = None, progress: bool = True,
    ) -> RefineReport:  # fmt: skip
        """Tune the values of memories to their own texts: `report.memory` answers more as the texts themselves do.

        Args:
            memory: A matched or anchored memory, or its file.
            documents: The texts that it was made of, one for each row; of texts that came in pieces the whole.
            settings: How it is tuned, in steps of seconds; None: the defaults.
            checkpoint: A file in which the state is kept, from which an interrupted run goes on; delete it at the end.
            progress: Show a bar.

        Raises:
            ValueError: The memory is another model's, cannot be refined, or was made of other texts.
        """
        memory = self._memory(memory)
        texts = in_order(documents, memory.labels)
        rows = self.codec.read_again(texts, memory.pinned_slots().tolist())
        path, asked_of = None if checkpoint is None else Path(checkpoint), AskingTexts(self.codec)
        return refine(self.model, memory, rows, asked_of, settings, checkpoint=path, progress=progress)

    def expand(
        self,
        memory: Memory | str | Path,
        query: str | Sequence[str] | None = None,
        *,
        max_new_tokens: int | None = None,
    ) -> str | list[str]:
        """The text that a memory was made of, read backward, greedily: exact for what was remembered with memories.

        Args:
            memory: A memory, or the file of one.
            query: Read after the memory, one for each row; None: the memory alone.
            max_new_tokens: See `recall`.

        Returns:
            The text, a list of them for a memory of several rows.

        Raises:
            ValueError: The memory is another model's, or there are not as many queries as rows.
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
            queries = self.codec.queries(query)
            if len(queries) != len(memory):
                raise ValueError(f"{len(queries)} queries and {len(memory)} rows of memory: one of each a row")
        texts = []
        for start in range(0, len(memory), _BATCH):
            asked = () if queries is None else self._batch(queries[start : start + _BATCH])
            part = memory[start : start + _BATCH]
            texts += self.codec.texts(self.model.expand(part, *asked, max_new_tokens=self._longest(max_new_tokens)))
        return texts[0] if len(memory) == 1 else texts

    def generate(
        self, prompt: str | Sequence[str],
        *, memory: Memory | str | Path | None = None, chat: bool | None = None, **settings,
    ) -> str | list[str]:  # fmt: skip
        """What the model writes behind a memory and a prompt, read forward.

        Args:
            prompt: A prompt, or several.
            memory: A memory, or the file of one, of as many rows as prompts; one of one row serves all of them.
            chat: Whether the prompt stands in a user's turn, which an answer follows; None: if the memory's text does.
            settings: Arguments of `transformers`' `generate`: `do_sample`, `num_beams`, `streamer` and others; 64 new
                tokens if no length is among them, and no generation_config.

        Returns:
            The text, without the prompt; a list of them for several prompts.

        Raises:
            ValueError: A prompt is empty, the memory is another model's, or there are more tokens than positions.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if memory is not None:
            memory = self._memory(memory)
            memory = memory.rows([0] * len(prompts)) if len(memory) == 1 else memory
        pinned = None if memory is None else memory.pinned_slots().tolist()
        rows = self.codec.prompts(prompts, chat=chat, pinned=pinned)
        ids, mask = self._batch(rows)
        if not settings.keys() & {"max_new_tokens", "max_length", "generation_config"}:
            settings["max_new_tokens"] = _NEW_TOKENS
        output = self.model.generate(ids, mask, memory=memory, **settings)
        found = output if isinstance(output, torch.Tensor) else output.sequences
        texts = self.codec.continuations(found[:, ids.shape[1] :])
        return texts[0] if isinstance(prompt, str) and len(texts) == 1 else texts

    def save(self, folder: str | Path, *, adapter_dtype: torch.dtype | None = None):
        """Save the adapter, and what was remembered (queries and digests, no contexts), into a folder.

        Args:
            folder: Where; made if need be.
            adapter_dtype: What its weights are rounded to in the files; torch.bfloat16 makes them half as large. None:
                as they are.

        Raises:
            InUseError: Another process writes to the folder (an OSError).
            ValueError: The folder was changed since it was loaded.
        """
        with locked(folder):
            self._own.refuse_changed(Path(folder))
            self.model.save_pretrained(folder, adapter_dtype=adapter_dtype, **self._details())
            self._own.seen(folder)

    def push_to_hub(self, repo_id: str, *, adapter_dtype: torch.dtype | None = None, **settings) -> str:
        """Send what `save` would write to the Hugging Face hub; see `R3MemModel.push_to_hub`.

        Queries are among it, contexts are not. `R3MemPipeline(repo_id)` loads it.

        Args:
            repo_id: `USER/NAME`, made if need be.
            adapter_dtype: See `save`.
            settings: More of what `R3MemModel.push_to_hub` takes.
        """
        return self.model.push_to_hub(repo_id, adapter_dtype=adapter_dtype, details=self._details(), **settings)

    def _details(self):
        dtype = str(self.model.peft_model.dtype).removeprefix("torch.")
        return {"dtype": dtype, "remembered": self.remembered}

    def _memory(self, memory: Memory | str | Path) -> Memory:
        """A memory, or the file of one. Raises ValueError if it is another model's or tokenizer's."""
        if not isinstance(memory, Memory):
            memory = Memory.load(memory, device=self.model.device)
        self.model.check_memory(memory)
        if memory.origin.tokenizer not in (None, self.codec.fingerprint):
            raise ValueError("the memory was made with another tokenizer than the model's")
        return memory

    def _longest(self, max_new_tokens):
        if max_new_tokens is None:
            return max((entry["tokens"] for entry in self.remembered), default=256) + 1
        return max_new_tokens

    def _batch(self, rows):
        return tuple(tensor.to(self.model.device) for tensor in padded(rows))
