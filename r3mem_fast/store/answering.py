"""`Answering`: writes behind memories, at once or piece by piece."""

import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, TextIteratorStreamer

from ..batching import Rows
from ..memory.memory import Memory
from ..pipeline import R3MemPipeline
from ..training.collate import padded
from .adapters import UserAdapters
from .database import Database
from .items import Item
from .memories import Histories, History
from .turns import TurnCodec

_NEW_TOKENS = 128
_LENGTHS = {"max_new_tokens", "max_length", "generation_config"}


class Answering:
    """A pipeline with the codec of conversations and users' histories.

    Args:
        pipeline: The pipeline.
        turns: Codec of conversations.
        histories: Users' histories.
    """

    def __init__(self, pipeline: R3MemPipeline, turns: TurnCodec, histories: Histories):
        self.pipeline, self.turns, self.histories = pipeline, turns, histories
        self._adapters: UserAdapters | None = None

    def adapters(self, database: Database, folder: Path) -> UserAdapters:
        """Adapters of the users, made on first use."""
        if self._adapters is None:
            self._adapters = UserAdapters(self.pipeline, database, folder)
        return self._adapters

    def row(
        self, history: History, said: Sequence[tuple[str, str]], items: Sequence[Item], settings: dict[str, Any]
    ) -> list[int]:
        """Token ids of messages behind a history, up to the reply.

        Args:
            history: The history.
            said: Role and text of each message; the last one is the user's.
            items: What is to stand before the last one, word for word, the best first: as much of it as fits.
            settings: Arguments of `transformers`' `generate`, which say how long the reply may become.

        Raises:
            ValueError: The messages alone do not fit.
        """
        *before, (role, text) = said
        chosen: list[Item] = []
        room, found = self._room(history, settings), self._behind(history, said)
        if len(found) > room and len(history.tail) >= room:
            raise ValueError(
                f"{len(history.tail)} tokens, the newest, are read as they are, and the model has positions for "
                f"{max(0, room)} beside memory and reply: rebuild the store with fewer raw_tokens (rebuild(), r3mem "
                "store rebuild --raw-tokens), or ask for a shorter reply (max_new_tokens)"
            )
        if len(found) > room:
            raise ValueError(
                f"the messages, with {len(history.tail)} tokens that are read as they are before them, take "
                f"{len(found)} tokens, and the model has positions for {room} beside memory and reply: say less, or "
                "ask for a shorter reply (max_new_tokens)"
            )
        for item in items:
            longer = self._behind(history, [*before, (role, with_passages(text, [*chosen, item]))])
            if len(longer) <= room:
                chosen, found = [*chosen, item], longer
        return found

    def _behind(self, history, said):
        return history.tail + self.turns.reply(said, history.last_role)

    def _room(self, history, settings):
        """Tokens that fit before the reply; where only `generate` knows how long that may be, before a token of it."""
        model, config = self.pipeline.model, settings.get("generation_config")
        before, memory = 0, history.memory
        if memory is not None:  # with the tokens that it carries as they are
            before = memory.layout.first_position + len(memory.recent[0]) + len(memory.unfinished[0])
        room = sys.maxsize if model.max_tokens is None else model.max_tokens - before
        new = settings.get("max_new_tokens") or getattr(config, "max_new_tokens", None)
        if new is None and (longest := settings.get("max_length")):
            return min(room, longest - 1)
        return room + 1 - (new or (_NEW_TOKENS if config is None else 1))

    def written(self, rows: Sequence[list[int]], memory: Memory | None, settings: dict[str, Any]) -> list[str]:
        """Write behind rows of token ids, all of them behind one memory.

        Args:
            rows: Token ids.
            memory: Memory of one row; None: there is none.
            settings: Arguments of `transformers`' `generate`.

        Returns:
            What was written, a text for each row.
        """
        return written(self.pipeline, rows, None if memory is None else memory.rows([0] * len(rows)), settings)

    def streamed(
        self, row: list[int], memory: Memory | None, lock: threading.RLock, settings: dict[str, Any]
    ) -> Iterator[str]:
        """Write behind a row of token ids, piece by piece.

        Args:
            row: Token ids.
            memory: Memory of one row; None: there is none.
            lock: Held while the model writes.
            settings: Arguments of `transformers`' `generate`.

        Yields:
            Pieces of the text. Once nobody asks for more, no more are written.

        Raises:
            RuntimeError: This thread holds the lock, so that no other thread could write.
        """
        if lock._is_owned():  # type: ignore[attr-defined]
            raise RuntimeError(
                "another thread writes what is streamed, and this one holds the model (in `with shelf.adapter(...)`): "
                "ask without stream there"
            )
        streamer = TextIteratorStreamer(
            self.pipeline.tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        stop, failed = threading.Event(), []
        criteria = [*settings.pop("stopping_criteria", ()), _Stopped(stop)]

        def write():
            try:
                with lock:
                    written(
                        self.pipeline, [row], memory, {**settings, "streamer": streamer, "stopping_criteria": criteria}
                    )
            except BaseException as error:
                failed.append(error)
                streamer.end()

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        try:
            yield from _stripped(streamer)
        finally:
            stop.set()
            writer.join()
        if failed:
            raise failed[0]


def with_passages(text: str, items: Sequence[Item]) -> str:
    """A user's text behind what was said before, word for word, in the order in which it was said.

    Args:
        text: The text.
        items: What was said.
    """
    lines = [
        f"- {'I' if item.role == 'user' else 'You'} said: {item.text}"
        for item in sorted(items, key=lambda item: item.id)
    ]
    return "\n".join([*lines, "", text] if lines else [text])


class _Stopped(StoppingCriteria):
    """Ends what is being written when an event is set."""

    def __init__(self, event):
        self._event = event

    def __call__(self, input_ids, scores, **settings):
        return torch.full((len(input_ids),), self._event.is_set(), device=input_ids.device)


def _stripped(pieces: Iterable[str]) -> Iterator[str]:
    """Pieces of a text without white space before and behind it."""
    kept, begun = "", False
    for piece in pieces:
        text = kept + piece if begun else piece.lstrip()
        shown = text.rstrip()
        kept, begun = text[len(shown) :], begun or bool(shown)
        if shown:
            yield shown


def written(
    pipeline: R3MemPipeline, rows: Sequence[list[int]], memory: Memory | None, settings: dict[str, Any]
) -> list[str]:
    """Write behind rows of token ids, each behind its memory.

    Args:
        pipeline: The pipeline.
        rows: Token ids.
        memory: Memory of as many rows; None: there is none.
        settings: Arguments of `transformers`' `generate`; 128 new tokens if no length is among them.

    Returns:
        What was written, a text for each row.

    Raises:
        ValueError: There are more tokens than positions.
    """
    if not settings.keys() & _LENGTHS:
        settings = {**settings, "max_new_tokens": _NEW_TOKENS}
    ids, mask = (tensor.to(pipeline.model.device) for tensor in padded(rows))
    ids, mask = Rows(ids, mask).left_padded()
    if memory is None:  # behind a memory it is checked there
        tokens = ids.shape[1] + (settings.get("max_new_tokens") or 1) - 1
        pipeline.model.check_length(tokens, behind_memory=False)
    with pipeline.model.behind_memory():  # without the adapters, also where there is no memory yet
        output = pipeline.model.generate(ids, mask, memory=memory, **settings)
    found = output if isinstance(output, torch.Tensor) else output.sequences
    return [text.strip() for text in pipeline.codec.continuations(found[:, ids.shape[1] :])]
