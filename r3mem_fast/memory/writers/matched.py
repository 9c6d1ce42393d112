"""Matched memories: few keys of a segment, with values that give the attention to all of them; no training.

Attention Matching (arXiv 2602.16284), by layer and key head. Of the keys K with values V that are to be held, at the
positions where the next segment will find them, the queries Q of the pass that read the segment keep the keys with the
largest root mean square attention, and get new values for them in closed form, by ridge regression:

    a = softmax(Q K^T),  y = a V,  X = softmax(Q K_kept^T)
    V_new = V_kept + (X^T X + lambda I)^-1 X^T (y - X V_kept)

A pass begins at the same position however long the history is, so the queries of this one ask from where the next one
will ask; keys keep their distances, up to the layout's reach.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch

from r3mem_fast.kernels.matching import attention_scores, value_system

from ...integrations.capture import AttentionCall, captured_attention
from ..cache import PrefixCache
from ..memory import Memory
from ..reader import MemoryReader
from ..segments import Segment

# Ridge, as a share of the largest eigenvalue.
_RIDGE = 1e-3


class Slots(NamedTuple):
    """Keys and values of some rows, with the places where they stand. Those that do not exist come first.

    Attributes:
        states: Keys without positions, and values, `[layers, 2, A, kv_heads, N, head_dim]`.
        ages: Tokens to the first token behind them, int64 `[layers, A, kv_heads, N]`; -1 where there is no slot.
        counts: Slots of each row, int64 `[A]`, on the CPU.
    """

    states: torch.Tensor
    ages: torch.Tensor
    counts: torch.Tensor

    def rows(self, rows: Sequence[int]) -> "Slots":
        """The slots of some rows."""
        chosen = torch.as_tensor(rows, dtype=torch.int64)
        index = chosen.to(self.ages.device)
        return Slots(self.states.index_select(2, index), self.ages.index_select(1, index), self.counts[chosen])

    def followed_by(self, others: "Slots") -> "Slots":
        """These slots and, behind them, others of the same rows; those that exist may have gaps between them."""
        states, ages = torch.cat([self.states, others.states], 4), torch.cat([self.ages, others.ages], 3)
        return Slots(states, ages, self.counts + others.counts)

    def kept(self, places: torch.Tensor) -> "Slots":
        """The slots at some places, the same for all layers and heads.

        Args:
            places: int64 `[A, n]`, on the CPU; -1 for none. Those come first.
        """
        layers, _, _, heads, _, width = self.states.shape
        index = places.clamp_min(0).to(self.ages.device)
        missing = (places < 0).to(self.ages.device)[None, :, None]
        states = self.states.gather(4, index[None, None, :, None, :, None].expand(layers, 2, -1, heads, -1, width))
        ages = self.ages.gather(3, index[None, :, None].expand(layers, -1, heads, -1)).masked_fill(missing, -1)
        return Slots(states, ages, (places >= 0).sum(1))


class MatchedWriter:
    """Writes matched memories, in the layout of its reader.

    Args:
        reader: Reads memories with the model's decoder.
    """

    def __init__(self, reader: MemoryReader):
        self._reader, self._layout = reader, reader.layout

    @torch.no_grad()
    def read(self, segment: Segment, memory: Memory) -> tuple[torch.Tensor, Memory]:
        """Read a segment behind a memory, and match its keys and values if the segment asks for it.

        Args:
            segment: A piece of A rows of a batch of B.
            memory: The memory of what comes before, of B rows.

        Returns:
            The segment's last hidden states, `[A, n, hidden_size]`, and the memory after it.

        Raises:
            ValueError: The memory is beyond its budget, and that is to be an error.
        """
        rows = list(segment.rows)
        before = memory.rows(rows) if len(rows) < len(memory) else memory
        reader = self._reader
        embeddings = reader.embeddings_of(segment.ids)
        mask = segment.mask.to(embeddings.device)
        cache = reader.new_cache(keep=False, capture=mask.shape[1] if segment.writes else 0)
        reader.read(cache, before)
        if not segment.writes:
            return reader.decode(embeddings, mask, cache), memory
        with captured_attention(reader.decoder.config) as calls:
            hidden = reader.decode(embeddings, mask, cache)
        if missing := sorted(set(range(len(before.states))) - calls.keys()):
            raise ValueError(
                f"the attention of layers {missing} of a {type(reader.decoder).__name__} is none of transformers' "
                "interchangeable functions, so no memory can be matched to it; let memory tokens learn "
                '(memory_writer="tokens")'
            )
        return hidden, replaced(memory, rows, self._written(before, segment, cache, calls))

    def _written(self, before, segment, cache, calls):
        """Slots of the segment's rows after it."""
        layout, first = self._layout, self._layout.first_position
        lengths = segment.mask.sum(1)
        # The overlap at the end of the segment stays raw, because the next segment reads it again.
        ends = segment.places[:, -1] + 1
        starts = ends - lengths
        fresh = torch.maximum(ends - layout.segment_overlap, starts) - starts
        offsets = torch.arange(segment.mask.shape[1]) - (segment.mask.shape[1] - lengths)[:, None]
        queries = torch.where(offsets >= 0, first + offsets, -1)
        old = slots_of(before, fresh)
        new = self._candidates(cache.captured(), offsets, fresh)
        match = _Match(calls, cache, queries.to(new.ages.device, torch.int32), first)

        gained = new.counts.clamp_max(layout.num_memory_tokens)
        beyond = old.counts + gained > layout.budget
        if layout.beyond_budget == "error" and bool(beyond.any()):
            raise ValueError(
                f"a memory has {int((old.counts + gained).max())} slots, and its budget is {layout.budget}: raise the "
                'budget (memory_budget), or choose beyond_budget="rematch" or "forget"'
            )
        together = beyond & (layout.beyond_budget == "rematch")
        parts = []
        for joint in (True, False):
            chosen = torch.nonzero(together if joint else ~together)[:, 0].tolist()
            if not chosen:
                continue
            some_old, some_new = old.rows(chosen), new.rows(chosen)
            if joint:
                found = match(some_old.followed_by(some_new), layout.budget, chosen)
            else:
                found = some_old.followed_by(match(some_new, layout.num_memory_tokens, chosen))
                found = found.kept(_places(found, layout.budget))
            parts.append((chosen, found))
        return parts

    def _candidates(self, states, offsets, fresh):
        """What a segment has to be held: its tokens but those that will be read again."""
        exists = (offsets >= 0) & (offsets < fresh[:, None])
        ages = torch.where(exists, fresh[:, None] - offsets, -1).to(states.device)
        layers, _, _, heads, _, _ = states.shape
        return Slots(states, ages[None, :, None].expand(layers, -1, heads, -1), fresh)


