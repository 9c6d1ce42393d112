"""What a new store is made with, and the ways to look something up. Needs no torch."""

from typing import Any

# Ways to look something up.
WAYS = ("bm25", "embedding", "backward")
# Settings of `R3MemConfig`: sixteen segments of 256 tokens, the last 32 of which are read again as they are. What goes
# beyond goes.
SETTINGS: dict[str, Any] = {
    "memory_writer": "matched",
    "adapter_rows": "memory",
    "num_memory_tokens": 64,
    "memory_budget": 1024,
    "beyond_budget": "forget",
    "memory_allocation": "adaptive",
    "memory_queries": "own",
    "segment_length": 256,
    "segment_overlap": 32,
    "cycle_weight": 0.0,
}
# Tokens, the newest ones, that are never compressed.
RAW_TOKENS = 128
# Items that are looked up for a question and read word for word behind the memory, which are worth far more than the
# tokens that they take (docs/conversations.md).
PASSAGES = 3
# Settings of `R3MemConfig` that say what matched memories are like.
OF_MATCHED = (
    "num_memory_tokens", "memory_budget", "beyond_budget", "memory_allocation", "memory_queries", "segment_length",
    "segment_overlap",
)  # fmt: skip
