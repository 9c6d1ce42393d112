"""Learned memory tokens: embeddings behind a segment, of which a memory keeps what they become (R3Mem, section 3)."""

import dataclasses

import torch
from torch import nn

from ..memory import Memory
from ..reader import MemoryReader
from ..segments import Segment
from ..states import appended


def new_memory_embeddings(token_embeddings: torch.Tensor, count: int) -> nn.Parameter:
    """Embeddings of memory tokens before training: around the mean of the vocabulary's, as far apart as these.

    Args:
        token_embeddings: The vocabulary's, `[vocabulary, width]`.
        count: Number of memory tokens.

    Returns:
        float32 `[count, width]`.
    """
    known = token_embeddings.detach().float()
    noise = torch.randn(count, known.shape[1], device=known.device)
    return nn.Parameter(known.mean(0) + known.std(0) * noise)


class TokenWriter:
    """Writes the memory of a segment with learned memory tokens behind it.

    Args:
        reader: Reads memories with the model's decoder.
        memory_embeddings: The memory tokens' embeddings, `[num_memory_tokens, width]`.
        adapts_tokens: Whether adapters act on a segment's tokens, too, or on memory tokens alone.
        dropout: Probability with which a row does not see its memory.
    """

    def __init__(
        self,
        reader: MemoryReader,
        memory_embeddings: torch.Tensor,
        *,
        adapts_tokens: bool = True,
        dropout: float = 0.0,
    ):
        self._reader, self._embeddings = reader, memory_embeddings
        self._adapts_tokens, self._dropout = adapts_tokens, dropout

    def read(self, segment: Segment, memory: Memory) -> tuple[torch.Tensor, Memory]:
        """Read a segment behind a memory, and write it into the memory if the segment asks for it. Differentiable.

        Args:
            segment: A piece of A rows of a batch of B.
            memory: The memory of what comes before, of B rows.

        Returns:
            The segment's last hidden states, `[A, n, hidden_size]`, and the memory with the states after it.
        """
        reader, rows = self._reader, list(segment.rows)
        read = memory.rows(rows) if len(rows) < len(memory) else memory
        if self._dropout:
            # Drawn within the segment, so that it is the same when the segment is run again.
            seen = torch.rand(len(rows)) >= self._dropout
            read = dataclasses.replace(read, num_segments=read.num_segments * seen)
        embeddings = reader.embeddings_of(segment.ids)
        mask, count = segment.mask, 0
        if segment.writes:
            count = len(self._embeddings)
            written = self._embeddings.to(embeddings.dtype).expand(len(rows), -1, -1)
            embeddings = torch.cat([embeddings, written], 1)
            mask = torch.cat([mask, mask.new_ones(len(rows), count)], 1)
        cache = reader.new_cache(keep=False, capture=count, adapted_tokens=None if self._adapts_tokens else count)
        hidden = reader.decode(embeddings, mask, reader.read(cache, read), ids=segment.ids)
        if segment.writes:
            written = hidden[:, -count:] if memory.layout.placement == "input" else cache.captured()
            memory = dataclasses.replace(memory, states=appended(memory.states, written, rows, memory.layout))
        return hidden[:, : hidden.shape[1] - count], memory

    def finish(self) -> None:
        """Do nothing: what can go wrong here is noticed by the network."""