class _Match:
    """Matches slots to the queries of one pass.

    Args:
        calls: The attention of each layer in the pass.
        cache: The cache of the pass, which knows how keys are rotated.
        queries: Positions of the pass's queries, int32 `[A, T]`, -1 for padding.
        first: Position of a pass's first token.
    """

    def __init__(self, calls: dict[int, AttentionCall], cache: PrefixCache, queries: torch.Tensor, first: int):
        self._calls, self._cache, self._queries, self._first = calls, cache, queries, first

    def __call__(self, slots: Slots, limit: int, rows: Sequence[int]) -> Slots:
        """Keep `limit` slots at most of each row, by layer and head, with new values.

        Args:
            slots: Slots of some rows of the pass.
            limit: How many of them stay.
            rows: These rows.
        """
        layers, _, _, _, count, _ = slots.states.shape
        if count == 0:
            return slots
        positions = torch.where(slots.ages >= 0, (self._first - slots.ages).clamp_min(0), -1)
        keys = [
            self._cache.placed(slots.states[index, 0], index, positions[index].clamp_min(0)) for index in range(layers)
        ]
        chosen = torch.as_tensor(rows, dtype=torch.int64, device=slots.ages.device)
        queries = self._queries[chosen]
        limit = min(limit, count)
        found_states: dict[int, torch.Tensor] = {}
        found_ages: dict[int, torch.Tensor] = {}
        for group in self._groups(layers):
            calls = [self._calls[index] for index in group]
            settings = calls[0].settings
            asked = torch.cat([call.query[chosen] for call in calls]).to(slots.states.dtype)
            key = torch.cat([keys[index] for index in group])
            value = torch.cat([slots.states[index, 1] for index in group])
            where = {
                "query_positions": queries.repeat(len(group), 1),
                "key_positions": torch.cat([positions[index] for index in group]).to(torch.int32),
            }
            scores, _, target = attention_scores(asked, key, value, **where, **settings)
            places = best_places(scores, where["key_positions"], limit)
            wide = places[..., None].expand(-1, -1, -1, key.shape[-1])
            kept = {**where, "key_positions": where["key_positions"].gather(2, places)}
            values = value.gather(2, wide)
            gram, residual = value_system(asked, key.gather(2, wide), values, target, **kept, **settings)
            # Where nothing is left out there is nothing to match.
            whole = (where["key_positions"] >= 0).sum(2, keepdim=True) <= limit
            change = solved(gram, residual).masked_fill(whole[..., None], 0)
            values = (values.float() + change).to(values.dtype)
            raw = torch.cat([slots.states[index, 0] for index in group]).gather(2, wide)
            kept_ages = torch.cat([slots.ages[index] for index in group]).gather(2, places)
            for place, index in enumerate(group):
                here = slice(place * len(rows), (place + 1) * len(rows))
                found_states[index] = torch.stack([raw[here], values[here]])
                found_ages[index] = kept_ages[here]
        states = torch.stack([found_states[index] for index in range(layers)])
        ages = torch.stack([found_ages[index] for index in range(layers)])
        return Slots(states, ages, slots.counts.clamp_max(limit))

    def _groups(self, layers):
        """Layers whose attention has the same settings; those with sinks of their own one by one."""
        groups: dict[tuple, list[int]] = {}
        for index in range(layers):
            call = self._calls[index]
            alike = (call.scale, call.softcap, call.window, None if call.sinks is None else index)
            groups.setdefault(alike, []).append(index)
        return list(groups.values())


