"""`PackedTexts`: several texts that a trainer has packed into one row, as rows of their own."""

from typing import Any

import torch

# What collators of TRL and transformers give beside `position_ids`, which says the same.
PACKING_INPUTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class PackedTexts:
    """Texts that stand one behind the other in rows, where `position_ids` count from 0 in each of them.

    Args:
        ids: Token ids, int64 `[B, T]`.
        position_ids: Position of each token in its text, int64 `[B, T]`; what padding has does not matter.
        mask: Mask, `[B, T]`, 0 for padding, which belongs to no text; None: there is none.

    Attributes:
        ids: Token ids of a text a row, int64 `[texts, longest]`, padded on the right.
        mask: 1 for a token, 0 for padding, int64 `[texts, longest]`.

    Raises:
        ValueError: The shapes differ, or the positions do not count from 0 in each text.
    """

    def __init__(self, ids: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor | None = None):
        if position_ids.shape != ids.shape:
            raise ValueError(f"position_ids {list(position_ids.shape)} must have the shape of ids {list(ids.shape)}")
        self._kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
        positions = position_ids[self._kept]
        starts = positions == 0
        text = starts.cumsum(0) - 1
        lengths = torch.bincount(text.clamp_min(0), minlength=1)
        counted = torch.arange(len(positions), device=ids.device) - (lengths.cumsum(0) - lengths)[text]
        rows = self._kept.nonzero()[:, 0]
        if not torch.equal(counted, positions) or not starts[rows.diff(prepend=rows[:1] - 1) != 0].all():
            raise ValueError(
                "position_ids of packed texts must count 0, 1, 2, ... in each text; for other positions, call the "
                "base model"
            )
        self.mask = (torch.arange(int(lengths.max()), device=ids.device) < lengths[:, None]).to(torch.int64)
        self.ids = self.unpacked(ids, 0)

    def unpacked(self, values: torch.Tensor, padding: int) -> torch.Tensor:
        """Put values of the packed tokens into a row for each text.

        Args:
            values: The values, `[B, T]`.
            padding: The value of padding.

        Returns:
            `[texts, longest]`.
        """
        return values.new_full(self.mask.shape, padding).masked_scatter(self.mask.bool(), values[self._kept])

    def packed(self, values: torch.Tensor) -> torch.Tensor:
        """Put values of the texts' tokens to where these stand in the packed rows.

        Args:
            values: The values, `[texts, longest, C]`.

        Returns:
            `[B, T, C]`, zeros in padding.
        """
        empty = values.new_zeros(*self._kept.shape, values.shape[-1])
        return empty.masked_scatter(self._kept[..., None], values[self.mask.bool()])


def packed_texts(ids: torch.Tensor, mask: torch.Tensor | None, inputs: dict[str, Any]) -> PackedTexts | None:
    """Take what says how texts are packed out of the inputs of a model.

    Args:
        ids: Token ids, int64 `[B, T]`.
        mask: Mask, `[B, T]`, 0 for padding; None: there is none.
        inputs: The model's other inputs; `position_ids`, and `PACKING_INPUTS` beside them, are taken out.

    Returns:
        The texts; None without `position_ids`.

    Raises:
        ValueError: See `PackedTexts`.
    """
    if inputs.get("position_ids") is None:
        return None
    for name in PACKING_INPUTS:
        inputs.pop(name, None)
    return PackedTexts(ids, inputs.pop("position_ids"), mask)
