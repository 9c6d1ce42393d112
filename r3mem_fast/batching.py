"""Rows of token ids as batches: padding on either side, and joining."""

import torch

from .memory.segments import IGNORED


class Rows:
    """Token rows with a mask, padded on either side."""

    def __init__(self, ids, mask, labels, may_be_empty=False):
        if not isinstance(ids, torch.Tensor):
            raise TypeError(f"token ids must be a tensor, got {type(ids).__name__}")
        if ids.dim() != 2 or ids.dtype != torch.int64 or not (ids.numel() or may_be_empty):
            raise ValueError(
                f"token ids must be int64 [batch, tokens], one at least, got {ids.dtype} {list(ids.shape)}"
            )
        for name, other in (("mask", mask), ("labels", labels)):
            if other is not None and other.shape != ids.shape:
                raise ValueError(f"the {name} {list(other.shape)} must have the shape of its ids {list(ids.shape)}")
        self.ids = ids
        self.mask = torch.ones_like(ids) if mask is None else (mask != 0).to(torch.int64)
        self.labels = ids if labels is None else labels

    def lists(self, values=None):
        """The tokens of each row, or what stands in their places in `values`, without padding, on the CPU."""
        values, mask = (self.ids if values is None else values).cpu(), self.mask.cpu().bool()
        return [row[keep] for row, keep in zip(values, mask, strict=True)]

    def joined(self, rows):
        """These and, after them, others: whose labels count, where they are no padding, while these' do not."""
        labels = rows.labels.masked_fill(rows.mask == 0, IGNORED)
        return Rows(
            torch.cat([self.ids, rows.ids], 1),
            torch.cat([self.mask, rows.mask], 1),
            torch.cat([torch.full_like(self.ids, IGNORED), labels], 1),
        )

    def left_padded(self):
        return self.left_padded_with_labels()[:2]

    def left_padded_with_labels(self):
        """Ids, mask and labels, and the order that they were brought into: `[B, N]` each."""
        order = self.mask.argsort(dim=1, stable=True)
        return (*(tensor.gather(1, order) for tensor in (self.ids, self.mask, self.labels)), order)

    def right_padded(self, end):
        """`ids end`, its mask, and as targets the labels and the end: `[B, N + 1]` each."""
        order = (1 - self.mask).argsort(dim=1, stable=True)
        lengths = self.mask.sum(1, keepdim=True)
        room = torch.zeros_like(lengths)
        mask = torch.cat([self.mask.gather(1, order), room], 1)
        labels = torch.cat([self.labels.gather(1, order), room], 1).masked_fill(mask == 0, IGNORED)
        ids = torch.cat([self.ids.gather(1, order), room], 1)
        return ids.scatter(1, lengths, end), mask.scatter(1, lengths, 1), labels.scatter(1, lengths, end)


def left_padded(pieces, device):
    longest = max(map(len, pieces))
    ids, mask = torch.zeros(2, len(pieces), longest, dtype=torch.int64)
    for index, piece in enumerate(pieces):
        if len(piece):
            ids[index, -len(piece) :], mask[index, -len(piece) :] = piece, 1
    return Rows(ids.to(device), mask.to(device), None, may_be_empty=True)


def nothing(rows, device):
    """So many rows without a token."""
    ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    return Rows(ids, ids, None)


def nothing_before(rows):
    return nothing(len(rows.ids), rows.ids.device)


def positions_of_mask(mask):
    return (mask.cumsum(1) - 1).clamp_min(0)
