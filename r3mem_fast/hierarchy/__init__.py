"""Splits documents into a hierarchy, and makes the context–query pairs that a model is to remember."""

from ..choices import LEVELS
from .builders import ExtractiveBuilder, InstructBuilder
from .entities import CapitalisedWords, EntityFinder, SpacyEntities, default_entity_finder
from .pairs import Pair, build_pairs, contexts_of, queries_of
from .passage import Passage, QueryBuilder
from .split import Document, Paragraph, Span, cut_document, split_document

__all__ = [
    "LEVELS",
    "CapitalisedWords",
    "Document",
    "EntityFinder",
    "ExtractiveBuilder",
    "InstructBuilder",
    "Pair",
    "Paragraph",
    "Passage",
    "QueryBuilder",
    "SpacyEntities",
    "Span",
    "build_pairs",
    "contexts_of",
    "cut_document",
    "default_entity_finder",
    "queries_of",
    "split_document",
]
