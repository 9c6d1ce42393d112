"""Segments as CUDA graphs: what repeats is decided once by the host, and then done by the GPU alone.

A history soon comes to a state in which every segment has as many tokens, and every memory as many slots. What the
host then decides is the same for each, so that it need not decide it again: it hands the tokens to a graph.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch

from ...integrations import graphs
from ..memory import Memory
from ..segments import Segment
from ..states import Constants, uploaded
from .matched import MatchedWriter


class Repeated:
    """Runs steps; where those of one kind follow one another, by a graph.

    The first of a kind is run as always; so is the second, while what it uploads is kept on the GPU; with the third
    the graph is captured. It lasts until another kind comes, or as long as this object.

    Args:
        writer: The writer by which the steps match.
        device: Device of the steps.
    """

    def __init__(self, writer: MatchedWriter, device: torch.device):
        self._writer, self._wanted = writer, graphs.are_wanted(device)
        self._kind: Hashable = None
        self._graph: Any = None
        self._constants: Constants | None = None
        self.replays = 0

    @torch.no_grad()
    def __call__(
        self, step: Callable[..., tuple[torch.Tensor, ...]], kind: Hashable, *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Run a step.

        Args:
            step: A function of tensors that gives tensors. Those of one kind do the same.
            kind: What it does, to be compared; None: it has no like.
            inputs: Its arguments.
        """
        if kind is None or kind != self._kind or not self._wanted:
            self._kind, self._graph, self._constants = kind, None, None
            return step(*inputs)
        if self._constants is None:
            self._constants = Constants()
            with self._constants.noted():
                return step(*inputs)
        if self._graph is None:
            with self._constants.used():
                self._graph = graphs.captured(lambda *given: self._watched(step, *given), inputs)
        *results, unmatched = self._graph(*inputs)
        self._writer.unmatched.append(unmatched)
        self.replays += 1
        return tuple(results)

    def _watched(self, step, *inputs):
        """The results of a step, and whether something could not be matched in it."""
        writer = self._writer
        before, writer.unmatched = writer.unmatched, []
        try:
            results = step(*inputs)
            found = writer.unmatched or [torch.zeros((), dtype=torch.bool, device=inputs[0].device)]
        finally:
            writer.unmatched = before
        return *results, torch.stack(found).any()


class GraphedWriter:
    """Does what a `MatchedWriter` does, by graphs where segments repeat.

    Where two segments in a row are of one kind, the memory has stopped to grow.

    Args:
        writer: The writer.
        device: The model's device.

    Attributes:
        matched: The writer.
        repeated: Runs its segments.
    """

    def __init__(self, writer: MatchedWriter, device: torch.device):
        self.matched, self._device, self.repeated = writer, device, Repeated(writer, device)

    def read(self, segment: Segment, memory: Memory) -> tuple[torch.Tensor, Memory]:
        """Read a segment behind a memory, and match its keys and values; see `MatchedWriter.read`."""
        kind = self.matched.kind_of(segment, memory)
        if kind is None:
            return self.matched.read(segment, memory)
        assert memory.ages is not None  # as a matched memory has them
        after = memory

        def step(ids, states, ages):
            nonlocal after
            before = dataclasses.replace(memory, states=states, ages=ages)
            hidden, after = self.matched.read(dataclasses.replace(segment, ids=ids), before)
            return hidden, after.states, after.ages

        ids = uploaded(segment.ids, self._device)
        hidden, states, ages = self.repeated(step, kind, ids, memory.states, memory.ages)
        return hidden, dataclasses.replace(after, states=states, ages=ages)

    def finish(self) -> None:
        """Warn if values could not be matched since the last call; see `MatchedWriter.finish`."""
        self.matched.finish()
