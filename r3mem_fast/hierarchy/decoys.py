"""Queries that nothing is remembered for: real ones with other names in them, so that a query has to be known."""

import random
import re
from collections.abc import Sequence

from .pairs import Pair, mentioned
from .words import NAMES


def swap_entities(query: str, entities: Sequence[str], replacements: Sequence[str]) -> str:
    """`query` with the entities that it mentions replaced, the i-th by the i-th replacement; as it is if none is.

    Raises ValueError if there are fewer replacements than mentioned entities.
    """
    found = mentioned(entities, query)
    if len(replacements) < len(found):
        raise ValueError(f"{len(found)} entities to replace, {len(replacements)} replacements")
    if not found:
        return query
    new = dict(zip(found, replacements, strict=False))
    # Longest first: a name may be part of another.
    pattern = "|".join(re.escape(name) for name in sorted(found, key=len, reverse=True))
    return re.sub(rf"(?<!\w)({pattern})(?!\w)", lambda match: new[match[0]], query)


def decoys(pairs: Sequence[Pair], count: int, generator: random.Random) -> list[Pair]:
    """`count` pairs with an empty context, whose queries are like those of `pairs` and are none of them.

    The names in one half of them are those of other pairs, which are the hardest to refuse; in the other half, names
    from everywhere too.
    """
    known = {pair.query for pair in pairs}
    near = sorted({name for pair in pairs for name in pair.entities})
    everywhere = sorted({*near, *NAMES})
    found = []
    while len(found) < count:
        pair = generator.choice(pairs)
        others = [name for name in near if name not in pair.entities]
        if len(others) < 8 or generator.random() < 0.5:
            others = [name for name in everywhere if name not in pair.entities]
        others = generator.sample(others, 8)
        query = swap_entities(pair.query, pair.entities, others) if len(pair.entities) <= 8 else pair.query
        if query in known:  # it mentions none
            query = "; ".join(others[: generator.randint(1, 3)])
        if query not in known:
            found.append(Pair(pair.level, pair.document, query, "", (), "decoy"))
    return found
