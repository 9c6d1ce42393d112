"""`Slots`: the keys and values of a matched memory while it is being written, with the places where they stand."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .memory import Memory
from .states import states_at, uploaded


class Slots(NamedTuple):
    """Keys and values of some rows, with the places where they stand. The oldest come first.

    Attributes:
        states: Keys without positions, and values, `[layers, 2, A, kv_heads, N, head_dim]`.
        ages: Tokens to the first token behind them, int64 `[layers, A, kv_heads, N]`; -1 where a head has no slot.
        exists: Which of them each row has, bool `[A, N]`, on the CPU. A head may have fewer (`up_to`,
            `seen_within`, `packed`).
        pinned: How many of them, the first ones, stay what they are, int64 `[A]`, on the CPU.
    """

    states: torch.Tensor
    ages: torch.Tensor
    exists: torch.Tensor
    pinned: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """Slots of each row, int64 `[A]`, on the CPU."""
        return self.exists.sum(1)

    def rows(self, rows: Sequence[int]) -> "Slots":
        """The slots of some rows; these very slots if the rows are all of them."""
        if list(rows) == list(range(len(self.exists))):  # all keys and values of a long history would be copied
            return self
        chosen = torch.as_tensor(rows, dtype=torch.int64)
        index = uploaded(chosen, self.ages.device)
        states, ages = self.states.index_select(2, index), self.ages.index_select(1, index)
        return Slots(states, ages, self.exists[chosen], self.pinned[chosen])

    def followed_by(self, others: "Slots") -> "Slots":
        """These slots and, behind them, others of the same rows; those that exist may have gaps between them.

        Args:
            others: The other slots. They may have pinned ones only if all of these are pinned.
        """
        states, ages = torch.cat([self.states, others.states], 4), torch.cat([self.ages, others.ages], 3)
        return Slots(states, ages, torch.cat([self.exists, others.exists], 1), self.pinned + others.pinned)

    def kept(self, places: torch.Tensor) -> "Slots":
        """The slots at some places, the same for all layers and heads.

        Args:
            places: int64 `[A, n]`, on the CPU; -1 for none, which come first. The pinned slots are among them.
        """
        layers, _, heads, _ = self.ages.shape
        index = uploaded(places, self.ages.device)[None, :, None].expand(layers, -1, heads, -1)
        ages = self.ages.gather(3, index.clamp_min(0)).masked_fill(index < 0, -1)
        return Slots(states_at(self.states, index.clamp_min(0)), ages, places >= 0, self.pinned)

    def up_to(self, age: int, least: int) -> "Slots":
        """The slots up to an age, pinned ones and the first; and older ones, where a head would have too few.

        Args:
            age: Largest age of a slot.
            least: Number of slots that each head keeps at least, if it has them.
        """
        exists = self.ages >= 0
        from_youngest = exists.flip(-1).cumsum(-1).flip(-1)
        first = exists.cumsum(-1) <= uploaded(self.pinned.clamp_min(1), exists.device)[None, :, None, None]
        stays = exists & ((self.ages <= age) | (from_youngest <= least) | first)
        return self._replace(ages=self.ages.masked_fill(~stays, -1))

    def seen_within(self, windows: Sequence[int | None]) -> "Slots":
        """The slots that a token behind them sees, and pinned ones.

        Args:
            windows: Number of keys that a query of each layer sees, its own included; None for all.
        """
        farthest = torch.tensor([torch.iinfo(torch.int64).max if window is None else window for window in windows])
        unseen = self._others() & (self.ages >= uploaded(farthest, self.ages.device)[:, None, None, None])
        return self._replace(ages=self.ages.masked_fill(unseen, -1))

    def within(self, budget: int) -> "Slots":
        """The slots that stay within a budget, without gaps: pinned ones, the oldest, and as many of the youngest.

        Args:
            budget: Slots of a row at most, beside the pinned ones.
        """
        rows = []
        for row, pinned in zip(self.exists, self.pinned.tolist(), strict=True):
            places = torch.nonzero(row)[:, 0]
            if len(places) > budget + pinned:
                # Attention rests on a text's first token, whatever is asked: without it all other weights are wrong.
                oldest = max(1, pinned)
                places = torch.cat([places[:oldest], places[len(places) - (budget + pinned - oldest) :]])
            rows.append(places)
        width = max(map(len, rows))
        return self.kept(torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=-1) for row in rows]))

    def filled(self, heads: int | None = None) -> torch.Tensor:
        """Slots that a head of each row has on average, without pinned ones, rounded up: int64 `[A]`, on the CPU.

        Args:
            heads: Number of heads of all layers; None: those that have a slot, which are all but for layers with
                windows, where it may be that no token sees any of theirs.
        """
        count = (self.ages >= 0).any(-1).sum((0, 2)).clamp_min(1) if heads is None else heads
        return (-(-self._others().sum((0, 2, 3)) // count)).cpu()

    def _others(self):
        """Where a head has a slot that is not pinned, bool, the shape of the ages."""
        exists = self.ages >= 0
        pinned = uploaded(self.pinned, exists.device)[None, :, None, None]
        return exists & (exists.cumsum(-1) > pinned)

    def packed(self) -> "Slots":
        """The same slots of heads that have other numbers of them: the pinned ones first, and the others at the end.

        Nothing stands where a head has fewer than another one, and no column is left that no head needs.
        """
        others = self._others()
        # A slot's order: pinned ones, nothing, the others.
        order = torch.where(others, 2, torch.where(self.ages >= 0, 0, 1)).sort(dim=-1, stable=True).indices
        width, most = order.shape[-1], others.sum(-1).amax((0, 2)).tolist()
        rows = [
            torch.cat([torch.arange(pinned), torch.arange(width - count, width)])
            for pinned, count in zip(self.pinned.tolist(), most, strict=True)
        ]
        widest = max(map(len, rows))
        columns = torch.stack([torch.nn.functional.pad(row, (widest - len(row), 0), value=-1) for row in rows])
        index = uploaded(columns, order.device)[None, :, None].expand(*order.shape[:3], -1)
        places = order.gather(3, index.clamp_min(0))
        ages = self.ages.gather(3, places).masked_fill(index < 0, -1)
        states = states_at(self.states, places)
        # In place: all keys and values of a long history have just been copied.
        return Slots(states.masked_fill_((ages < 0)[:, None, ..., None], 0), ages, columns >= 0, self.pinned)

    def youngest(self, budget: int) -> "Slots":
        """The slots that stay within a budget where heads have other numbers of them, packed.

        Pinned slots stay, and the first one of each head; of the others the youngest, whatever head they are of.

        Args:
            budget: Slots of a head on average, at most, beside the pinned ones.
        """
        if int(self.filled().max()) <= budget:
            return self.packed()
        others, exists = self._others(), self.ages >= 0
        first = exists & (exists.cumsum(-1) == 1)
        heads = exists.any(-1).sum((0, 2)).tolist()
        oldest = []
        for row, count in enumerate(heads):
            ages = self.ages[:, row][others[:, row] & ~first[:, row]]
            room = budget * count - int((others & first)[:, row].sum())
            # As many as there is room for are younger than this one.
            oldest.append(int(ages.sort().values[room]) if len(ages) > room else torch.iinfo(torch.int64).max)
        younger = self.ages < torch.tensor(oldest, device=self.ages.device)[None, :, None, None]
        return self._replace(ages=self.ages.masked_fill(others & ~first & ~younger, -1)).packed()


def slots_of(memory: Memory, moved: torch.Tensor) -> Slots:
    """A memory's slots, seen from some tokens later.

    Args:
        memory: A matched memory.
        moved: How many tokens later, by row, int64 `[B]`, on the CPU.
    """
    assert memory.ages is not None and memory.slots is not None, "see MemoryLayout.writer"
    visible = memory.visible_on_host()
    pinned = torch.minimum(memory.slots, memory.pinned_slots())
    # Pinned slots keep their order at the end of the reach, and stay before all others.
    oldest = memory.layout.reach - torch.minimum(visible.cumsum(1) - 1, pinned[:, None])
    # In one tensor, so that one copy goes to the device: where there is no slot, there is no oldest age.
    oldest = uploaded(torch.where(visible, oldest, -1), memory.device)[None, :, None]
    ages = torch.minimum(memory.ages.long() + uploaded(moved, memory.device)[None, :, None, None], oldest)
    if memory.layout.is_adaptive:
        ages = ages.masked_fill(memory.ages == 0, -1)
    return Slots(memory.states, ages, visible, pinned)


def replaced(memory: Memory, rows: Sequence[int], parts: Sequence[tuple[Sequence[int], Slots]]) -> Memory:
    """A memory with other slots for some rows.

    Args:
        memory: The memory of B rows.
        rows: Its rows that have other slots.
        parts: The slots, in parts: places in `rows`, and the slots of these, without gaps.
    """
    assert memory.ages is not None and memory.slots is not None, "see MemoryLayout.writer"
    if [rows[place] for places, _ in parts[:1] for place in places] == list(range(len(memory))):  # all rows, at once
        found = parts[0][1]
        states, ages = found.states.to(memory.states.dtype), found.ages.clamp_min(0).to(memory.ages.dtype)
        return dataclasses.replace(memory, states=states, ages=ages, slots=found.counts)
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
        index = uploaded(torch.as_tensor([rows[place] for place in places]), memory.device)
        last = min(width, found.states.shape[4])
        states[:, :, index] = 0
        ages[:, index] = 0
        if last:
            start = found.states.shape[4] - last
            states[:, :, index, :, width - last :] = found.states[..., start:, :].to(states.dtype)
            ages[:, index, :, width - last :] = found.ages[..., start:].clamp_min(0).to(ages.dtype)
    return dataclasses.replace(memory, states=states, ages=ages, slots=counts)


def slots_a_head(memory: Memory) -> int:
    """Slots that a head of a matched memory of one row has on average, without pinned ones, rounded up.

    Args:
        memory: The memory.
    """
    return int(slots_of(memory, torch.zeros(1, dtype=torch.int64)).filled()[0])