def slots_of(memory: Memory, moved: torch.Tensor) -> Slots:
    """A memory's slots, seen from some tokens later.

    Args:
        memory: A matched memory.
        moved: How many tokens later, by row, int64 `[B]`, on the CPU.
    """
    assert memory.ages is not None and memory.slots is not None, "see MemoryLayout.writer"
    visible = memory.visible()[None, :, None]
    ages = (memory.ages.long() + moved.to(memory.device)[None, :, None, None]).clamp_max(memory.layout.reach)
    return Slots(memory.states, torch.where(visible, ages, -1), memory.slots)


def replaced(memory: Memory, rows: Sequence[int], parts: Sequence[tuple[Sequence[int], Slots]]) -> Memory:
    """A memory with other slots for some rows.

    Args:
        memory: The memory of B rows.
        rows: Its rows that have other slots.
        parts: The slots, in parts: places in `rows`, and the slots of these.
    """
    assert memory.ages is not None and memory.slots is not None, "see MemoryLayout.writer"
    counts = memory.slots.clone()
    for places, found in parts:
        counts[[rows[place] for place in places]] = found.counts
    width = int(counts.max())
    layers, _, batch, heads, _, size = memory.states.shape
    states = memory.states.new_zeros(layers, 2, batch, heads, width, size)
    ages = memory.ages.new_zeros(layers, batch, heads, width)
    last = min(width, memory.states.shape[4])
    if last:
        states[..., width - last :, :] = memory.states[..., memory.states.shape[4] - last :, :]
        ages[..., width - last :] = memory.ages[..., memory.ages.shape[3] - last :]
    for places, found in parts:
        index = torch.as_tensor([rows[place] for place in places], device=memory.device)
        last = min(width, found.states.shape[4])
        states[:, :, index] = 0
        ages[:, index] = 0
        if last:
            start = found.states.shape[4] - last
            states[:, :, index, :, width - last :] = found.states[:, :, :, :, start:].to(states.dtype)
            ages[:, index, :, width - last :] = found.ages[..., start:].clamp_min(0).to(ages.dtype)
    return dataclasses.replace(memory, states=states, ages=ages, slots=counts)


def _places(slots, budget):
    """Places of the slots of each row that stay within a budget, int64 `[A, n]`: the oldest one, and the youngest."""
    exists = (slots.ages[0, :, 0] >= 0).cpu()
    rows = []
    for row in exists:
        places = torch.nonzero(row)[:, 0]
        # Attention rests on a text's first token, whatever is asked: without it all other weights would be wrong.
        rows.append(places if len(places) <= budget else torch.cat([places[:1], places[len(places) - budget + 1 :]]))
    width = max(map(len, rows))
    return torch.stack([torch.nn.functional.pad(places, (width - len(places), 0), value=-1) for places in rows])


def best_places(scores: torch.Tensor, positions: torch.Tensor, limit: int) -> torch.Tensor:
    """Places of the keys with the largest scores, in the order of their positions.

    Args:
        scores: Squared attention of each key, `[B, kv_heads, S]`.
        positions: Positions of the keys, int32 `[B, kv_heads, S]`; -1 where there is none.
        limit: Number of places.

    Returns:
        int64 `[B, kv_heads, limit]`.
    """
    places = scores.masked_fill(positions < 0, -1).topk(limit, -1).indices
    order = positions.gather(2, places).sort(dim=-1, stable=True).indices
    return places.gather(2, order)


def solved(gram: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Solve for the change of kept values by ridge regression; zero where the equations cannot be solved.

    Args:
        gram: `X^T X`, `[B, kv_heads, t, t]`.
        residual: `X^T (y - X V)`, `[B, kv_heads, t, head_dim]`.

    Returns:
        float32, the shape of `residual`.
    """
    eye = torch.eye(gram.shape[-1], dtype=torch.float32, device=gram.device)
    finite = gram.isfinite().all(-1).all(-1)[..., None, None]
    gram = torch.where(finite, gram.float(), eye)
    largest = torch.linalg.eigvalsh(gram)[..., -1, None, None]
    ridge = _RIDGE * largest + torch.finfo(gram.dtype).tiny
    factor, failed = torch.linalg.cholesky_ex(gram + ridge * eye)
    change = torch.cholesky_solve(residual.float(), factor)
    right = finite & (failed == 0)[..., None, None] & change.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    if not bool(right.all()):
        warnings.warn(
            "some heads' values could not be matched (the equations are singular, or not finite), and stay what they "
            "were",
            stacklevel=2,
        )
    return torch.where(right, change, 0.0)
