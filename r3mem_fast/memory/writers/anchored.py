"""`AnchoredWriter`: matched memories whose slots learn: anchors of a segment say how keys and values should change.

Matching is a closed form, and a memory of few slots is worth less than one that was trained. Training from nothing
takes long; here it starts at the match. Behind a segment, anchors are read: copies of the tokens that most heads keep,
each at its token's place, so that every anchor sees the whole segment. Each is its token's embedding plus one that is
learned, and adapters act on it. What this changes in an anchor's keys and values, beside the same token without
adapters, is added to the slots of the nearest token, in each head of each layer:

    K_slot = K_matched + K_adapted(anchor) - K_base(anchor)

and likewise the values. Where adapters read the segment, too, what they read is matched, and both terms are with
adapters: the change is what the learned embedding makes. A change can be limited to a share of the mean length of the
segment's keys, or values, in that head: far from the texts that it was trained on, an adapter changes some heads by
much more than elsewhere, and that does harm. Before training the change is zero, to the bit, and a memory is the
matched one. The slots of pinned tokens, and of earlier segments, stay what they are.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import nn

from ...reversible.surroundings import Surroundings
from ..layout import MemoryLayout
from ..memory import Memory
from ..reader import MemoryReader
from ..segments import Segment
from ..slots import Slots, replaced
from ..states import uploaded
from .matched import MatchedWriter, Pass, QuestionsOf

# Anchors of a segment for each slot, where heads share slots and some have several times as many as others; and how
# many there are then, unless slots are more: they are read, which takes time.
_ANCHORS_A_SHARED_SLOT, _ANCHORS_OF_SHARED_SLOTS = 4, 64


def new_anchor_embedding(token_embeddings: torch.Tensor) -> nn.Parameter:
    """The embedding that tells an anchor from its token, before training: zeros.

    Args:
        token_embeddings: The vocabulary's, `[vocabulary, width]`.

    Returns:
        float32 `[1, width]`.
    """
    return nn.Parameter(torch.zeros(1, token_embeddings.shape[1], device=token_embeddings.device))


class AnchoredWriter(MatchedWriter):
    """Writes matched memories whose slots learn from anchors. Differentiable in adapters and in the embedding.

    No gradient passes through the choice of slots and the values that match; it passes through the changes, through
    what is read behind a memory, and through slots that stay from earlier segments. Slots that are matched again pass
    none on.

    Args:
        reader: Reads memories with the model's decoder.
        layout: Layout of the memories; its reach is that of the reader's.
        anchor_embedding: Embedding that is added to that of an anchor's token, `[1, width]`.
        adapters_on: Makes a context manager in whose block the adapters act, on anchors alone: elsewhere the base
            model is reading. None: they act on all tokens, always.
        longest_change: Length of a change at most, of the mean length of what it changes; None: any.
        questions_of: Gives what will be asked of a segment, for a layout with queries of "pairs".
    """

    def __init__(
        self,
        reader: MemoryReader,
        layout: MemoryLayout,
        anchor_embedding: torch.Tensor,
        adapters_on: Callable[[], contextlib.AbstractContextManager[None]] | None,
        longest_change: float | None = None,
        questions_of: QuestionsOf | None = None,
    ):
        super().__init__(reader, layout, questions_of, adapted_tokens=None if adapters_on is None else 0)
        self._embedding, self._adapters_on = anchor_embedding, adapters_on
        self._longest_change = longest_change

    def pass_over(self, segment: Segment, memory: Memory) -> Pass:
        """Read a segment behind a memory, and note what can be matched if the segment asks for it; differentiable.

        Args:
            segment: A piece of A rows of a batch of B.
            memory: The memory of what comes before, of B rows.

        Raises:
            ValueError: No memory can be matched to the model's attention, or none can learn in this way.
        """
        if memory.carried is not None or self._reader.keeps_latents():
            raise ValueError(
                "anchors learn how keys and values should change, and this model has recurrent layers or latents in "
                'their place; use memory_writer="matched", or "tokens"'
            )
        return self._passed_over(segment, memory)

    def written(self, found: Pass) -> Memory:
        """Match what a pass has read, and change the slots as anchors say.

        Args:
            found: The pass, over a segment that asks for a memory.

        Returns:
            The memory after it.

        Raises:
            ValueError: The memory is beyond its budget, and that is to be an error.
        """
        old, new = self._candidates(found)
        fresh = uploaded(self._fresh(found.segment), found.hidden.device)
        parts = self._matched(found, old, new)
        places = [_places(slots, fresh[rows]) for rows, slots in parts]
        anchors = self._anchors(found, parts, places)
        if anchors is None:
            return replaced(found.memory, found.segment.rows, parts)
        change = self._change(found, old, new, anchors)
        tokens = torch.arange(found.segment.ids.shape[1], device=anchors.device)
        distances = (anchors[:, :, None] - tokens).abs().masked_fill(anchors[:, :, None] < 0, 2 * len(tokens))
        nearest = distances.argmin(1)
        changed = []
        for (rows, slots), place in zip(parts, places, strict=True):
            layers, _, heads, _ = place.shape
            of_token = nearest[rows][None, :, None].expand(layers, -1, heads, -1)
            anchor = of_token.gather(3, place.clamp_min(0))[:, None, ..., None]
            more = change[:, :, rows].gather(4, anchor.expand(-1, 2, -1, -1, -1, change.shape[-1]))
            more = more * (place >= 0)[:, None, ..., None]
            changed.append((rows, slots._replace(states=(slots.states + more).to(slots.states.dtype))))
        return replaced(found.memory, found.segment.rows, changed)

    @torch.no_grad()
    def _anchors(self, found, parts, places):
        """Places of the tokens that most heads keep, in order, int64 `[A, k]`, -1 for none; None if there are none."""
        votes = torch.zeros(found.segment.ids.shape, dtype=torch.int64, device=found.hidden.device)
        for (rows, _), place in zip(parts, places, strict=True):
            kept = place.permute(1, 0, 2, 3).flatten(1)
            votes[rows] = votes[rows].scatter_add(1, kept.clamp_min(0), (kept >= 0).to(votes.dtype))
        wanted = self._layout.num_memory_tokens
        if self._layout.is_adaptive:
            wanted = max(wanted, min(_ANCHORS_A_SHARED_SLOT * wanted, _ANCHORS_OF_SHARED_SLOTS))
        count = min(wanted, int((votes > 0).sum(1).max()))
        if not count:
            return None
        tokens = votes.shape[1]
        places = (
            (votes * tokens - torch.arange(tokens, device=votes.device)).topk(count, 1).indices
        )  # the first of equals
        return places.masked_fill(votes.gather(1, places) == 0, -1).sort(1).values

    def _change(self, found, old, new, anchors):
        """What adapters and the embedding change in anchors' keys and values, `[layers, 2, A, kv_heads, k, width]`."""
        segment, on_host = found.segment, anchors.cpu()
        lengths = segment.mask.sum(1, keepdim=True)
        exists = on_host >= 0
        columns = (on_host + segment.ids.shape[1] - lengths).masked_fill(~exists, 0)
        ids = segment.ids.gather(1, columns).masked_fill(~exists, 0)
        positions = (on_host - self._fresh(segment)[:, None]).masked_fill(~exists, 0)
        with torch.no_grad():
            whole = self._whole(found, old, new).detach()
        embeddings = self._reader.embeddings_of(ids)
        anchored = embeddings + self._embedding.to(embeddings.dtype)
        if self._adapters_on is None:  # which learn through both, and drop out the same
            with Surroundings(anchored.device).recorded() as surroundings:
                plain = self._read_anchors(whole, embeddings, exists, positions, ids, adapted=None)
            with surroundings.restored():
                learned = self._read_anchors(whole, anchored, exists, positions, ids, adapted=None)
        else:
            with torch.no_grad():
                plain = self._read_anchors(whole, embeddings, exists, positions, ids, adapted=0)
            with self._adapters_on():
                learned = self._read_anchors(whole, anchored, exists, positions, ids, adapted=ids.shape[1])
        change = learned.float() - plain.float()
        return change if self._longest_change is None else _limited(change, new, self._longest_change)

    def _read_anchors(self, whole, embeddings, exists, positions, ids, adapted):
        reader = self._reader
        cache = reader.read(reader.new_cache(keep=False, capture=ids.shape[1], adapted_tokens=adapted), whole)
        reader.decode(embeddings, exists.to(torch.int64), cache, positions, ids)
        return cache.captured()


