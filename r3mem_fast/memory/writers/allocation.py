"""Chooses the keys that stay as slots of a matched memory: as many in each head, or where most is asked for.

Uniform allocation keeps in each head the keys with the largest squared attention. With adaptive allocation heads share
the slots of all layers (Ada-KV, arXiv 2407.11550, does so within a layer): of all keys of a row those stay that have
the largest

    squared attention x |V|^2

which says how much a head's output would miss without them, whichever head they are of. Where layers normalise what
their attention gives (Gemma 3, OLMo 2), its length says nothing: it is a share there of what the layer's
attention gives to all queries. Few heads look things up in
the text, and need nearly all of their keys; many look at what is near, or at the first token, and need few. Each keeps
at least a quarter of what it would have of equal shares, and eight, without which text is read worse; and four times
as many at most: while a memory is read, it is as wide as its widest head.
"""

from collections.abc import Sequence

import torch

from r3mem_fast.kernels.matching import MAX_KEPT

# Slots of a head with adaptive allocation, at least and at most, as shares of an equal one; and a number at least, up
# to the equal share.
_LEAST, _MOST, _LEAST_SLOTS = 0.25, 4, 8


def best_places(scores: torch.Tensor, positions: torch.Tensor, limit: int) -> torch.Tensor:
    """Places of the keys with the largest scores, in the order in which they stand; before them, keys that are none.

    Args:
        scores: Squared attention of each key, `[B, kv_heads, S]`.
        positions: Positions of the keys, int32 `[B, kv_heads, S]`; -1 where there is none.
        limit: Number of places.

    Returns:
        int64 `[B, kv_heads, limit]`.
    """
    places = scores.masked_fill(positions < 0, -1).topk(limit, -1).indices.sort(-1).values
    order = (positions.gather(2, places) >= 0).to(torch.int8).sort(dim=-1, stable=True).indices
    return places.gather(2, order)


def shared_places(weights: torch.Tensor, limit: int, widest: int = MAX_KEPT) -> torch.Tensor:
    """Which keys stay where heads share the slots of all layers: those with the largest weights of a row.

    Args:
        weights: What each key is worth, `[layers, B, kv_heads, S]`; infinite for one that stays beside the others, and
            negative where there is none.
        limit: Number of slots of a head on average, beside those. Each has as many at least, if it has so many keys,
            and at most, as is said above.
        widest: Number of slots of a head at most, with those beside; by default as many as can be matched.

    Returns:
        bool, of the same shape.
    """
    beside = weights == torch.inf
    weights = weights.masked_fill(beside, -1)
    rank = weights.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    exists = weights >= 0
    stays = exists & (rank < min(limit, max(_LEAST_SLOTS, int(_LEAST * limit))))
    most = min(int(_MOST * limit), widest - int(beside.sum(-1).max()))
    heads = (exists | beside).any(-1).sum((0, 2)).tolist()
    for row, count in enumerate(heads):
        left = torch.where(exists & ~stays & (rank < most), weights, -1)[:, row]
        more = min(limit * count - int(stays[:, row].sum()), int((left >= 0).sum()))
        chosen = torch.zeros_like(left, dtype=torch.bool).flatten()
        chosen[left.flatten().topk(max(0, more)).indices] = True
        stays[:, row] |= chosen.view(left.shape)
    return stays | beside


def of_like_width(widths: Sequence[int]) -> list[list[int]]:
    """Places of widths in groups, in none of which one is twice as large as another.

    Args:
        widths: The widths.
    """
    found: list[list[int]] = []
    for place in sorted(range(len(widths)), key=widths.__getitem__):
        if not found or widths[place] >= 2 * widths[found[-1][0]]:
            found.append([])
        found[-1].append(place)
    return found
