"""Decoys: queries that nothing is remembered for.

They are real queries with other names in them. A model that learns to answer them with nothing has to know a query,
not merely its kind.
"""

import random
import re
from collections.abc import Sequence

from .pairs import Pair, mentioned
from .words import NAMES


def swap_entities(query: str, entities: Sequence[str], replacements: Sequence[str]) -> str:
    """Replace the entities that a query mentions by other names.

    Args:
        query: The query.
        entities: Entities to look for in it.
        replacements: Names to put in their places, the i-th for the i-th entity that is mentioned.

    Returns:
        The query with other names; the query itself if it mentions none of the entities.

    Raises:
        ValueError: There are fewer replacements than mentioned entities.
    """
    found = mentioned(entities, query)
    if len(replacements) < len(found):
        raise ValueError(f"{len(found)} entities to replace, {len(replacements)} replacements")
    if not found:
        return query
    new = dict(zip(found, replacements, strict=False))
    # Longest first, because a name may be part of another.
    pattern = "|".join(re.escape(name) for name in sorted(found, key=len, reverse=True))
    return re.sub(rf"(?<!\w)({pattern})(?!\w)", lambda match: new[match[0]], query)


def decoys(pairs: Sequence[Pair], count: int, generator: random.Random) -> list[Pair]:
    """Make pairs with an empty context, whose queries are like those of `pairs` but are none of them.

    Half of the decoys get names from other pairs, which are the hardest to refuse; the other half may get names from
    everywhere.

    Args:
        pairs: Pairs to imitate; at least one.
        count: Number of decoys.
        generator: Source of the random choices.

    Returns:
        Decoys with an empty context, no entities, and the builder "decoy".
    """
    known = {pair.query for pair in pairs}
    near = sorted({name for pair in pairs for name in pair.entities})
    everywhere = sorted({*near, *NAMES})
    found: list[Pair] = []
    while len(found) < count:
        pair = generator.choice(pairs)
        others = [name for name in near if name not in pair.entities]
        if len(others) < 8 or generator.random() < 0.5:
            others = [name for name in everywhere if name not in pair.entities]
        others = generator.sample(others, 8)
        query = swap_entities(pair.query, pair.entities, others) if len(pair.entities) <= 8 else pair.query
        if query in known:  # no entity was mentioned, so nothing was replaced
            query = "; ".join(others[: generator.randint(1, 3)])
        if query not in known:
            found.append(Pair(pair.level, pair.document, query, "", (), "decoy"))
    return found
