"""Makes context–query pairs of a hierarchy (R3Mem, section 3): document, paragraph, entity.

A builder proposes queries; whether a query is fit is decided here, alike for all builders.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from ..choices import LEVELS
from .builders import ExtractiveBuilder
from .entities import EntityFinder, default_entity_finder
from .passage import MAX_QUERY_SHARE, MAX_SHARED_RUN, Passage, QueryBuilder
from .split import Document, has_words, split_document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Pair(NamedTuple):
    """A context and the query that retrieves it.

    Attributes:
        level: "document", "paragraph" or "entity".
        document: Name of the document that holds the context.
        query: The query.
        context: Text of the context, verbatim.
        entities: Entities that the context mentions.
        builder: Name of the builder that wrote the query.
    """

    level: str
    document: str
    query: str
    context: str
    entities: tuple[str, ...]
    builder: str


def build_pairs(
    documents: dict[str, str],
    tokenizer: "PreTrainedTokenizerBase",
    builder: QueryBuilder | None = None,
    *,
    entity_finder: EntityFinder | None = None,
    levels: Collection[str] = LEVELS,
    language: str = "en",
    taken: Iterable[str] = (),
    progress: bool = False,
) -> list[Pair]:
    """Make the context–query pairs of documents.

    A query has at most 15 % of its context's tokens (but always room for one word), no run of more than 8 tokens that
    its context also has (a list of entities excepted), and no other pair has the same one. Where the builder proposes
    nothing that is fit, the extractive builder does, and the pair says so.

    Args:
        documents: Texts by name.
        tokenizer: Tokenizer of the model that is to remember the pairs.
        builder: What writes the queries; None: an `ExtractiveBuilder`.
        entity_finder: What finds the entities; None: spaCy where it is installed, else a heuristic.
        levels: Some of "document", "paragraph", "entity".
        language: Language of the sentences, as pysbd names it.
        taken: Queries of other pairs, which are not used again.
        progress: Show a progress bar, in characters of the documents.

    Returns:
        The pairs, document by document and level by level.

    Raises:
        TypeError: A document is no string.
        ValueError: A text is empty, the tokenizer does not give it back, it leaves no query of its own for a context,
            or a level is unknown.
    """
    extractive = ExtractiveBuilder()
    builder = extractive if builder is None else builder
    entity_finder = default_entity_finder() if entity_finder is None else entity_finder
    if not levels or set(levels) - set(LEVELS):
        raise ValueError(f"levels must be some of {LEVELS}, got {levels!r}")

    ids_of, count_tokens = _readers(tokenizer)
    pairs: list[Pair] = []
    taken = set(taken)
    total = sum(len(text) for text in documents.values() if isinstance(text, str))
    bar = tqdm(total=total, desc="Writing queries", unit="char", unit_scale=True, disable=not progress, leave=False)
    for name, text in documents.items():
        _check_lossless(name, text, tokenizer, ids_of)
        document = split_document(text, name, count_tokens, language)
        names = entity_finder(document.span.text)
        passages = list(_passages(document, names, levels, count_tokens))
        for passage in passages:
            chosen = _choose(passage, (builder, extractive), taken, ids_of)
            if chosen is None and passage.text in {pair.context for pair in pairs if pair.document == name}:
                continue  # another level has this context already, and the text is too short for two queries
            if chosen is None:
                raise ValueError(
                    f"document {name!r}: no query of its own is left for the {passage.level} {passage.text[:60]!r}; "
                    "is a text given twice, or does it repeat itself? Leave it out, or pass other levels"
                )
            query, wrote = chosen
            taken.add(query)
            pairs.append(Pair(passage.level, name, query, passage.text, tuple(passage.entities), wrote.name))
            bar.update(len(text) / len(passages))
    bar.close()
    return pairs


def queries_of(text: str, tokenizer: "PreTrainedTokenizerBase", language: str = "en") -> list[str]:
    """Write the queries of a text's hierarchy, by the extractive builder; for parts for which none is fit, none.

    Args:
        text: Any text, also a piece of one.
        tokenizer: Tokenizer of the model that is to be asked.
        language: Language of the sentences, as pysbd names it.
    """
    if not has_words(text):
        return []
    ids_of, count_tokens = _readers(tokenizer)
    document = split_document(text, "text", count_tokens, language)
    passages = _passages(document, default_entity_finder()(document.span.text), LEVELS, count_tokens)
    taken: set[str] = set()
    for passage in passages:
        chosen = _choose(passage, (ExtractiveBuilder(),), taken, ids_of)
        if chosen is not None:
            taken.add(chosen[0])
    return sorted(taken)


def _readers(tokenizer):
    """Functions that give the token ids of a text, and their number."""

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    return ids_of, lambda text: len(ids_of(text))


def mentioned(names: Iterable[str], text: str) -> list[str]:
    """Return the names that a text mentions as whole words.

    Args:
        names: Names to look for.
        text: The text; any white space in it counts as a space.

    Returns:
        The names found, in the order of their first mention.
    """
    text = re.sub(r"\s", " ", text)
    found = ((name, re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)) for name in names)
    places = [(name, match.start()) for name, match in found if match]
    return [name for name, _ in sorted(places, key=lambda place: place[1])]


class Runs:
    """All runs of a given length in a sequence, to find out whether other sequences have one of them.

    Building and asking take time linear in the length of the sequence.
    """

    def __init__(self, items: Sequence, length: int) -> None:
        """Note the runs of a sequence.

        Args:
            items: The sequence, of hashable items.
            length: Number of items of a run.
        """
        self._length = length
        self._runs = set(self._of(items))

    def are_in(self, items: Sequence) -> bool:
        """Whether another sequence has one of the runs.

        Args:
            items: The other sequence.
        """
        return any(run in self._runs for run in self._of(items))

    def _of(self, items: Sequence) -> Iterator[tuple]:
        return (tuple(items[start : start + self._length]) for start in range(len(items) - self._length + 1))


def contexts_of(document: Document, levels: Collection[str] = LEVELS) -> dict[str, list[tuple[str, list[str]]]]:
    """Return the contexts of a document by level.

    A paragraph that is the whole document is left out, if the document is a context itself.

    Args:
        document: The document.
        levels: Levels that are wanted. Contexts of the others are among what is returned, too.

    Returns:
        For each level its contexts, in order, each with its parts: the paragraphs of a document, the sentences of a
        paragraph, and for the level "entity" the passage itself.
    """
    paragraphs = document.paragraphs
    doubled = document.span.text if "document" in levels else None
    return {
        "document": [(document.span.text, [p.span.text for p in paragraphs])],
        "paragraph": [(p.span.text, [s.text for s in p.sentences]) for p in paragraphs if p.span.text != doubled],
        "entity": [(passage.text, [passage.text]) for p in paragraphs for passage in p.passages],
    }


def _passages(
    document: Document, names: list[str], levels: Collection[str], count_tokens: Callable[[str], int]
) -> Iterator[Passage]:
    """Yield the contexts of a document, level by level."""
    by_level = contexts_of(document, levels)
    for level in LEVELS:
        if level not in levels:
            continue
        found = [mentioned(names, text) for text, _ in by_level[level]]
        counts = Counter(itertools.chain(*found))  # in how many contexts of this level a name is mentioned
        for (text, parts), mine in zip(by_level[level], found, strict=True):
            entities = sorted(mine, key=lambda name: counts[name] > 1)
            tokens = int(MAX_QUERY_SHARE * count_tokens(text))
            yield Passage(level, text, parts, entities, tokens, count_tokens)


def _choose(
    passage: Passage, builders: Sequence[QueryBuilder], taken: set[str], ids_of: Callable[[str], list[int]]
) -> tuple[str, QueryBuilder] | None:
    """Return the first fit query and the builder that proposed it; None if there is none."""
    too_long = None if passage.level == "entity" else Runs(ids_of(passage.text), MAX_SHARED_RUN + 1)
    for builder in builders:
        for candidate in builder.queries(passage):
            query = re.sub(r"\s+", " ", candidate).strip()
            if not re.search(r"\w", query) or query in taken:
                continue
            ids = ids_of(query)
            # One word is always allowed, or a context of a few tokens would have no query at all.
            if len(ids) > passage.tokens and (re.search(r"\W", query) or len(ids) > MAX_SHARED_RUN):
                continue
            # A word's tokens depend on what stands before it, so look for the query as it stands inside a text too.
            if too_long is not None and (too_long.are_in(ids) or too_long.are_in(ids_of(" " + query))):
                continue
            return query, builder
    return None


def _check_lossless(name: str, text: object, tokenizer: Any, ids_of: Callable[[str], list[int]]) -> None:
    """Raise ValueError unless the tokenizer gives the text back from its token ids."""
    if not isinstance(text, str):
        return  # `split_document` refuses it
    text = text.strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"document {name!r} is no Unicode text: {error}") from None
    back = tokenizer.decode(ids_of(text), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if back != text:
        at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
        raise ValueError(
            f"document {name!r}: the tokenizer does not give the text back, from character {at} on: "
            f"{text[at : at + 20]!r} became {back[at : at + 20]!r}. Normalise the text (Unicode form, control "
            "characters), or use another model"
        )
