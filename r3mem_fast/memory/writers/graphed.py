"""`GraphedWriter`: a matched writer whose segments, once they are all alike, are one CUDA graph each.

A history soon comes to a state in which every segment has as many tokens, and every memory as many slots. What the
host then decides is the same for each, so that it need not decide it again: it hands the tokens to a graph.
"""

import dataclasses
from typing import Any

import torch

from ...integrations import graphs
from ..memory import Memory
from ..segments import Segment
from ..states import Constants, uploaded
from .matched import MatchedWriter


class GraphedWriter:
    """Does what a `MatchedWriter` does, by graphs where segments repeat.

    Where two segments in a row are of one kind, the memory has stopped to grow. The first is read as always; so is the
    second, while what it uploads is kept on the GPU; with the third the graph is captured. It lasts as long as this
    object.

    Args:
        writer: The writer.
        device: The model's device.
    """

    def __init__(self, writer: MatchedWriter, device: torch.device):
        self._writer, self._device = writer, device
        self._kind: Any = None
        self._step: Any = None
        self._constants: Constants | None = None
        self.replays = 0

    def read(self, segment: Segment, memory: Memory) -> tuple[torch.Tensor, Memory]:
        """Read a segment behind a memory, and match its keys and values; see `MatchedWriter.read`."""
        kind = self._writer.kind_of(segment, memory)
        if kind is None or kind != self._kind:
            self._kind, self._step, self._constants = kind, None, None
            return self._writer.read(segment, memory)
        assert memory.ages is not None  # as a matched memory has them
        inputs = (uploaded(segment.ids, self._device), memory.states, memory.ages)

        def step(ids, states, ages):
            before = dataclasses.replace(memory, states=states, ages=ages)
            return self._writer.stepped(dataclasses.replace(segment, ids=ids), before)

        if self._constants is None:
            self._constants = Constants()
            with torch.no_grad(), self._constants.noted():
                hidden, states, ages, unmatched = step(*inputs)
        else:
            with torch.no_grad():
                if self._step is None:
                    with self._constants.used():
                        self._step = graphs.captured(step, inputs)
                hidden, states, ages, unmatched = self._step(*inputs)
                self.replays += 1
        self._writer.unmatched.append(unmatched)
        return hidden, dataclasses.replace(memory, states=states, ages=ages)

    def finish(self) -> None:
        """Warn if values could not be matched since the last call; see `MatchedWriter.finish`."""
        self._writer.finish()
