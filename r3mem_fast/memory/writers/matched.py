"""`MatchedWriter`: matched memories, the keys of a segment that will be asked for, with values to stand for all of it.

How slots are matched to queries is `matching`'s, and how many there are is `budget`'s. This file decides which queries
those are. Every pass begins at the same position, however long the history is, so that queries of this one
have the positions that those of the next one will have; keys keep their distances, up to the layout's reach.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from ...integrations.capture import AttentionCall, captured_attention
from ..cache import PrefixCache
from ..layout import MemoryLayout
from ..memory import Memory
from ..reader import MemoryReader
from ..recurrent import Carried, replaced_states
from ..rotary import depends_on_pass
from ..segments import Segment, without_padding
from ..slots import Slots, replaced, slots_of
from ..states import uploaded
from .budget import Budget
from .matching import Match, Queries, asked_of_slots, joined, joined_calls

# Gives what will be asked of a text: token ids, int64 `[n]` each, of the text's ids, int64 `[T]`.
QuestionsOf = Callable[[torch.Tensor], Sequence[torch.Tensor]]


class Pass(NamedTuple):
    """What a pass over a segment has left behind.

    Attributes:
        segment: The segment, of A rows of a batch of B.
        memory: The memory before it, of B rows.
        before: The memory before it, of the A rows alone.
        cache: The pass's cache, with the segment's keys and values.
        calls: The attention of each layer with keys, by its place among these; none if the segment does not ask for a
            memory.
        hidden: Last hidden states, `[A, n, hidden_size]`.
        states: Keys, without positions, and values of the segment, as `PrefixCache.captured` gives them; None: the
            cache has them.
        carried: States of recurrent layers after the tokens that will not be read again; None: there are none.
    """

    segment: Segment
    memory: Memory
    before: Memory
    cache: PrefixCache
    calls: Mapping[int, AttentionCall]
    hidden: torch.Tensor
    states: torch.Tensor | None = None
    carried: Carried | None = None


class MatchedWriter:
    """Writes matched memories.

    Args:
        reader: Reads memories with the model's decoder.
        layout: Layout of the memories; its reach is that of the reader's.
        questions_of: Gives what will be asked of a segment, for a layout with queries of "pairs".
        adapted_tokens: Number of trailing tokens of a pass that adapters act on; None: all.

    Attributes:
        query_kinds: Which queries memories are matched to, of "own", "reread", "pairs".
        unmatched: Whether something could not be matched since the last `finish`, on the device.
    """

    def __init__(
        self, reader: MemoryReader, layout: MemoryLayout, questions_of: QuestionsOf | None = None,
        *, adapted_tokens: int | None = None,
    ):  # fmt: skip
        self._reader, self._layout, self._questions_of = reader, layout, questions_of
        self._adapted_tokens = adapted_tokens
        self.query_kinds = layout.queries.split("+")
        self.unmatched: list[torch.Tensor] = []

    def read(self, segment: Segment, memory: Memory) -> tuple[torch.Tensor, Memory]:
        """Read a segment behind a memory, and match its keys and values if the segment asks for it.

        Args:
            segment: A piece of A rows of a batch of B.
            memory: The memory of what comes before, of B rows.

        Returns:
            The segment's last hidden states, `[A, n, hidden_size]`, and the memory after it.

        Raises:
            ValueError: The memory is beyond its budget, and that is to be an error; or no memory can be matched to
                the model's attention.
        """
        each_row = "pairs" in self.query_kinds
        if memory.carried is not None and not (segment.mask.all() and (len(segment.rows) == 1 or not each_row)):
            return self._read_without_padding(segment, memory, each_row)
        found = self.pass_over(segment, memory)
        return found.hidden, self.written(found) if segment.writes else memory

    def _read_without_padding(self, segment, memory, each_row):
        """Read rows of one length together, and the others apart."""
        whole = None
        for places, part in without_padding(segment, each_row=each_row):
            found = self.pass_over(part, memory)
            if whole is None:
                whole = found.hidden.new_zeros(*segment.ids.shape, found.hidden.shape[-1])
            whole[places, segment.ids.shape[1] - part.ids.shape[1] :] = found.hidden
            memory = self.written(found) if segment.writes else memory
        return whole, memory

    @torch.no_grad()
    def pass_over(self, segment: Segment, memory: Memory) -> Pass:
        """Read a segment behind a memory, and note what can be matched if the segment asks for it.

        Args:
            segment: A piece of A rows of a batch of B.
            memory: The memory of what comes before, of B rows.

        Raises:
            ValueError: No memory can be matched to the model's attention.
        """
        return self._passed_over(segment, memory)

    def _passed_over(self, segment, memory):
        """Read a segment as `pass_over` does; differentiable."""
        if segment.writes and "pairs" in self.query_kinds and self._questions_of is None:
            raise ValueError(
                f"memory_queries={self._layout.queries!r} asks a memory what will be asked of its text, and nothing "
                "says what that is: an R3MemPipeline does, or set questions_of of the R3MemModel"
            )
        rows, reader, mask = list(segment.rows), self._reader, segment.mask
        before = memory.rows(rows) if len(rows) < len(memory) else memory
        embeddings = reader.embeddings_of(segment.ids)
        in_parts = segment.writes and before.carried is not None
        settings = {"capture": mask.shape[1] if segment.writes else 0, "adapted_tokens": self._adapted_tokens}
        cache = reader.new_cache(keep=in_parts, **settings)
        reader.read(cache, before)
        if not segment.writes:
            return Pass(segment, memory, before, cache, {}, reader.decode(embeddings, mask, cache, ids=segment.ids))
        if in_parts:
            return self._pass_in_parts(segment, memory, before, cache, embeddings)
        hidden, calls = self._decoded(embeddings, mask, cache, segment.ids)
        return Pass(segment, memory, before, cache, calls, hidden)

    def _pass_in_parts(self, segment, memory, before, cache, embeddings):
        """Read up to the first token that will be read again, where recurrent layers will go on, and then the rest."""
        fresh, carried = int(self._fresh(segment)[0]), before.carried
        found, states = [], []
        for start, end in ((0, fresh), (fresh, segment.ids.shape[1])):
            if start == end:
                continue
            positions = torch.arange(start, end).expand(len(segment.ids), -1)
            found.append(
                self._decoded(
                    embeddings[:, start:end], segment.mask[:, start:end], cache, segment.ids[:, start:end], positions
                )
            )
            states.append(cache.captured())
            if end == fresh:
                carried = {name: state.clone() for name, state in cache.states_after().items()}
        hidden = torch.cat([part for part, _ in found], 1)
        calls = joined_calls([part for _, part in found])
        return Pass(segment, memory, before, cache, calls, hidden, torch.cat(states, 4), carried)

    def _decoded(self, embeddings, mask, cache, ids, positions=None):
        """Decode tokens behind a memory: last hidden states, and the attention of each layer by its place."""
        reader = self._reader
        with captured_attention(reader.decoder) as calls:
            hidden = reader.decode(embeddings, mask, cache, positions, ids)
        asking = {index for index, source in enumerate(cache.key_sources) if source in cache.keyed}
        if missing := sorted(asking - calls.keys()):
            raise ValueError(
                f"the attention of layers {missing} of a {type(reader.decoder).__name__} is none of transformers' "
                "interchangeable functions, so no memory can be matched to it; let memory tokens learn "
                '(memory_writer="tokens")'
            )
        return hidden, asked_of_slots(calls, cache)

    @torch.no_grad()
    def written(self, found: Pass) -> Memory:
        """Match what a pass has read.

        Args:
            found: The pass, over a segment that asks for a memory.

        Returns:
            The memory after it.

        Raises:
            ValueError: The memory is beyond its budget, and that is to be an error.
        """
        return _replaced(found, self._matched(found, *self._candidates(found)))

    def _matched(self, found, old, new):
        """Match slots as `written` does: places of rows, and their slots, a list."""
        own = Queries(found.calls, self._positions(found.segment.mask, found.hidden.device))
        match = Match(
            self._queries(found, (old, new), own), found.cache, self._layout.first_position,
            adaptive=self._layout.is_adaptive,
            relative=self._layout.is_adaptive and self._reader.normalises_attention(),
        )  # fmt: skip
        segment, before = found.segment, found.before
        tokens_so_far = self._begun(segment, before) + self._fresh(segment) - before.pinned_slots()
        heads = sum(size.heads for size in found.cache.sizes)
        budget = Budget(self._layout, self._reader.windows(), heads)
        parts = list(budget.parts(old, new, match, torch.tensor(segment.ends), tokens_so_far))
        self.unmatched += match.unmatched
        return parts

    @torch.no_grad()
    def extended(self, segment: Segment, memory: Memory) -> Memory:
        """Read a segment behind a memory, and hold it with a slot for every token, whatever the budget is.

        Args:
            segment: A piece of A rows of a batch of B.
            memory: The memory of what comes before, of B rows.

        Returns:
            The memory after it.
        """
        for _, part in without_padding(segment):
            found = self.pass_over(part, memory)
            old, new = self._candidates(found)
            together = old.followed_by(new)
            memory = _replaced(found, [(range(len(part.rows)), together.within(int(together.counts.max())))])
        return memory

    def kind_of(self, segment: Segment, memory: Memory) -> tuple | None:
        """What the host has to know to read a segment: those of one kind differ in tokens and states alone.

        Args:
            segment: The segment.
            memory: The memory before it.

        Returns:
            Something to compare; None: there is nothing to write, the segment has not all rows or is padded, or
            something is decided on the host, such as what will be asked of it.
        """
        whole = len(segment.rows) == len(memory) and segment.mask.all()
        if not segment.writes or not whole or "pairs" in self.query_kinds:
            return None
        # The host asks for the largest position, a pass is read in parts, or attention says how many slots heads have.
        if depends_on_pass(self._reader.decoder) or memory.carried is not None or self._layout.is_adaptive:
            return None
        assert memory.slots is not None, "see MemoryLayout.writer"
        fresh = self._fresh(segment)
        numbers = (fresh, self._newly_pinned(segment, memory, fresh), memory.pinned_slots(), memory.slots)
        ends = segment.ends if self._layout.waits else ()
        return segment.ids.shape, ends, memory.states.shape, *(tuple(some.tolist()) for some in numbers)

    def finish(self) -> None:
        """Warn if values could not be matched since the last call. Synchronises with the device."""
        unmatched, self.unmatched = self.unmatched, []
        if unmatched and bool(torch.stack(unmatched).any()):
            warnings.warn(
                "some heads' values could not be matched (the equations are singular, or not finite), and stay what "
                "they were",
                stacklevel=2,
            )

    def _positions(self, mask, device):
        """Positions of a pass's tokens, int32 `[A, T]`, -1 in padding: on a device, of a mask on the CPU."""
        positions = self._layout.first_position + mask.cumsum(1) - 1
        return uploaded(torch.where(mask > 0, positions, -1).to(torch.int32), device)

    def _candidates(self, found):
        """The slots so far, and those of the segment's tokens, without the tokens that will be read again."""
        segment, before, mask = found.segment, found.before, found.segment.mask
        states = found.cache.captured() if found.states is None else found.states
        lengths, fresh = mask.sum(1), self._fresh(segment)
        offsets = torch.arange(mask.shape[1]) - (mask.shape[1] - lengths)[:, None]
        exists = (offsets >= 0) & (offsets < fresh[:, None])
        ages = uploaded(torch.where(exists, fresh[:, None] - offsets, -1), states.device)
        layers, _, _, heads, _, _ = states.shape
        ages, pinned = ages[None, :, None].expand(layers, -1, heads, -1), self._newly_pinned(segment, before, fresh)
        if self._layout.is_adaptive:  # what fills up layers with fewer heads than others has no slots
            filling = torch.arange(heads) >= torch.tensor([size.heads for size in found.cache.sizes])[:, None]
            ages = ages.masked_fill(uploaded(filling, ages.device)[:, None, :, None], -1)
        new = Slots(states, ages, exists, pinned)
        return slots_of(before, fresh), new

    def _newly_pinned(self, segment, before, fresh):
        """How many of the tokens that will not be read again are pinned ones, int64 `[A]`."""
        unread = before.pinned_slots() - self._begun(segment, before)  # pinned tokens from the first one on
        return torch.minimum(unread.clamp_min(0), fresh)

    def _begun(self, segment, before):
        """How many tokens of each row stand before those that a pass over a segment reads, int64 `[A]`."""
        starts = segment.places[:, -1] + 1 - segment.mask.sum(1)
        carried = torch.stack([torch.tensor(list(map(len, ids))) for ids in (before.recent, before.unfinished)]).sum(0)
        return before.tokens_seen - carried + starts

    def _queries(self, passed, slots, own):
        """The queries that the memory is matched to; `own` are those of the pass that has read the segment."""
        segment, found = passed.segment, [own] if "own" in self.query_kinds else []
        if self.query_kinds != ["own"]:
            whole = self._whole(passed, *slots)
            if "reread" in self.query_kinds:
                everyone = torch.ones(len(whole), dtype=torch.bool)
                found.append(self._asked([(segment.ids, segment.mask, everyone)], whole))
            if "pairs" in self.query_kinds:
                found += self._asked_questions(segment, whole, own)
        return joined(found)

    def _whole(self, passed, old, new):
        """The memory of the rows that were read, with a slot for every token of the segment."""
        before, together = passed.before, old.followed_by(new)
        together = together.within(int(together.counts.max()))
        whole = replaced(before, range(len(before)), [(range(len(before)), together)])
        return dataclasses.replace(whole, carried=passed.carried)

    def _asked(self, texts, whole):
        """Queries of texts that are read, each alone, behind all that there is to be held.

        texts: (ids, mask, exists) each: int64 `[A, T]` twice, and which rows the text is of, bool `[A]`.
        """
        reader, found = self._reader, []
        cache = reader.read(reader.new_cache(keep=False, adapted_tokens=self._adapted_tokens), whole)
        for ids, mask, exists in texts:
            embeddings = reader.embeddings_of(ids)
            _, calls = self._decoded(embeddings, mask, cache, ids)
            positions = self._positions(mask * exists[:, None], embeddings.device)
            found.append(Queries(calls, positions))
        return joined(found)

    def _asked_questions(self, segment, whole, own):
        """Queries of what will be asked of a segment, and for rows without a question the segment's own: a list."""
        assert self._questions_of is not None, "see pass_over"
        fresh = [
            ids[mask > 0][: int(count)]
            for ids, mask, count in zip(segment.ids, segment.mask, self._fresh(segment), strict=True)
        ]
        asked = [list(self._questions_of(ids)) for ids in fresh]
        has_some = torch.tensor([bool(row) for row in asked])
        texts = []
        for place in range(max(map(len, asked))):
            # A row without such a question reads another text in its place, whose queries do not count.
            rows = [
                row[place] if place < len(row) else (row or [ids[:1]])[0]
                for row, ids in zip(asked, segment.ids, strict=True)
            ]
            width = max(map(len, rows))
            ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
            for index, row in enumerate(rows):
                ids[index, width - len(row) :], mask[index, width - len(row) :] = row, 1
            texts.append((ids, mask, torch.tensor([place < len(row) for row in asked])))
        found = [self._asked(texts, whole)] if texts else []
        if not bool(has_some.all()) and "own" not in self.query_kinds:
            hidden = uploaded(has_some, own.positions.device)[:, None]
            found.append(Queries(own.calls, own.positions.masked_fill(hidden, -1)))
        return found

    def _fresh(self, segment):
        """How many tokens of each row, the first ones, will not be read again with the next segment."""
        lengths = segment.mask.sum(1)
        ends = segment.places[:, -1] + 1
        return torch.maximum(ends - self._layout.segment_overlap, ends - lengths) - (ends - lengths)


def _replaced(found, parts):
    """The memory after a pass, of all rows: with these slots, and the states of recurrent layers."""
    rows, after = found.segment.rows, replaced(found.memory, found.segment.rows, parts)
    if found.carried is None or after.carried is None:
        return after
    return dataclasses.replace(after, carried=replaced_states(after.carried, rows, found.carried))
