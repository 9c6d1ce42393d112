"""Reads a long history by diagonals: many segments at a time, each in another layer.

A layer reads a segment behind what that layer has kept of the segments before. So it needs two things alone: the layer
below to have read this segment, and itself to have read the one before (Sivtsov et al. 2025, arXiv 2506.05229). Layers
0, 1, 2, ... can therefore read segments s, s - 1, s - 2, ... at the same time, and what they keep is matched together.

On a GPU the layers of a diagonal run side by side, in streams, which matters where a segment is too short to fill it.
The results are those of reading one segment after the other, to the last bit.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ...integrations.capture import captured_attention
from ...integrations.scoped import hooked
from ..memory import Memory
from ..reader import MemoryReader
from ..segments import Segment
from .graphed import Repeated
from .matched import MatchedWriter, Pass

# Layers that run side by side on a GPU.
_STREAMS = 8


class DiagonalReader:
    """Reads segments of one kind, by a base model whose layers are all called with the same arguments but for states.

    Args:
        writer: The writer of their memories, of queries that are the segments' own.
        reader: The reader of the model's memories.
        layers: The model's layers, in order.
    """

    def __init__(self, writer: MatchedWriter, reader: MemoryReader, layers: Sequence[nn.Module]):
        self._writer, self._reader, self._layers = writer, reader, layers
        device = next(layers[0].parameters()).device
        count = min(_STREAMS, len(layers)) if device.type == "cuda" else 0
        self._streams = [torch.cuda.Stream(device) for _ in range(count)]
        self._device = device
        self._is_possible: bool | None = None

    def takes(self, segments: Sequence[Segment]) -> bool:
        """Whether segments, all of one kind, can be read by diagonals and are enough for it.

        Args:
            segments: The segments.
        """
        if len(segments) <= len(self._layers) or self._writer.query_kinds != ["own"]:
            return False
        if len(self._reader.layer_sizes()) < len(self._layers):  # some read what others have left in the same pass
            return False
        if self._is_possible is None:
            # Some models give their layers something of the tokens themselves: other tokens would show it.
            ids = segments[0].ids
            first, second = (
                tree_leaves(self._reader.entering(some)[1]) for some in (ids, (ids + 1) % (ids.max() + 1))
            )
            self._is_possible = all(
                torch.equal(a, b) for a, b in zip(first, second, strict=True) if isinstance(a, torch.Tensor)
            )
        return self._is_possible

    @torch.no_grad()
    def read(
        self, segments: Sequence[Segment], memory: Memory, on_tokens: Callable[[int], Any] | None = None
    ) -> Memory:
        """Read segments behind a memory.

        Args:
            segments: Segments that `takes` them.
            memory: The memory before them, which has stopped to grow.
            on_tokens: Function that is called with the number of tokens that all layers have read; None: none is.

        Returns:
            The memory after them.
        """
        calls = _Calls(self._layers)
        with calls.noted():
            passed = self._writer.pass_over(segments[0], memory)
        memory = self._writer.written(passed)
        told = on_tokens or (lambda tokens: None)
        told(segments[0].new_tokens)
        count, rest = len(self._layers), segments[1:]
        step, repeated = self._step_of(passed, calls, memory), Repeated(self._writer, self._device)
        # What enters each layer next; of those that nothing enters yet, what the first segment has left.
        entering: list[torch.Tensor] = list(calls.hidden)
        states, ages = memory.states, memory.ages
        assert ages is not None, "see MemoryLayout.writer"
        for diagonal in range(len(rest) + count - 1):
            if diagonal < len(rest):
                entering[0] = self._reader.entering(rest[diagonal].ids)[0]
            low, high = max(0, diagonal - len(rest) + 1), min(count, diagonal + 1)
            span = (low, high)
            *left, states, ages = repeated(functools.partial(step, span), span, *entering[low:high], states, ages)
            entering[low + 1 : high + 1] = left
            del entering[count:]
            if high == count:
                told(rest[diagonal - count + 1].new_tokens)
        return dataclasses.replace(memory, states=states, ages=ages)

    def _step_of(self, passed: Pass, calls: "_Calls", memory: Memory) -> Callable:
        """A function that reads a diagonal: of the layers' range, what enters them, states and ages."""
        queries = dict(passed.calls)
        layers = torch.arange(len(self._layers), device=self._device)[:, None, None, None]

        def step(span: tuple[int, int], *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
            *hidden, states, ages = given
            low, high = span
            before = dataclasses.replace(memory, states=states, ages=ages)
            passed.cache.hold(states, ages)
            with captured_attention(self._reader.decoder) as asked:
                left = self._side_by_side([calls.caller(low + place, some) for place, some in enumerate(hidden)])
            queries.update(asked)
            # All layers are matched, and those that have read nothing new stay what they are.
            found = passed._replace(memory=before, before=before, calls=dict(queries))
            after = self._writer.written(found)
            assert after.ages is not None
            if high - low == len(self._layers):
                return *left, after.states, after.ages
            read = (layers >= low) & (layers < high)
            states = torch.where(read[..., None, None], after.states, states)
            return *left, states, torch.where(read, after.ages, ages)

        return step

    def _side_by_side(self, functions: Sequence[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
        """Call functions, on a GPU in streams of their own that the current one waits for."""
        if not self._streams:
            return [function() for function in functions]
        main, found = torch.cuda.current_stream(self._device), []
        for stream in self._streams:
            stream.wait_stream(main)
        for index, function in enumerate(functions):
            with torch.cuda.stream(self._streams[index % len(self._streams)]):
                found.append(function())
        for stream in self._streams:
            main.wait_stream(stream)
        return found


class _Calls:
    """How a decoder calls its layers in a pass."""

    def __init__(self, layers: Sequence[nn.Module]):
        self._layers = layers
        self._arguments: list[tuple[tuple, dict[str, Any]]] = []
        self.hidden: list[torch.Tensor] = []

    def noted(self) -> contextlib.AbstractContextManager[None]:
        """Note the calls of the block: a context manager."""
        return hooked(self._layers, self._note, with_kwargs=True)

    def _note(self, layer, args, kwargs):
        kind: Any = type(layer)
        _, name, *_ = inspect.signature(kind.unreversed.forward).parameters
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop(name)
        self.hidden.append(hidden)
        self._arguments.append((args[1:], kwargs))

    def caller(self, index: int, hidden: torch.Tensor) -> Callable[[], torch.Tensor]:
        """A function that calls a layer as the decoder did, with other hidden states."""
        args, kwargs = self._arguments[index]

        def call() -> torch.Tensor:
            output = self._layers[index](hidden, *args, **kwargs)
            return output[0] if isinstance(output, tuple) else output

        return call
