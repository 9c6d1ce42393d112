"""Learned memory tokens: embeddings behind a segment, of which a memory keeps what they become (R3Mem, section 3)."""

import dataclasses
from typing import NamedTuple

import torch
from torch import nn

from ..memory import Memory
from ..reader import MemoryReader
from ..recurrent import Carried, joined_states, replaced_states, rows_of
from ..segments import Segment, without_padding
from ..states import BATCH, SLOTS, appended, uploaded


def new_memory_embeddings(token_embeddings: torch.Tensor, count: int) -> nn.Parameter:
    """Embeddings of memory tokens before training: around the mean of the vocabulary's, as far apart as these.

    Args:
        token_embeddings: The vocabulary's, `[vocabulary, width]`.
        count: Number of memory tokens.

    Returns:
        float32 `[count, width]`.
    """
    known = token_embeddings.detach().float()
    noise = torch.randn(count, known.shape[1], device=known.device)
    return nn.Parameter(known.mean(0) + known.std(0) * noise)


class _Found(NamedTuple):
    """What reading a segment of A rows leaves behind.

    Attributes:
        hidden: Last hidden states of the segment's tokens, `[A, n, hidden_size]`.
        written: What the memory tokens have become, of these rows, as in `Memory.states`; None: nothing is written.
        carried: States of recurrent layers after the tokens that will not be read again; None: there are none.
    """

    hidden: torch.Tensor
    written: torch.Tensor | None
    carried: Carried | None


