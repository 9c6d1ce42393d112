"""Context–query pairs of a hierarchy (R3Mem, section 3): document, paragraph, entity.

A builder proposes queries; what a query must be is checked here, alike for all builders.
"""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from tqdm import tqdm

from .builders import ExtractiveBuilder
from .entities import EntityFinder, default_entity_finder
from .passage import MAX_QUERY_SHARE, MAX_SHARED_RUN, Passage, QueryBuilder
from .split import Document, split_document

LEVELS = ("document", "paragraph", "entity")


class Pair(NamedTuple):
    """A context and the query that retrieves it.

    level: "document", "paragraph" or "entity". document: its name. context: its text, verbatim. entities: those that
    the context mentions. builder: which builder wrote the query.
    """

    level: str
    document: str
    query: str
    context: str
    entities: tuple[str, ...]
    builder: str


def build_pairs(
    documents: dict[str, str],
    tokenizer,
    builder: QueryBuilder | None = None,
    *,
    entity_finder: EntityFinder | None = None,
    levels=LEVELS,
    language="en",
    taken=(),
    progress=False,
) -> list[Pair]:
    """The context–query pairs of named documents, document by document, level by level.

    A query has at most 15 % of its context's tokens (but always room for one word), no run of more than 8 tokens that
    its context also has (a list of entities excepted), and no other pair has the same one. Where the builder proposes
    nothing that is fit, the extractive builder does, and the pair says so.
    tokenizer: of the model that is to remember. builder: the extractive one by default. entity_finder: spaCy's where
    it is installed, else a heuristic. levels: some of "document", "paragraph", "entity". language: of the sentences.
    taken: queries of other pairs. progress: show a bar, in characters of the documents.
    Raises ValueError for an empty text, a text that the tokenizer does not give back, or levels that are none.
    """
    extractive = ExtractiveBuilder()
    builder = extractive if builder is None else builder
    entity_finder = default_entity_finder() if entity_finder is None else entity_finder
    if not levels or set(levels) - set(LEVELS):
        raise ValueError(f"levels must be some of {LEVELS}, got {levels!r}")

    def ids_of(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    def count_tokens(text):
        return len(ids_of(text))

    pairs, taken = [], set(taken)
    total = sum(len(text) for text in documents.values() if isinstance(text, str))
    bar = tqdm(total=total, desc="Writing queries", unit="char", unit_scale=True, disable=not progress, leave=False)
    for name, text in documents.items():
        _check_lossless(name, text, tokenizer, ids_of)
        document = split_document(text, name, count_tokens, language)
        names = entity_finder(document.span.text)
        passages = list(_passages(document, names, levels, count_tokens))
        for passage in passages:
            query, wrote = _choose(passage, (builder, extractive), taken, ids_of)
            if query is None and passage.text in {pair.context for pair in pairs if pair.document == name}:
                continue  # too short for two queries
            if query is None:
                raise ValueError(
                    f"document {name!r}: no query of its own is left for the {passage.level} {passage.text[:60]!r}; "
                    "is a text given twice, or does it repeat itself? Leave it out, or pass other levels"
                )
            taken.add(query)
            pairs.append(Pair(passage.level, name, query, passage.text, tuple(passage.entities), wrote.name))
            bar.update(len(text) / len(passages))
    bar.close()
    return pairs


def mentioned(names, text) -> list[str]:
    """Those of `names` that `text` mentions, as whole words, in the order of their first mention."""
    places = {name: re.search(rf"(?<!\w){re.escape(name)}(?!\w)", re.sub(r"\s", " ", text)) for name in names}
    return sorted((name for name in names if places[name]), key=lambda name: places[name].start())


class Runs:
    """All runs of `length` items of a sequence, to ask which other sequences have one of them. Linear in both."""

    def __init__(self, items: Sequence, length: int):
        self._length = length
        self._runs = set(self._of(items))

    def are_in(self, items: Sequence) -> bool:
        """Whether another sequence has one of the runs."""
        return any(run in self._runs for run in self._of(items))

    def _of(self, items):
        return (tuple(items[start : start + self._length]) for start in range(len(items) - self._length + 1))


def contexts_of(document: Document) -> dict[str, list[tuple[str, list[str]]]]:
    """Contexts by level, in order, each with its parts: a document's paragraphs, a paragraph's sentences.

    A paragraph that is the whole document is left out.
    """
    paragraphs = document.paragraphs
    return {
        "document": [(document.span.text, [p.span.text for p in paragraphs])],
        "paragraph": [
            (p.span.text, [s.text for s in p.sentences]) for p in paragraphs if p.span.text != document.span.text
        ],
        "entity": [(passage.text, [passage.text]) for p in paragraphs for passage in p.passages],
    }


def _passages(document: Document, names, levels, count_tokens):
    """The contexts of a document, level by level."""
    by_level = contexts_of(document)
    for level in LEVELS:
        if level not in levels:
            continue
        found = [mentioned(names, text) for text, _ in by_level[level]]
        counts = Counter(itertools.chain(*found))
        for (text, parts), mine in zip(by_level[level], found, strict=True):
            entities = sorted(mine, key=lambda name: counts[name] > 1)
            tokens = int(MAX_QUERY_SHARE * count_tokens(text))
            yield Passage(level, text, parts, entities, tokens, count_tokens)


def _choose(passage, builders, taken, ids_of):
    too_long = None if passage.level == "entity" else Runs(ids_of(passage.text), MAX_SHARED_RUN + 1)
    for builder in builders:
        for candidate in builder.queries(passage):
            query = re.sub(r"\s+", " ", candidate).strip()
            if not re.search(r"\w", query) or query in taken:
                continue
            ids = ids_of(query)
            # One word is always allowed: a context of a few tokens would else have no query at all.
            if len(ids) > passage.tokens and (re.search(r"\W", query) or len(ids) > MAX_SHARED_RUN):
                continue
            # Tokens depend on what stands before a word, so the query is looked for as it stands inside a text too.
            if too_long is not None and (too_long.are_in(ids) or too_long.are_in(ids_of(" " + query))):
                continue
            return query, builder
    return None, None


def _check_lossless(name, text, tokenizer, ids_of):
    if not isinstance(text, str):
        return  # which is refused where it is split
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
