"""Memories that an application can use: conversations and documents in a folder, with nothing to start.

`MemoryStore` keeps conversations, `DocumentStore` answers questions about documents, `AdapterShelf` remembers them.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .conversations import MemoryStore
    from .documents import Answer, DocumentStore
    from .items import Item
    from .lookup import Found
    from .shelf import AdapterShelf

__all__ = ["AdapterShelf", "Answer", "DocumentStore", "Found", "Item", "MemoryStore"]

_PLACES = {
    "AdapterShelf": "shelf",
    "Answer": "documents",
    "DocumentStore": "documents",
    "Found": "lookup",
    "Item": "items",
    "MemoryStore": "conversations",
}


def __getattr__(name):
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
