"""Matches slots to queries: few keys, moved a little, with values that give the attention to all of them.

Attention Matching (arXiv 2602.16284), by layer and key head. Of the keys K with values V that are to be held, at the
positions where they will be read, the queries Q keep the keys with the largest root mean square attention, and get new
values for them in closed form, by ridge regression:

    a = softmax(Q K^T),  y = a V,  X = softmax(Q K_kept^T)
    G = X^T X,  V_new = V_kept + (G + lambda (diag G + epsilon mean diag G))^-1 X^T (y - X V_kept)

The ridge of a key grows with what it is asked for: one that stands alone takes over 1 / (1 + lambda) of what it lacks.
(The paper's is the same for all keys, so that the one that is asked for most, often the first, says how far all others
may move. Epsilon keeps those that are hardly asked for from large values that no query has tried.)

Other tokens share the softmax with the slots, and beside them the kept keys would weigh less than all keys did. The
paper adds a bias to their logits. A memory is keys and values alone; but the queries of a head have a large part in
common, so that the bias can be put into the keys: they move along the direction d by which all queries gain nearly the
same, by as much as the queries miss on average,

    d = argmin |scale Q d - 1|^2 + ridge,  K_new = K_kept + d mean(logsumexp(Q K^T) - logsumexp(Q K_kept^T))

Pinned keys, and sinks, do not move; what they have counts as kept. Values are matched before the move, which changes
nothing among the keys that move. It is right where the queries stood: as slots grow older, rotation turns d away from
what queries have in common, and the bias fades.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from r3mem_fast.kernels.matching import MAX_KEPT, attention_scores, value_system

from ...integrations.capture import AttentionCall
from ..cache import PrefixCache
from ..sizes import padded
from ..slots import Slots
from ..states import uploaded
from .allocation import best_places, of_like_width, shared_places
from .equations import move_for_mass, solved, without

# Bytes of the equations that are held at once.
_BYTES = 2**28


class Queries:
    """Queries of each layer, at the positions from where they ask.

    Args:
        calls: The attention of each layer in a pass.
        positions: Positions of the pass's queries, int32 `[A, T]`, -1 for those that do not exist.
    """

    def __init__(self, calls: Mapping[int, AttentionCall], positions: torch.Tensor):
        self.calls, self.positions = calls, positions


def joined(queries: Sequence[Queries]) -> Queries:
    """Join queries of the same rows.

    Args:
        queries: One at least.
    """
    if len(queries) == 1:
        return queries[0]
    calls = joined_calls([some.calls for some in queries])
    return Queries(calls, torch.cat([some.positions for some in queries], 1))


def joined_calls(parts: Sequence[Mapping[int, AttentionCall]]) -> dict[int, AttentionCall]:
    """Join the queries of the same rows in several calls, one behind the other.

    Args:
        parts: The attention of each layer in a pass, of one pass at least.
    """
    return {
        index: call._replace(query=torch.cat([some[index].query for some in parts], 2))
        for index, call in parts[0].items()
    }


def asked_of_slots(calls: dict[int, AttentionCall], cache: PrefixCache) -> dict[int, AttentionCall]:
    """Queries by the place of the layer whose keys they ask, among those that have some.

    Where layers read the keys of another one, their queries are more heads of that layer's.

    Args:
        calls: What each layer's attention was called with, by the layer that asks.
        cache: The cache of the pass.
    """
    found = {}
    for place, (source, size) in enumerate(zip(cache.keyed, cache.sizes, strict=True)):
        readers = [calls[index].query for index, other in enumerate(cache.key_sources) if other == source]
        found[place] = calls[source]
        if len(readers) > 1:
            by_key_head = torch.cat([query.unflatten(1, (size.heads, -1)) for query in readers], 2)
            found[place] = calls[source]._replace(query=by_key_head.flatten(1, 2))
    return found


class Match:
    """Matches slots to queries.

    Args:
        queries: The queries, of A rows.
        cache: A cache of the pass that read the slots' tokens, which knows how keys are rotated.
        first: Position of the first token behind the slots.
        adaptive: Whether heads share the slots of all layers; otherwise each has as many.
        relative: Whether a layer's keys then count as shares of what its attention gives.

    Attributes:
        unmatched: For each group of equations whether some could not be solved: bool, on the device.
    """

    def __init__(
        self, queries: Queries, cache: PrefixCache, first: int, *, adaptive: bool = False, relative: bool = False
    ):
        self._queries, self._cache, self._first = queries, cache, first
        self._adaptive, self._relative = adaptive, relative
        self.unmatched: list[torch.Tensor] = []

    @torch.no_grad()
    def __call__(self, slots: Slots, limit: int, rows: Sequence[int]) -> Slots:
        """Keep `limit` slots at most of each row, beside the pinned ones, by layer and head, with new values.

        Args:
            slots: Slots of some rows, all of which have as many pinned ones.
            limit: How many of them stay; of a head on average, with adaptive allocation.
            rows: These rows, of the A.
        """
        layers, _, _, heads, count, _ = slots.states.shape
        pinned = int(slots.pinned[0])
        if int(slots.counts.max()) <= limit + pinned:  # nothing is left out
            return slots.packed() if self._adaptive else slots.within(limit)
        limit = min(limit + pinned, count)
        chosen = uploaded(torch.as_tensor(rows, dtype=torch.int64), slots.ages.device)
        if self._adaptive:
            return self._shared(slots, limit, chosen)
        found: dict[int, tuple[torch.Tensor, ...]] = {}
        for group in self._groups(layers, len(rows) * heads * 4 * limit**2):
            parts = (part.chunk(len(group)) for part in self._of_layers(group, slots, limit, chosen))
            found |= dict(zip(group, zip(*parts, strict=True), strict=True))
        states = torch.stack([found[layer][part] for layer in range(layers) for part in (0, 1)]).unflatten(0, (-1, 2))
        ages = torch.stack([found[layer][2] for layer in range(layers)])
        exists = torch.arange(limit) >= (limit - slots.counts)[:, None]
        return Slots(states, ages, exists, slots.pinned)

    def _shared(self, slots, limit, chosen):
        """Keep slots wherever most is asked of them, in all layers and heads; see `_of_layers` for the arguments."""
        if self._cache.carrier:
            raise ValueError(
                'heads of this model share latents, and so as many slots: use memory_allocation="uniform"'
            )
        layers, _, rows, heads, count, _ = slots.states.shape
        groups = self._groups(layers, rows * heads * 4 * limit**2)
        asked = {layer: (group, at) for group in groups for at, layer in enumerate(group)}
        scored = {group[0]: self._scored(group, slots, chosen) for group in groups}
        weights = slots.states.new_full((layers, rows, heads, count), -1, dtype=torch.float32)
        for layer, (group, at) in asked.items():
            some = scored[group[0]]
            weight = some.scores * some.value.float().square().sum(-1)
            if self._relative:
                given = some.target.float().square().sum((1, 2, 3)).clamp_min(torch.finfo(torch.float32).tiny)
                weight = weight / given[:, None, None]
            weight = weight.masked_fill(some.positions < 0, -1).masked_fill(some.pinned, torch.inf)
            weights[layer, :, : weight.shape[1]] = weight.chunk(len(group))[at]
        stays = shared_places(weights, limit - int(slots.pinned[0]), self._widest(count))
        found: dict[int, list[torch.Tensor]] = {}
        for group in groups:
            some = scored.pop(group[0])
            of_group = torch.stack([stays[layer, :, : some.scores.shape[1]] for layer in group])
            # Layers whose heads have few slots have small equations.
            for alike in of_like_width(of_group.sum(-1).amax((1, 2)).tolist()):
                index, here = uploaded(torch.tensor(alike), of_group.device), [group[place] for place in alike]
                of_here = of_group[index].flatten(0, 1)
                # Those that stay come last, in their order.
                places = of_here.to(torch.int8).sort(dim=-1, stable=True).indices
                places = places[..., count - int(of_here.sum(-1).max()) :]
                asked_here = some.of_layers(index, len(group))
                kept = self._kept(here, asked_here, places, of_here.gather(2, places), slots)
                found |= {
                    layer: list(parts) for layer, *parts in zip(here, *(p.chunk(len(here)) for p in kept), strict=True)
                }
        width = max(parts[2].shape[-1] for parts in found.values())
        for parts in found.values():
            missing = width - parts[2].shape[-1]
            parts[:2] = (torch.nn.functional.pad(part, (0, 0, missing, 0)) for part in parts[:2])
            parts[2] = torch.nn.functional.pad(parts[2], (missing, 0), value=-1)
        states = torch.stack([found[layer][part] for layer in range(layers) for part in (0, 1)]).unflatten(0, (-1, 2))
        ages = torch.stack([found[layer][2] for layer in range(layers)])
        return Slots(states, ages, torch.ones(rows, width, dtype=torch.bool), slots.pinned).packed()

    def _widest(self, count):
        """Slots of a head at most, of `count`.

        Where some layers have windows, those that see everything may keep more than can be matched.
        """
        windows = {call.window for call in self._queries.calls.values()}
        return count if None in windows and len(windows) > 1 else MAX_KEPT

    def _of_layers(self, group, slots, limit, chosen):
        """Keys, values and ages of the slots that stay in some layers, whose rows follow one another, layer by layer.

        limit counts pinned slots, too; chosen are the places of the rows among the queries', int64 `[A]`.
        """
        if self._cache.carrier:
            return self._kept_latents(group[0], slots, limit, chosen)
        some = self._scored(group, slots, chosen)
        places = best_places(some.scores.masked_fill(some.pinned, torch.inf), some.positions, limit)
        return self._kept(group, some, places, some.positions.gather(2, places) >= 0, slots)

    def _scored(self, group, slots, chosen):
        """The keys of some layers, and what is asked of them; see `_of_layers` for the arguments."""
        calls = self._queries.calls
        settings = calls[group[0]].settings
        size = self._cache.sizes[group[0]]
        ages = torch.cat([slots.ages[layer, :, : size.heads] for layer in group])
        positions = torch.where(ages >= 0, (self._first - ages).clamp_min(0), -1).to(torch.int32)
        raw, value = (
            torch.cat([slots.states[layer, part, :, : size.heads, :, : size.width] for layer in group])
            for part in (0, 1)
        )
        key = self._turned(self._cache.placed, raw, group, positions)
        query = torch.cat([calls[layer].query[chosen] for layer in group]).to(raw.dtype)
        query = padded(query, query.shape[1], size.width)
        asked_from = self._queries.positions[chosen].repeat(len(group), 1)
        where = {"query_positions": asked_from, "key_positions": positions}
        scores, lse, target = attention_scores(query, key, value, **where, **settings)
        exists = ages >= 0
        pinned = exists & (exists.cumsum(-1) <= int(slots.pinned[0]))
        return _Asked(query, asked_from, key, raw, value, ages, positions, pinned, scores, lse, target)

    def _kept(self, group, asked, places, stays, slots):
        """Keys, values and ages of slots that are kept, with new values unless a head has too many; of some layers.

        Args:
            group: The layers.
            asked: Their keys, and what is asked of them, from `_scored`.
            places: Places of the slots, int64 `[layers * A, kv_heads, n]`.
            stays: Which of them stay; the others are none, bool, of the same shape.
            slots: The slots.
        """
        heads, width = slots.states.shape[3::2]
        index = places[..., None].expand(-1, -1, -1, asked.key.shape[-1])
        raw, value = asked.raw.gather(2, index), asked.value.gather(2, index)
        # Those that stay come last: what can be matched of a head, if it is no more than that, has these columns.
        first = max(0, places.shape[-1] - MAX_KEPT)
        kept = asked.positions.gather(2, places).masked_fill(~stays, -1)
        number = (kept >= 0).sum(2, keepdim=True)
        # Where nothing is left out there is nothing to match.
        changes = ((asked.ages >= 0).sum(2, keepdim=True) > number) & (number <= MAX_KEPT)
        pinned = asked.pinned.gather(2, places) & stays
        if not self._adaptive or bool(changes.any()):
            kept = kept[..., first:].masked_fill(number > MAX_KEPT, -1)
            more = self._changes(
                group, asked, index[:, :, first:], value[:, :, first:], kept, pinned[..., first:], changes
            )
            raw, value = (
                part.float() + torch.nn.functional.pad(added, (0, 0, first, 0))
                for part, added in zip((raw, value), more, strict=True)
            )
        ages = asked.ages.gather(2, places).masked_fill(~stays, -1)
        # A layer with fewer heads than others is filled up: with the first head's ages, or with no slots.
        more = ages[:, :1].expand(-1, heads - ages.shape[1], -1)
        ages = torch.cat([ages, torch.full_like(more, -1) if self._adaptive else more], 1)
        return *(padded(some.to(slots.states.dtype), heads, width) for some in (raw, value)), ages

    def _changes(self, group, asked, index, value, kept, pinned, changes):
        """What is added to the keys and the values of slots.

        Args:
            group: The layers.
            asked: Their keys, and what is asked of them.
            index: Places of the slots, an index of keys.
            value: Their values.
            kept: Positions of the slots; -1 for none.
            pinned: Which of them are pinned.
            changes: The heads whose slots are matched, bool.
        """
        settings = self._queries.calls[group[0]].settings
        where = {"query_positions": asked.query_positions, "key_positions": kept}
        key = asked.key.gather(2, index)
        gram, residual, kept_lse = value_system(asked.query, key, value, asked.target, **where, **settings)
        gram, residual = without(gram, residual, pinned)
        change, right = solved(gram, residual)
        self.unmatched.append(~right.all())
        move = move_for_mass(asked.query, asked.lse - kept_lse, asked.key.shape[1], settings["scale"])
        move = self._turned(self._cache.unplaced, move[:, :, None].expand(index.shape), group, kept)
        fixed = (pinned | ~changes)[..., None]
        return move.masked_fill(fixed, 0), change.masked_fill(fixed, 0)

    def _kept_latents(self, layer, slots, limit, chosen):
        """What `_of_layers` returns, of a layer with latent attention: the slots that are asked for most, as they are.

        Keys and values are made of one latent, so that no value can be matched without its key.
        """
        call = self._queries.calls[layer]
        if call.expanded is None:
            raise ValueError(
                "a cache of this model keeps latents, and its attention has no expand_kv that would make keys of "
                'them, so no memory can be matched to it; let memory tokens learn (memory_writer="tokens")'
            )
        size, states, ages = self._cache.sizes[layer], slots.states[layer], slots.ages[layer]
        positions = torch.where(ages >= 0, (self._first - ages).clamp_min(0), -1).to(torch.int32)
        turned = self._turned(self._cache.placed, states[1], [layer], positions)
        key, value = call.expanded(size.key(states[0]), size.value(turned))
        width = max(key.shape[-1], value.shape[-1])
        query, key, value = (padded(some, some.shape[1], width) for some in (call.query[chosen], key, value))
        query = query.to(key.dtype)
        asked = {"query_positions": self._queries.positions[chosen], **call.settings}
        every = positions.expand(-1, key.shape[1], -1).contiguous()
        scores = attention_scores(query, key, value, key_positions=every, **asked)[0].sum(1, keepdim=True)
        exists = ages >= 0
        pinned = exists & (exists.cumsum(-1) <= int(slots.pinned[0]))
        places = best_places(scores.masked_fill(pinned, torch.inf), positions, limit)
        wide = places[..., None].expand(-1, -1, -1, states.shape[-1])
        return states[0].gather(2, wide), states[1].gather(2, wide), ages.gather(2, places)

    def _turned(self, turn, keys, group, positions):
        """Turn the keys of some layers to positions, or back: turn is a method of the cache."""
        by_layer = (len(group), -1)
        return turn(keys.unflatten(0, by_layer), group, positions.clamp_min(0).long().unflatten(0, by_layer)).flatten(
            0, 1
        )

    def _groups(self, layers, nbytes):
        """Layers that are matched at once: of the same settings, and of so many bytes each; with sinks one by one."""
        groups: dict[tuple, list[int]] = {}
        for index in range(layers):
            call = self._queries.calls[index]
            own = None if call.sinks is None and not self._cache.carrier else index
            # Layers that others read have more queries than those that read themselves alone.
            alike = (call.scale, call.softcap, call.window, own, self._cache.sizes[index], call.query.shape[1])
            groups.setdefault(alike, []).append(index)
        size = max(1, _BYTES // nbytes)
        return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


class _Asked(NamedTuple):
    """Keys of some layers, whose rows follow one another, and what is asked of them.

    Attributes:
        query: Queries, `[B, H, n, D]`.
        query_positions: Their positions, int32 `[B, n]`.
        key: Keys at their positions, `[B, kv_heads, N, D]`.
        raw: Keys without positions.
        value: Values.
        ages: See `Slots`, `[B, kv_heads, N]`.
        positions: Positions of the keys, int32; -1 where there is none.
        pinned: Which of them are pinned, bool.
        scores: Squared attention of each key.
        lse: Logarithm of all mass of each query, `[B, H, n]`.
        target: What attention to all keys gives, `[B, H, n, D]`.
    """

    query: torch.Tensor
    query_positions: torch.Tensor
    key: torch.Tensor
    raw: torch.Tensor
    value: torch.Tensor
    ages: torch.Tensor
    positions: torch.Tensor
    pinned: torch.Tensor
    scores: torch.Tensor
    lse: torch.Tensor
    target: torch.Tensor

    def of_layers(self, index: torch.Tensor, count: int) -> "_Asked":
        """The same of some of `count` layers, int64 `[n]`."""
        return _Asked(*(part.unflatten(0, (count, -1))[index].flatten(0, 1) for part in self))
