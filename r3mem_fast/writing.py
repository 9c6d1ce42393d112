"""Chooses the writer of a network's memories."""

import functools

from r3mem_fast.kernels.common.compat import MAX_HEAD_DIM

from .integrations import graphs
from .integrations.fsdp import units_of
from .integrations.peft import adapters_on
from .memory.layout import MemoryLayout
from .memory.writers import Writer
from .memory.writers.anchored import AnchoredWriter
from .memory.writers.graphed import GraphedWriter
from .memory.writers.matched import MatchedWriter
from .memory.writers.tokens import TokenWriter
from .network import Network


def writer_of(network: Network, layout: MemoryLayout, *, dropout: float = 0.0) -> Writer:
    """Make the writer of a network's memories.

    Args:
        network: The network.
        layout: Their layout: the network's, or for matched memories any with the same reach.
        dropout: Probability with which a row does not see its memory, for memory tokens that learn.
    """
    reader, embeddings = network.reader, network.memory_embeddings
    if embeddings is None or (network.is_anchored and network.adapters_are_off):
        writer = MatchedWriter(reader, layout, network.questions_of)
        # Processes that gather a sharded model's layers together must run alike, whatever their rows are.
        by_graphs = graphs.are_wanted(network.device) and not units_of(network)
        # Larger heads are matched by the reference, which looks at values.
        by_graphs = by_graphs and reader.state_sizes()[-1] <= MAX_HEAD_DIM
        return GraphedWriter(writer, network.device) if by_graphs else writer
    if network.is_anchored:
        all_tokens, longest = network.adapts_tokens, network.r3mem_config.longest_change
        on = None if all_tokens else functools.partial(adapters_on, network.peft_model)
        return AnchoredWriter(reader, layout, embeddings, on, longest, network.questions_of)
    return TokenWriter(reader, embeddings, adapts_tokens=network.adapts_tokens, dropout=dropout)
