"""`DocumentStore`: answers questions about documents, whose memories are made once and kept."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import R3MemConfig
from ..documents import Documents, by_name, cut_to_length
from ..files import check_writable, replacing
from ..memory.layout import MemoryLayout
from ..memory.memory import Memory
from ..pipeline import R3MemPipeline
from ..settings import check_value
from .answering import written
from .beside import pinned_memory, side_by_side, with_layout
from .lookup import WordIndex
from .opening import DEFAULT_MODEL, allocation_for, lock_of, pipeline_of, queries_for

_SUFFIX = ".safetensors"
# Memories that stay on the model's device, and questions that are answered at one time.
_CACHED, _BATCH = 256, 8


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer, and what it was given behind.

    Attributes:
        text: The answer.
        sources: Names of the documents, or of their parts, whose memories or words stood before the question, in the
            order of the documents.
        passages: Those among them that stood there word for word.
    """

    text: str
    sources: tuple[str, ...]
    passages: tuple[str, ...]


class DocumentStore:
    """Answers questions about documents, behind memories that are made once of each and kept in a folder.

    >>> store = DocumentStore("library")
    >>> store.answer("Who opened the bridge?", {"history": history, "menu": menu}).text

    A document that is longer than `part_tokens` is cut at chapters or paragraphs. Of each part a matched memory of a
    slot for every `ratio` tokens is made, and kept under the digest of its words, the model and the sizes: the same
    text is read once, whatever its name. Before a question stand the memories of all parts, side by side, if they fit
    into `slots`, else of those that fit the question best by its words (BM25). Several processes may use a folder.

    Args:
        folder: The folder, made if it is not there. What is in it can be made again, and may be deleted at any time.
        model: What `R3MemPipeline` takes by name, or an `R3MemPipeline`, whose memories must be matched ones of its
            base model, or of an adapter of anchors; loaded when it is needed.
        ratio: Tokens of a slot.
        part_tokens: Tokens of a part at most.
        slots: Slots before a question at most.
        allocation: See `R3MemConfig.memory_allocation`; None: "adaptive", where the model can read such memories.
            `slots` and `ratio` are of a head on average.
        settings: More arguments of `R3MemPipeline` (`device`, `dtype`, ...).

    Raises:
        OSError: The folder cannot be made or written to.
        TypeError: The arguments do not go together.
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        model: str | Path | R3MemPipeline = DEFAULT_MODEL,
        *,
        ratio: int = 4,
        part_tokens: int = 256,
        slots: int = 512,
        allocation: str | None = None,
        **settings: Any,
    ):
        for name, value in (("ratio", ratio), ("part_tokens", part_tokens), ("slots", slots)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if math.ceil(part_tokens / ratio) > slots:
            raise ValueError(f"a part of {part_tokens} tokens at 1/{ratio} does not fit into {slots} slots")
        if allocation is not None:
            check_value(R3MemConfig, "memory_allocation", allocation)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        check_writable(self.folder)
        self._given, self._settings = model, settings
        self.ratio, self.part_tokens, self.slots, self.allocation = ratio, part_tokens, slots, allocation
        self._pipeline: R3MemPipeline | None = None
        self._begun: Memory | None = None
        self._memories: dict[str, Memory] = {}
        self._lock = lock_of(model)

    @property
    def pipeline(self) -> R3MemPipeline:
        """The pipeline, which the first use loads. Raises as `R3MemPipeline`, and ValueError for other memories."""
        with self._lock:
            if self._pipeline is None:
                found = pipeline_of(self._given, None, self._settings)
                if found.model.empty_memory().carried is not None:
                    raise ValueError(
                        "a model with recurrent layers carries one state of all that it has read, so memories of its "
                        "texts cannot stand side by side; compress them as one text: R3MemPipeline.compress"
                    )
                self._pipeline = found
            return self._pipeline

    def memory(self, text: str) -> Memory:
        """The memory of a text, read from the folder or made now; one row.

        Args:
            text: A text of any length; it is read as one part.

        Raises:
            ValueError: The text is empty.
        """
        if not text.strip():
            raise ValueError("a text is empty")
        with self._lock:
            ids = self.pipeline.codec.said(text)
            layout = self._layout(len(ids))
            name = self._name(text, layout)
            memory = self._memories.pop(name, None) or self._read(name) or self._made(name, ids, layout)
            self._memories[name] = memory
            while len(self._memories) > _CACHED:
                del self._memories[next(iter(self._memories))]
            return memory

    def answer(
        self,
        question: str | Sequence[str],
        documents: Documents,
        *,
        passages: int = 0,
        **settings: Any,
    ) -> Any:
        """Answer a question, or a batch of them, about documents.

        Args:
            question: A question, or several.
            documents: A text, several, or texts by name; a `Path` is a UTF-8 text file.
            passages: Parts, those that fit the question best, that stand before it word for word in place of their
                memories; beside `slots`.
            settings: Arguments of `transformers`' `generate`; 128 new tokens if no length is among them.

        Returns:
            An `Answer`, or a list of them.

        Raises:
            OSError: A file cannot be read.
            ValueError: A question or a document is empty, or there are more tokens than positions.
        """
        questions = [question] if isinstance(question, str) else list(question)
        if not questions or not all(isinstance(text, str) and text.strip() for text in questions):
            raise ValueError("a question is empty")
        if passages < 0:
            raise ValueError(f"passages must be 0 or more, got {passages}")
        texts = by_name(documents)
        if empty := [name for name, text in texts.items() if not text.strip()]:
            raise ValueError(f"the document {empty[0]!r} is empty")
        with self._lock:
            codec = self.pipeline.codec
            parts, _ = cut_to_length(texts, lambda text: len(codec.said(text)), self.part_tokens, (), anywhere=True)
            index = WordIndex(list(parts.values()))
            needed = {name: self._layout(len(self.pipeline.codec.said(text))).budget for name, text in parts.items()}
            answers: list[Answer] = []
            for start in range(0, len(questions), _BATCH):
                answers += self._answered(questions[start : start + _BATCH], parts, index, needed, passages, settings)
        return answers[0] if isinstance(question, str) else answers

    def _answered(self, questions, parts, index, needed, passages, settings):
        """Answer questions in one batch, each behind the parts that fit it best.

        parts, needed: texts of the parts, and slots of their memories, by name.
        """
        codec, names = self.pipeline.codec, list(parts)
        _, after = self._turn
        memories, rows, chosen = [], [], []
        for text in questions:
            order = [names[place] for place in index.ranked(text)]
            raw, left, kept = order[:passages], self.slots, []
            for name in order[passages:]:
                if needed[name] <= left:
                    left -= needed[name]
                    kept.append(name)
            found = [self.memory(parts[name]) for name in names if name in kept]
            memories.append(side_by_side(found) if found else self._beginning())
            said = "\n\n".join([*(parts[name] for name in names if name in raw), text])
            rows.append(codec.said(f"\n\n{said}" if kept else said) + after)
            sources = tuple(name for name in names if name in raw or name in kept)
            chosen.append((sources, tuple(name for name in sources if name in raw)))
        texts = written(self.pipeline, rows, rows_of_one(memories), settings)
        return [Answer(text, *of) for text, of in zip(texts, chosen, strict=True)]

    @functools.cached_property
    def _turn(self) -> tuple[list[int], list[int]]:
        """Token ids before a document, and behind a question up to the answer.

        They stay what they were when the folder was made: a template that tells today's date has others tomorrow.
        """
        codec = self.pipeline.codec
        template = getattr(codec.tokenizer, "chat_template", None)
        if template is None:
            return codec.opening, codec.ids("\n")
        digest = hashlib.sha256(json.dumps([template, codec.fingerprint]).encode()).hexdigest()
        path = self.folder / f"turn-{digest[:16]}.json"
        try:
            before, after = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # there is none, or it is damaged
            before, after = codec.turn
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as unfinished:
                unfinished.write_text(json.dumps([before, after]), encoding="utf-8")
        return before, after

    def _beginning(self):
        """The memory of what stands before a document: the chat template's tokens, or what begins a text; pinned."""
        if self._begun is None:
            self._begun = pinned_memory(self.pipeline.model, self._turn[0])
        return self._begun

    def _layout(self, tokens: int) -> MemoryLayout:
        """Sizes of the memory of a text: segments of one length, and a slot for so many tokens."""
        segments = math.ceil(tokens / self.part_tokens)
        length = math.ceil(tokens / segments)
        slots = math.ceil(length / self.ratio)
        config = dataclasses.replace(
            _CONFIG, num_memory_tokens=slots, segment_length=length, memory_budget=slots * segments,
            memory_allocation=self.allocation or allocation_for(self.pipeline.model),
            memory_queries=queries_for(self.pipeline.model),
        )  # fmt: skip
        layout = config.memory_layout(self.pipeline.model.max_tokens)
        assert layout is not None, "there are memory tokens"
        return layout

    def _name(self, text, layout):
        """Name of a memory's file: a digest of all that it depends on."""
        model, codec = self.pipeline.model, self.pipeline.codec
        made_with = [model.base_fingerprint(), str(model.dtype), codec.fingerprint, self._turn[0], layout.to_dict()]
        made_with += [model.origin().adapter] if model.is_anchored else []
        described = [*made_with, text]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest() + _SUFFIX

    def _read(self, name):
        """A memory that was kept; None if there is none."""
        path = self.folder / name
        try:
            return Memory.load(path, self.pipeline.model, device=self.pipeline.model.device)
        except (FileNotFoundError, ValueError):  # a damaged one is made again: the text is at hand
            return None

    def _made(self, name, ids, layout):
        memory = self.pipeline.model.compress(
            torch.tensor([ids]), memory=with_layout(self._beginning(), layout), finish=True
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        memory.save(self.folder / name)
        return memory


_CONFIG = R3MemConfig(
    memory_writer="matched", adapter_rows="memory", num_memory_tokens=64, memory_budget=256, beyond_budget="error"
)


def rows_of_one(memories: Sequence[Memory]) -> Memory:
    """Memories of one row each as the rows of one, in a layout that has room for the largest.

    Where heads of one have other numbers of slots, it is one in which they may; in others of them all have as many.
    """
    layout = max(memories, key=lambda memory: memory.layout.budget).layout
    if any(memory.layout.is_adaptive for memory in memories):
        layout = dataclasses.replace(layout, allocation="adaptive")
    return Memory.cat([with_layout(memory, layout) for memory in memories])
