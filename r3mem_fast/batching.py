"""Makes batches of rows of token ids: pads them on either side, and joins them."""

from collections.abc import Sequence

import torch

from .memory.memory import Memory
from .memory.segments import IGNORED


class Rows:
    """A batch of token rows, padded on either side.

    Args:
        ids: Token ids, int64 `[B, T]`.
        mask: Mask, `[B, T]`, 0 for padding; None: nothing is padding.
        labels: Labels, int64 `[B, T]`; None: the ids.
        may_be_empty: Whether T may be 0.

    Attributes:
        ids: Token ids, int64 `[B, T]`.
        mask: 1 for a token, 0 for padding, int64 `[B, T]`.
        labels: Labels, int64 `[B, T]`.

    Raises:
        TypeError: The ids are no tensor.
        ValueError: A shape or a dtype is wrong.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        may_be_empty: bool = False,
    ):
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

    def lists(self, values: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Values of each row without padding, on the CPU.

        Args:
            values: Values of the tokens, `[B, T]`; None: the ids.

        Returns:
            For each row the values of its tokens, `[n]`.
        """
        values, mask = (self.ids if values is None else values).cpu(), self.mask.cpu().bool()
        return [row[keep] for row, keep in zip(values, mask, strict=True)]

    def joined(self, rows: "Rows") -> "Rows":
        """Join each row with another one behind it. Only the labels of the others count.

        Args:
            rows: The others, as many.
        """
        labels = rows.labels.masked_fill(rows.mask == 0, IGNORED)
        return Rows(
            torch.cat([self.ids, rows.ids], 1),
            torch.cat([self.mask, rows.mask], 1),
            torch.cat([torch.full_like(self.ids, IGNORED), labels], 1),
        )

    def left_padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, int64 `[B, T]` each, with all padding on the left."""
        return self.left_padded_with_labels()[:2]

    def left_padded_with_labels(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, mask and labels with all padding on the left, and the columns that they come from: int64 `[B, T]`."""
        order = self.mask.argsort(dim=1, stable=True)
        ids, mask, labels = (tensor.gather(1, order) for tensor in (self.ids, self.mask, self.labels))
        return ids, mask, labels, order

    def right_padded(self, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows with an end token behind them, and all padding on the right.

        Args:
            end: The end token.

        Returns:
            Ids, mask, and targets, which are the labels and the end token, -100 in padding: int64 `[B, T + 1]` each.
        """
        order = (1 - self.mask).argsort(dim=1, stable=True)
        lengths = self.mask.sum(1, keepdim=True)
        room = torch.zeros_like(lengths)
        mask = torch.cat([self.mask.gather(1, order), room], 1)
        labels = torch.cat([self.labels.gather(1, order), room], 1).masked_fill(mask == 0, IGNORED)
        ids = torch.cat([self.ids.gather(1, order), room], 1)
        return ids.scatter(1, lengths, end), mask.scatter(1, lengths, 1), labels.scatter(1, lengths, end)


def left_padded(pieces: Sequence[torch.Tensor], device: torch.device) -> Rows:
    """Make a batch of pieces, padded on the left.

    Args:
        pieces: Token ids of each row, int64 `[n]`; some or all may be empty.
        device: Device of the batch.
    """
    longest = max(map(len, pieces))
    ids, mask = torch.zeros(2, len(pieces), longest, dtype=torch.int64)
    for index, piece in enumerate(pieces):
        if len(piece):
            ids[index, -len(piece) :], mask[index, -len(piece) :] = piece, 1
    return Rows(ids.to(device), mask.to(device), may_be_empty=True)


def nothing(rows: int, device: torch.device) -> Rows:
    """Make a batch of rows without a token.

    Args:
        rows: Number of rows.
        device: Device of the batch.
    """
    ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    return Rows(ids, ids)


def nothing_before(rows: Rows) -> Rows:
    """Make a batch of rows without a token, as many as given, on the same device."""
    return nothing(len(rows.ids), rows.ids.device)


def unfinished_of(memory: Memory, device: torch.device) -> Rows:
    """Tokens that a memory carries: those that are read again, and those of a segment that is not read yet.

    Args:
        memory: The memory.
        device: Device of the batch.
    """
    return left_padded(list(map(torch.cat, zip(memory.recent, memory.unfinished, strict=True))), device)


def prompt_of(rows: Rows, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Put a start token before and after each row.

    Args:
        rows: Queries or other prompts.
        start: The start token.

    Returns:
        Ids and mask, int64 `[B, T + 2]` each, padded on the left.
    """
    ids, mask = rows.left_padded()
    before = torch.full_like(ids[:, :1], start)
    # Both start tokens stand next to the row's own tokens, and padding before them.
    ids = torch.cat([before, ids, before], 1)
    mask = torch.cat([mask[:, :1] * 0, mask, torch.ones_like(mask[:, :1])], 1)
    place = mask.argmax(1, keepdim=True) - 1
    ids.scatter_(1, place, start)
    mask.scatter_(1, place, 1)
    return ids, mask


def padding_behind(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put the padding of rows behind their tokens, which stay in order.

    Args:
        ids: Token ids, int64 `[B, T]`.
        mask: Mask, int64 `[B, T]`, 0 for padding.

    Returns:
        Ids and mask in the new order, and where each column is then, int64 `[B, T]`.
    """
    order = (1 - mask).argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order), order.argsort(dim=1)


def columns_at(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Values at some places of each row, `[B, n, C]`.

    Args:
        values: `[B, T, C]`.
        places: int64 `[B, n]`, on any device.
    """
    return values.gather(1, places.to(values.device)[..., None].expand(-1, -1, values.shape[-1]))
