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


def read_and_write(
    reader: MemoryReader,
    segment: Segment,
    memory: Memory,
    memory_embeddings: torch.Tensor,
    *,
    adapts_tokens: bool = True,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a segment behind a memory, and write its own memory if the segment asks for it. Differentiable.

    Args:
        reader: The decoder.
        segment: A piece of A rows of a batch of B.
        memory: What comes before, of B rows.
        memory_embeddings: `[num_memory_tokens, width]`.
        adapts_tokens: Whether adapters act on the segment's tokens, too, or on memory tokens alone.
        dropout: Probability with which a row does not see the memory.

    Returns:
        The segment's last hidden states, `[A, n, hidden_size]`, and the memory's states after it.
    """
    rows = list(segment.rows)
    read = memory.rows(rows) if len(rows) < len(memory) else memory
    if dropout:
        # Drawn within the segment, so that it is the same when the segment is run again.
        seen = torch.rand(len(rows)) >= dropout
        read = dataclasses.replace(read, num_segments=read.num_segments * seen)
    embeddings = reader.embeddings_of(segment.ids)
    mask, count = segment.mask.to(embeddings.device), 0
    if segment.writes:
        count = len(memory_embeddings)
        written = memory_embeddings.to(embeddings.dtype).expand(len(rows), -1, -1)
        embeddings = torch.cat([embeddings, written], 1)
        mask = torch.cat([mask, mask.new_ones(len(rows), count)], 1)
    cache = reader.new_cache(keep=False, capture=count, adapted_tokens=None if adapts_tokens else count)
    hidden = reader.decode(embeddings, mask, reader.read(cache, read))
    states = memory.states
    if segment.writes:
        written = hidden[:, -count:] if memory.layout.placement == "input" else cache.captured()
        states = appended(states, written, rows, memory.layout)
    return hidden[:, : hidden.shape[1] - count], states
