"""Sizes of each layer's keys and values: a memory is one tensor, in which smaller ones are padded with zeros."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad


class LayerSizes(NamedTuple):
    """Sizes of the keys and values of one layer.

    Attributes:
        heads: Number of key heads.
        key_width: Elements of a key.
        value_width: Elements of a value.
    """

    heads: int
    key_width: int
    value_width: int

    @property
    def width(self) -> int:
        """Elements of the larger of the two."""
        return max(self.key_width, self.value_width)

    def key(self, states: torch.Tensor) -> torch.Tensor:
        """A layer's keys `[B, heads, N, key_width]`, of padded states `[B, H, N, W]`."""
        return states[:, : self.heads, :, : self.key_width]

    def value(self, states: torch.Tensor) -> torch.Tensor:
        """A layer's values `[B, heads, N, value_width]`, of padded states `[B, H, N, W]`."""
        return states[:, : self.heads, :, : self.value_width]


def sizes_of(key: torch.Tensor, value: torch.Tensor) -> LayerSizes:
    """Sizes of a layer with such keys and values, `[B, heads, T, width]` each.

    Raises:
        ValueError: It has other numbers of heads for keys and values.
    """
    if key.shape[1] != value.shape[1]:
        raise ValueError(
            f"a layer has {key.shape[1]} heads of keys and {value.shape[1]} of values, which no memory has"
        )
    return LayerSizes(key.shape[1], key.shape[-1], value.shape[-1])


def largest(sizes: Iterable[LayerSizes]) -> tuple[int, int]:
    """Number of heads and width of padded states, in which the keys and values of all these layers have room."""
    sizes = list(sizes)
    return max(size.heads for size in sizes), max(size.width for size in sizes)


def padded(states: torch.Tensor, heads: int, width: int) -> torch.Tensor:
    """Put zeros behind heads and elements, `[B, h, N, w]` to `[B, heads, N, width]`."""
    missing = (0, width - states.shape[-1], 0, 0, 0, heads - states.shape[1])
    return pad(states, missing) if any(missing) else states


def stacked(states: Sequence[torch.Tensor], sizes: Sequence[LayerSizes]) -> torch.Tensor:
    """Stack the keys, or the values, of layers of these sizes: `[layers, B, H, N, W]`."""
    heads, width = largest(sizes)
    return torch.stack([padded(some, heads, width) for some in states])
