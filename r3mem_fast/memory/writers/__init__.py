"""Writers: how a memory is made of a segment that has been read. One file each, one protocol."""

from typing import Protocol

import torch

from ..memory import Memory
from ..segments import Segment


class Writer(Protocol):
    """Reads segments behind memories, and writes memories of them."""

    def read(self, segment: Segment, memory: Memory) -> tuple[torch.Tensor, Memory]:
        """Read a segment behind a memory, and write it into the memory if the segment asks for it.

        Args:
            segment: A piece of A rows of a batch of B.
            memory: The memory of what comes before, of B rows.

        Returns:
            The segment's last hidden states, `[A, n, hidden_size]`, and the memory after it. What the memory carries
            as tokens is left to `segments.advance`.
        """
        ...

    def finish(self) -> None:
        """Say what went wrong in the segments since the last call, if anything did; it may wait for the device."""
        ...