class TokenWriter:
    """Writes the memory of a segment with learned memory tokens behind it.

    Args:
        reader: Reads memories with the model's decoder.
        memory_embeddings: The memory tokens' embeddings, `[num_memory_tokens, width]`.
        adapts_tokens: Whether adapters act on a segment's tokens, too, or on memory tokens alone.
        dropout: Probability with which a row does not see its memory.
    """

    def __init__(
        self,
        reader: MemoryReader,
        memory_embeddings: torch.Tensor,
        *,
        adapts_tokens: bool = True,
        dropout: float = 0.0,
    ):
        self._reader, self._embeddings = reader, memory_embeddings
        self._adapts_tokens, self._dropout = adapts_tokens, dropout

    def read(self, segment: Segment, memory: Memory) -> tuple[torch.Tensor, Memory]:
        """Read a segment behind a memory, and write it into the memory if the segment asks for it. Differentiable.

        Where a memory carries states of recurrent layers, these go on from text to text: memory tokens read the state
        that a segment leaves, and do not change it. What follows then goes on from a state of text alone, as layers of
        the base model know it, and before training, too; the price is a short pass more for each segment. With a
        `segment_overlap` the state is that of before the tokens that will be read again.

        Gradients pass through the states as through keys and values. There is one exception: where a single token of a
        row is new to the state, what follows takes the state as a constant, because layers read one token by kernels
        without a gradient.

        Args:
            segment: A piece of A rows of a batch of B.
            memory: The memory of what comes before, of B rows.

        Returns:
            The segment's last hidden states, `[A, n, hidden_size]`, and the memory with the states after it.
        """
        rows = list(segment.rows)
        read = memory.rows(rows) if len(rows) < len(memory) else memory
        if self._dropout:
            read = self._partly_unseen(read)
        if read.carried is None:
            found = self._in_one_pass(segment, read)
        elif segment.mask.all():
            found = self._beside_states(segment, read)
        else:
            found = self._by_length(segment, read)
        if segment.writes:
            states = appended(memory.states, found.written, rows, memory.layout)
            carried = found.carried and replaced_states(memory.carried or {}, rows, found.carried)
            memory = dataclasses.replace(memory, states=states, carried=carried)
        return found.hidden, memory

    def _partly_unseen(self, read):
        """A memory that some rows do not have: drawn within the segment, and so the same when it is run again."""
        seen = torch.rand(len(read)) >= self._dropout
        carried = read.carried
        if carried is not None:
            here = uploaded(seen, read.device)
            carried = {n: s.where(here.view(-1, *[1] * (s.dim() - 1)), s.new_zeros(())) for n, s in carried.items()}
        return dataclasses.replace(read, num_segments=read.num_segments * seen, carried=carried)

    def _with_memory_tokens(self, segment):
        """Embeddings of a segment's tokens and, if it writes, of memory tokens behind them; number of the latter."""
        embeddings = self._reader.embeddings_of(segment.ids)
        if not segment.writes:
            return embeddings, 0
        written = self._embeddings.to(embeddings.dtype).expand(len(embeddings), -1, -1)
        return torch.cat([embeddings, written], 1), len(self._embeddings)

    def _in_one_pass(self, segment, read):
        reader = self._reader
        embeddings, count = self._with_memory_tokens(segment)
        mask = torch.nn.functional.pad(segment.mask, (0, count), value=1)
        cache = reader.new_cache(keep=False, capture=count, adapted_tokens=None if self._adapts_tokens else count)
        hidden = reader.decode(embeddings, mask, reader.read(cache, read), ids=segment.ids)
        written = None
        if segment.writes:
            written = hidden[:, -count:] if read.layout.placement == "input" else cache.captured()
        return _Found(hidden[:, : hidden.shape[1] - count], written, None)

    def _beside_states(self, segment, read):
        """Read a segment without padding: up to where its state is wanted, then the rest with the memory tokens."""
        reader, length = self._reader, segment.ids.shape[1]
        embeddings, count = self._with_memory_tokens(segment)
        fresh = max(0, length - read.layout.segment_overlap) if segment.writes else 0
        carried, start, hidden = read.carried, fresh, []
        if fresh == 1 and torch.is_grad_enabled():
            with torch.no_grad():  # see `read`
                carried, start = self._states_after(embeddings[:, :1], segment.ids[:, :1], read), 0
        # One token alone is read by other kernels, which have no gradient. What stands behind it, it does not see.
        spare = int(embeddings.shape[1] - start == 1 and torch.is_grad_enabled())
        cache = reader.read(reader.new_cache(keep=start > 0, capture=count + spare), read)
        if start:
            hidden.append(self._decoded(embeddings[:, :start], segment.ids[:, :start], cache, 0, 0))
            carried = {name: state.clone() for name, state in cache.states_after().items()}
        rest = torch.cat([embeddings[:, start:], embeddings[:, embeddings.shape[1] - spare :].detach()], 1)
        hidden.append(self._decoded(rest, segment.ids[:, start:], cache, start, count + spare))
        written = cache.captured().narrow(SLOTS["every_layer"], 0, count) if segment.writes else None
        return _Found(torch.cat(hidden, 1)[:, :length], written, carried)

    def _states_after(self, embeddings, ids, read):
        cache = self._reader.read(self._reader.new_cache(keep=False), read)
        self._decoded(embeddings, ids, cache, 0, 0)
        return {name: state.clone() for name, state in cache.states_after().items()}

    def _decoded(self, embeddings, ids, cache, first, adapted):
        """Decode tokens from a position on, with adapters on all of them, or on the last ones alone."""
        cache.adapted_tokens = None if self._adapts_tokens else adapted
        places = torch.arange(first, first + embeddings.shape[1]).expand(len(embeddings), -1)
        return self._reader.decode(embeddings, torch.ones_like(places), cache, places, ids)

    def _by_length(self, segment, read):
        """Read rows of one length together, and the others apart: padding would be a token to a recurrent layer."""
        width, order, found = segment.ids.shape[1], [], []
        for places, part in without_padding(segment):
            order += places
            found.append(self._beside_states(part, read.rows(places)))
        index = uploaded(torch.tensor(order).argsort(), read.device)
        padded = [torch.nn.functional.pad(one.hidden, (0, 0, width - one.hidden.shape[1], 0)) for one in found]
        hidden = torch.cat(padded).index_select(0, index)
        if not segment.writes:
            return _Found(hidden, None, None)
        batch = BATCH[read.layout.placement]
        written = torch.cat([one.written for one in found], batch).index_select(batch, index)
        return _Found(hidden, written, rows_of(joined_states([one.carried for one in found]), index))

    def finish(self) -> None:
        """Do nothing: what can go wrong here is noticed by the network."""
