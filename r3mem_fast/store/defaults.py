"""Sizes of memories in a new store. Needs no torch."""

from ..config import R3MemConfig

# Sixteen segments of 256 tokens, the last 32 of which are read again as they are. What goes beyond goes.
DEFAULT_CONFIG = R3MemConfig(
    memory_writer="matched",
    adapter_rows="memory",
    num_memory_tokens=64,
    memory_budget=1024,
    segment_overlap=32,
    cycle_weight=0.0,
)
# Tokens, the newest ones, that are never compressed.
RAW_TOKENS = 128
