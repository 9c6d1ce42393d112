"""The types that query builders and `build_pairs` share: `Passage` and `QueryBuilder`."""

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

# The most tokens that a query may have, as a share of its context's tokens.
MAX_QUERY_SHARE = 0.15
# The longest run of tokens that a query may have in common with its context.
MAX_SHARED_RUN = 8


class Passage(NamedTuple):
    """A context that a builder is asked to write a query for.

    Attributes:
        level: "document", "paragraph" or "entity".
        text: The context.
        parts: The paragraphs of a document, the sentences of a paragraph; for the level "entity", the text alone.
        entities: Entities that the text mentions; those that no other passage of this level mentions come first.
        tokens: Number of tokens that the query may have.
        count_tokens: Returns the number of tokens of a string.
    """

    level: str
    text: str
    parts: list[str]
    entities: list[str]
    tokens: int
    count_tokens: Callable[[str], int]


class QueryBuilder(Protocol):
    """Writes queries.

    Attributes:
        name: How the queries are written, for reports.
    """

    name: str

    def queries(self, passage: Passage) -> Iterable[str]:
        """Return candidates for one passage, best first; the first that is fit is taken."""
