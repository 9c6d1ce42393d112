"""Memories: the value and its file, how histories are cut into segments, and how a model reads what it has kept.

Its names are loaded on first use: `memory.file`, which looks at a memory file, needs no torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .layout import MemoryLayout, Origin
    from .memory import Memory

__all__ = ["Memory", "MemoryLayout", "Origin"]


def __getattr__(name):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import layout, memory

    return getattr(memory if name == "Memory" else layout, name)
