"""`Budget`: how many slots a segment gets, and what happens to those beyond the budget of a memory.

Where heads share slots, nothing is held that no token will see again. A layer with a sliding window of W tokens never
sees a slot whose age is W or more, as ages only grow: such slots go, and later segments get their room, up to as many
slots for all tokens so far as `num_memory_tokens` and the budget allow. So where most layers have windows, the few
that see everything can keep nearly all of their keys. Where every head has as many slots, nothing can go.
"""

from collections.abc import Iterator, Sequence

import torch

from ..layout import MemoryLayout
from ..slots import Slots
from .matching import Match


class Budget:
    """Matches slots as a memory's budget says.

    Args:
        layout: Layout of the memories.
        windows: Number of keys that a query of each layer sees, its own included; None for all.
        heads: Number of key heads of all layers.
    """

    def __init__(self, layout: MemoryLayout, windows: Sequence[int | None], heads: int):
        self._layout, self._windows, self._heads = layout, windows, heads
        self._drops = layout.is_adaptive and any(window is not None for window in windows)

    def parts(
        self, old: Slots, new: Slots, match: Match, ends: torch.Tensor, tokens_so_far: torch.Tensor
    ) -> Iterator[tuple[list[int], Slots]]:
        """Match slots of rows whose texts end here or go on: places of rows, and their slots.

        Args:
            old: The slots so far, of A rows.
            new: Slots of the segment's tokens.
            match: Matches slots to queries.
            ends: Whether each row's text ends with the segment, bool `[A]`.
            tokens_so_far: Tokens of each row's text, but pinned ones and those that will be read again, int64 `[A]`.

        Raises:
            ValueError: The memory is beyond its budget, and that is to be an error.
        """
        layout = self._layout
        if self._drops:
            old, new = old.seen_within(self._windows), new.seen_within(self._windows)
        filled = self._filled(old)
        limits = self._limits(filled, tokens_so_far)
        wanted = filled + torch.minimum(self._filled(new), limits)
        if layout.beyond_budget == "error" and int(wanted.max()) > layout.budget:
            raise ValueError(
                f"a memory has {int(wanted.max())} slots, and its budget is {layout.budget}: raise the budget "
                '(memory_budget), or choose beyond_budget="rematch" or "forget"'
            )
        joint = (wanted > layout.budget) & layout.rematches & (ends | (not layout.waits))
        alike: dict[tuple[bool, int, int], list[int]] = {}
        kinds = zip(joint.tolist(), limits.tolist(), old.pinned.tolist(), new.pinned.tolist(), strict=True)
        for row, (is_joint, limit, earlier, later) in enumerate(kinds):
            kind = (True, 0, later + earlier) if is_joint else (False, limit, later)
            alike.setdefault(kind, []).append(row)
        for (is_joint, limit, _), rows in alike.items():
            some_old, some_new = old.rows(rows), new.rows(rows)
            if is_joint:
                yield rows, self._matched_again(some_old.followed_by(some_new), match, rows)
            else:
                together = some_old.followed_by(match(some_new, limit, rows))
                yield rows, (together.youngest if layout.is_adaptive else together.within)(layout.most_slots)

    def _filled(self, slots):
        return slots.filled(self._heads) if self._layout.is_adaptive else slots.counts - slots.pinned

    def _limits(self, filled, tokens_so_far):
        """Slots that the segment of each row gets at most, int64 `[A]`: with the room of what no token sees again."""
        layout = self._layout
        usual = torch.full_like(filled, layout.num_memory_tokens)
        if not self._drops:
            return usual
        allowed = (tokens_so_far * layout.num_memory_tokens // layout.segment_length).clamp_max(layout.most_slots)
        return torch.maximum(usual, (allowed - filled).clamp_max(layout.segment_length))

    def _matched_again(self, slots: Slots, match: Match, rows: list[int]) -> Slots:
        """Match old and new slots together. What is too old goes first, and the first slot stays as it is.

        A key that is matched ever again takes over ever more: after eight times all is well, after sixty a text is
        read worse than behind no memory.
        """
        layout, pinned = self._layout, slots.pinned
        fixed = pinned.clamp_min(1)  # attention rests on a text's first token: an error in it would spread
        # Pinned slots have the largest ages to themselves, so that those of others end before these (`slots_of`).
        age = min(layout.lifetime, layout.reach - 1 - int(pinned[0]))
        slots = slots.up_to(age, layout.budget + int(pinned[0]))
        found = match(slots._replace(pinned=fixed), layout.budget - int((fixed - pinned)[0]), rows)
        found = found._replace(pinned=pinned)
        return found.packed() if layout.is_adaptive else found
