"""What a layer's forward pass leaves for its backward pass."""

from typing import NamedTuple

import torch

from .tiles import num_tiles, side_bits_size


class Kept(NamedTuple):
    """What one layer's forward pass leaves for its backward pass.

    Attributes:
        side: Packed side bits, uint8 `[side_bits_size(numel, bits)]`; empty with `bits=None`.
        branch_sums: Checksums of the branch, int32 `[ceil(numel / TILE)]`.
        entry_sums: Checksums of the streams before the layer, int64 `[ceil(numel / TILE)]`; empty unless asked for.
    """

    side: torch.Tensor
    branch_sums: torch.Tensor
    entry_sums: torch.Tensor


def kept_bytes(numel: int, bits: int | None) -> int:
    """Return the bytes of a layer's `Kept`, without the `entry_sums` that only one layer of a stack has.

    Args:
        numel: Number of elements of a stream.
        bits: Side bits of an element, 1, 2, 4 or 8; None for the first layer.

    Returns:
        The number of bytes.
    """
    return (0 if bits is None else side_bits_size(numel, bits)) + 4 * num_tiles(numel)
