"""What a query is written for, and what writes it: the terms that builders and pairs have in common."""

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

# The most tokens that a query may have, as a share of its context's, and the longest run of tokens that the two share.
MAX_QUERY_SHARE = 0.15
MAX_SHARED_RUN = 8


class Passage(NamedTuple):
    """What a builder is asked to write a query for.

    text: the context. parts: for a document its paragraphs, else its sentences. entities: those mentioned, the ones
    that no other passage of this level mentions first. tokens: that the query may have. count_tokens: of a string.
    """

    level: str
    text: str
    parts: list[str]
    entities: list[str]
    tokens: int
    count_tokens: Callable[[str], int]


class QueryBuilder(Protocol):
    """Writes queries. `name` says how, for reports."""

    name: str

    def queries(self, passage: Passage) -> Iterable[str]:
        """Candidates for one passage, best first; the first that is fit is taken."""
