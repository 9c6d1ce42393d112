"""Remembering: context–query pairs in an adapter, until every context comes back exactly."""

from ..settings import RememberSettings
from .checkpoint import discard_checkpoint
from .report import RememberReport
from .run import MAX_QUERY_OF_CONTEXT, remember

__all__ = ["MAX_QUERY_OF_CONTEXT", "RememberReport", "RememberSettings", "discard_checkpoint", "remember"]