def _limited(change: torch.Tensor, slots: Slots, share: float) -> torch.Tensor:
    """Shorten changes that are longer than a share of the mean length of what they change.

    Args:
        change: Changes of keys and values, float32 `[layers, 2, A, kv_heads, k, width]`.
        slots: Those of the segment's tokens.
        share: Length of a change at most, of the mean length of keys, or values, in that head.
    """
    exists = (slots.ages >= 0)[:, None]
    lengths = slots.states.detach().float().norm(dim=-1) * exists
    longest = (share * lengths.sum(-1) / exists.sum(-1).clamp_min(1))[..., None, None]
    # Compared by squares: the length of a change that is zero has no gradient.
    too_long = change.square().sum(-1, keepdim=True) > longest.square()
    length = change.where(too_long, 1).norm(dim=-1, keepdim=True)
    return torch.where(too_long, change * (longest / length), change)


def _places(slots: Slots, fresh: torch.Tensor) -> torch.Tensor:
    """Which of a segment's tokens slots are of, int64 `[layers, A, kv_heads, N]`; -1: of none, or they are pinned.

    Args:
        slots: The slots, of A rows.
        fresh: How many tokens of each row will not be read again, int64 `[A]`.
    """
    exists = slots.ages >= 0
    pinned = exists.cumsum(-1) <= uploaded(slots.pinned, exists.device)[None, :, None, None]
    places = fresh[None, :, None, None] - slots.ages
    return places.masked_fill(~exists | pinned | (places < 0), -1)
