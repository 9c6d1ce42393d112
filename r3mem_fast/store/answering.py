"""`Answering`: writes behind memories, at once or piece by piece."""

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
from .memories import Histories
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
        """
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
