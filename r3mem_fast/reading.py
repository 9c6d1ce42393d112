"""Reads histories segment by segment, each behind the memory of the segments before it."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.utils.checkpoint import checkpoint

from .batching import Rows
from .integrations import graphs
from .integrations.fsdp import largest_of_ranks, units_of
from .memory.cache import PrefixCache
from .memory.memory import Memory
from .memory.segments import IGNORED, Segment, advance, cut_segments
from .memory.states import BATCH
from .memory.writers.diagonal import DiagonalReader
from .memory.writers.graphed import GraphedWriter
from .memory.writers.matched import MatchedWriter
from .network import Network
from .reversible.replay import replay
from .writing import writer_of


def is_one_pass(network: Network, rows: Rows) -> bool:
    """Whether rows without a memory before them are read in one pass, as the base model reads them.

    Args:
        network: The model.
        rows: The rows.
    """
    if not network.learns_memories or network.is_plain:
        return True
    return largest_of_ranks(network, int(rows.mask.sum(1).max())) <= network.reader.layout.segment_length


def segments_of(network: Network, memory: Memory, rows: Rows, *, in_one: bool = False) -> list[Segment]:
    """Cut rows that follow a memory into the segments that they are read in.

    Args:
        network: The model.
        memory: The memory, of as many rows.
        rows: The rows.
        in_one: Whether all tokens make a single segment.

    Raises:
        ValueError: A segment does not fit into the model's positions.
    """
    ids, labels = rows.lists(), rows.lists(rows.labels)
    lengths = [len(before) + len(row) for before, row in zip(memory.unfinished, ids, strict=True)]
    length = max(1, *lengths) if in_one else None
    longest = max(lengths) if in_one else largest_of_ranks(network, max(lengths))
    if longest > max(lengths):
        # Another process has more segments. Tokens are added here to have as many; they do not count in the loss.
        more = torch.zeros(longest - lengths[-1], dtype=torch.int64)
        ids[-1], labels[-1] = torch.cat([ids[-1], more]), torch.cat([labels[-1], more + IGNORED])
    segments, layout = cut_segments(memory, ids, labels, finish=True, writes_all=False, length=length), memory.layout
    for segment in segments:
        written = layout.num_memory_tokens if segment.writes and layout.writer == "tokens" else 0
        network.check_length(segment.ids.shape[1] + written, behind_memory=True)
    return segments


def trains_through(network: Network, segments: Sequence[Segment]) -> bool:
    """Whether gradients are to pass from segment to segment.

    Args:
        network: The model.
        segments: The segments.
    """
    learns = network.memory_embeddings is not None  # a matched memory carries no gradient
    return learns and network.training and torch.is_grad_enabled() and len(segments) > 1


def read_segments(
    network: Network,
    segments: Sequence[Segment],
    memory: Memory,
    outcome: Callable[[Segment, torch.Tensor], Any],
    on_tokens: Callable[[int], Any] | None = None,
    *,
    foreign: Segment | None = None,
) -> tuple[list[Any], Memory]:
    """Read segments one after the other, each behind the memory of those before it.

    Args:
        network: The model. In training, its setting `kept_segments` decides what is kept of each segment until the
            backward pass.
        segments: Segments that `cut_segments` made.
        memory: The memory before the first segment.
        outcome: Function that makes a result of a segment and its last hidden states, `[A, n, hidden_size]`. In
            training it may be called again in the backward pass.
        on_tokens: Function that is called after each segment with the number of tokens that were read; None: there is
            none. It is not called where segments are run again in the backward pass.
        foreign: The last segment, if each row is to read it behind the memory of the row before; None: behind its own.

    Returns:
        The results of `outcome`, one for each segment, and the memory after the last one; what it carries as tokens is
        left to `segments.advance`.
    """
    config = network.r3mem_config
    memory = memory.to(network.device, network.dtype)
    if memory.carried is not None:
        _check_lengths_of_ranks(network, segments)
    training = trains_through(network, segments)
    writer = writer_of(network, memory.layout, dropout=config.memory_dropout if training else 0.0)

    def step(segment, state):
        before = _with_state(memory, state, num_segments=segment.num_segments)
        before = _of_other_rows(before) if segment is foreign else before
        with network.behind_memory():  # also where a segment runs again
            hidden, after = writer.read(segment, before)
            return outcome(segment, hidden), _state_of(after)

    if training and config.kept_segments == "none":
        outcomes, state = replay(network, step, segments, _state_of(memory), bptt_segments=config.bptt_segments)
        return outcomes, _with_state(memory, state)
    outcomes = []
    on_host = training and config.kept_segments == "host"
    with network.behind_memory():
        for index, segment in enumerate(segments):
            if training and index and config.bptt_segments is not None and index % config.bptt_segments == 0:
                memory = memory.detach()
            with network.stack.on_host() if on_host else contextlib.nullcontext():
                before = dataclasses.replace(memory, num_segments=segment.num_segments)
                before = _of_other_rows(before) if segment is foreign else before
                hidden, memory = writer.read(segment, before)
                if training:  # the logits take as much memory as all else that a segment computes
                    outcomes.append(checkpoint(outcome, segment, hidden, use_reentrant=False))
                else:
                    outcomes.append(outcome(segment, hidden))
            if on_tokens is not None:
                on_tokens(segment.new_tokens)
    writer.finish()
    return outcomes, memory


def _check_lengths_of_ranks(network, segments):
    """Raise ValueError where processes of FSDP2 would run other numbers of passes: rows are read by length."""
    for segment in segments:
        lengths = len(set(segment.mask.sum(1).tolist()))
        if largest_of_ranks(network, lengths) + largest_of_ranks(network, -lengths):
            raise ValueError(
                "a model sharded by FSDP2 gathers its layers in all processes together, and rows of several lengths "
                "are read apart by recurrent layers: give all processes rows of as many lengths, such as one"
            )


def _state_of(memory):
    """The tensors of a memory that a segment changes, of which gradients pass through those with states."""
    beside = {} if memory.ages is None else {"ages": memory.ages, "slots": memory.slots}
    return memory.states, memory.carried or {}, beside


def _of_other_rows(memory):
    """A memory in which each row holds what the row before holds; differentiable."""
    row_of = {"states": BATCH[memory.layout.placement], "num_segments": 0, "ages": 1, "slots": 0}
    held = {name: getattr(memory, name) for name in row_of}
    moved = {name: tensor.roll(1, row_of[name]) for name, tensor in held.items() if tensor is not None}
    carried = memory.carried and {name: state.roll(1, 0) for name, state in memory.carried.items()}
    return dataclasses.replace(memory, carried=carried, **moved)


def _with_state(memory, state, **others):
    """A memory with other tensors, as `_state_of` gives them, and other fields."""
    states, carried, beside = state
    return dataclasses.replace(memory, states=states, carried=carried or None, **beside, **others)


def compress_rows(
    network: Network,
    rows: Sequence[torch.Tensor],
    memory: Memory,
    *,
    finish: bool,
    follows: bool = False,
    on_tokens: Callable[[int], Any] | None = None,
) -> Memory:
    """Compress more tokens into a memory; differentiable.

    Args:
        network: The model.
        rows: New token ids of each row, int64 `[n]`, on the CPU.
        memory: The memory before them, of as many rows.
        finish: Whether the texts have ended, see `cut_segments`.
        follows: Whether more of the rows is known to follow, see `cut_segments`.
        on_tokens: Function that is called after each segment with the number of tokens that were read; None: there is
            none.

    Returns:
        The memory after them.

    Raises:
        ValueError: There are more segments than `max_memory_segments=None` can keep, or processes of FSDP2 have
            different numbers of them.
    """
    layout = memory.layout
    segments = cut_segments(memory, rows, finish=finish, writes_all=True, follows=follows)
    if largest_of_ranks(network, len(segments)) + largest_of_ranks(network, -len(segments)):
        raise ValueError(
            "a model sharded by FSDP2 gathers its layers in all processes together, so each has to compress as "
            f"many segments; here are {len(segments)}. Give all of them rows that are cut into as many"
        )
    carried = advance(memory, rows, segments)
    readable = layout.readable_segments
    if layout.keeps_all and len(carried["num_segments"]) and carried["num_segments"].max() > readable:
        raise ValueError(
            f"max_memory_segments=None keeps {readable} segments within the model's positions, and this is more "
            "(to expand a memory compresses what is unfinished in it); use a number, or longer segments"
        )
    # Processes that gather a sharded model's layers together must run alike, whatever their rows are.
    diagonal = graphs.are_diagonal() and network.memories_are_of_base and not units_of(network)
    if diagonal and layout.writer == "matched":
        after = _read_by_diagonals(network, segments, memory, on_tokens)
    else:
        _, after = read_segments(network, segments, memory, lambda segment, hidden: (), on_tokens)
    return dataclasses.replace(after, **carried)


def hold_beginnings(network: Network, rows: Sequence[torch.Tensor], memory: Memory) -> Memory:
    """Read the beginning of rows behind a matched memory, and hold it with a slot for every token.

    So what is left of rows of several lengths can have one length: recurrent layers would take padding for tokens.

    Args:
        network: The model.
        rows: Token ids of each row, int64 `[n]`, on the CPU; some may be empty.
        memory: The memory before them, of as many rows. What it carries as tokens is not read.

    Returns:
        The memory, whose layout has a reach that is as much larger as the longest row, so that every slot keeps its
        distance.
    """
    nothing, longest = (torch.zeros(0, dtype=torch.int64),) * len(rows), max(map(len, rows))
    # Nothing is matched.
    layout = dataclasses.replace(memory.layout, segment_overlap=0, queries="own", reach=memory.layout.reach + longest)
    bare = dataclasses.replace(
        memory.to(network.device, network.dtype), unfinished=nothing, recent=nothing, layout=layout
    )
    segments = cut_segments(bare, rows, finish=True, writes_all=True, length=longest)
    writer = MatchedWriter(network.reader, layout)
    with network.behind_memory():
        for segment in segments:
            bare = writer.extended(segment, bare)
    return bare


def read_but_last(network: Network, ids: torch.Tensor, mask: torch.Tensor, cache: PrefixCache, memory: Memory) -> None:
    """Let a cache read prompts of several lengths up to their last tokens, in the direction that the model is read in.

    Rows of one length are read together, and others apart: recurrent layers would take padding for tokens.

    Args:
        network: The model.
        ids: Token ids, int64 `[B, T]`, padded on the left.
        mask: Their mask, `[B, T]`, 0 for padding.
        cache: A cache that holds the memory, and has read nothing behind it.
        memory: The memory, of as many rows.
    """
    reader, last, parts = network.reader, ids.shape[1] - 1, []
    lengths = (mask.sum(1) - 1).tolist()
    for length in sorted(set(lengths) - {0}):
        rows = [row for row, own in enumerate(lengths) if own == length]
        tokens = ids[rows, last - length : last].cpu()
        part = reader.read(reader.new_cache(adapted_tokens=cache.adapted_tokens), memory.rows(rows))
        reader.decode(reader.embeddings_of(tokens), torch.ones_like(tokens), part, ids=tokens)
        parts.append((rows, part))
    cache.take_over(parts)


def _read_by_diagonals(network, segments, memory, on_tokens):
    """Read segments behind a memory: those that are alike by diagonals, the others one after the other."""
    memory = memory.to(network.device, network.dtype)
    writer = writer_of(network, memory.layout)
    matched = writer.matched if isinstance(writer, GraphedWriter) else cast(MatchedWriter, writer)
    reader = DiagonalReader(matched, network.reader, network.layers)
    # The kind of the last segment, and up to where segments have been looked at that are too few for diagonals.
    index, last, looked = 0, None, 0
    with network.behind_memory():
        while index < len(segments):
            before = dataclasses.replace(memory, num_segments=segments[index].num_segments)
            kind = matched.kind_of(segments[index], before)
            if kind is not None and kind == last and index >= looked:  # so that the memory has stopped to grow
                run = _first_of_kind(matched, kind, segments[index:], before)
                looked = index + len(run)
                if reader.takes(run):
                    memory, index, last = reader.read(run, before, on_tokens), looked, None
                    continue
            _, memory = writer.read(segments[index], before)
            if on_tokens is not None:
                on_tokens(segments[index].new_tokens)
            index, last = index + 1, kind
    writer.finish()
    return memory


def _first_of_kind(writer, kind, segments, memory):
    """Segments that are of a kind, behind a memory that does not change its size, up to the first that is not."""
    return list(itertools.takewhile(lambda segment: writer.kind_of(segment, memory) == kind, segments))


def placed(rows: Rows, segments: Sequence[Segment], found: Sequence[torch.Tensor]) -> torch.Tensor:
    """Put values that belong to the tokens of segments where these tokens stand in the rows.

    Args:
        rows: The rows, `[B, T]`.
        segments: Segments that the rows were cut into.
        found: Values of each segment's tokens, `[A, n, C]`.

    Returns:
        `[B, T, C]`, zeros in padding.
    """
    pieces: list[list[torch.Tensor]] = [[] for _ in rows.ids]
    for segment, values_of_rows in zip(segments, found, strict=True):
        for row, (start, end), values in zip(segment.rows, segment.own, values_of_rows, strict=True):
            pieces[row].append(values[len(values) - (end - start) :])
    some = found[0]
    empty = some.new_zeros(*rows.ids.shape, some.shape[-1])
    kept = [torch.cat(values) for values in pieces if values]
    return empty.masked_scatter(rows.mask.bool()[..., None], torch.cat(kept))
