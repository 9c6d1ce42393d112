"""Query builders: extractive, and a local instruct model that writes questions."""

import functools
import itertools
import re
from collections import Counter

import torch

from .passage import MAX_SHARED_RUN, Passage
from .words import STOP_WORDS

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_PAUSE = re.compile(r"[.!?;:—\"“”()\[\]_]")
_SEPARATOR = "; "
_LONGEST_WORD = 24


class ExtractiveBuilder:
    """Queries from the text's own words; offline and deterministic.

    document: a key phrase of each of its paragraphs. paragraph: a key phrase of its key sentence. entity: its list of
    entities, or of its most telling words where it has too few.
    """

    name = "extractive"

    def queries(self, passage: Passage):
        weight = _weights(passage)
        # A document's sentences are asked for their runs again with each length that its summary may have.
        runs = functools.cache(functools.partial(_runs, weight=weight))
        phrases, lists = _phrases(passage.parts, passage, weight, runs), _lists(passage, weight)
        if passage.level == "entity":
            proposed = (lists, phrases)
        elif passage.level == "document":
            proposed = (_summaries(passage, weight, runs), phrases)
        else:
            proposed = (phrases, lists)
        return itertools.chain(*proposed, _pieces(passage))


class InstructBuilder:
    """Questions written by a local instruct model (`transformers`), for documents and paragraphs.

    Entities are asked by their list, which needs no model. model, tokenizer: as `load_model` gives them; the tokenizer
    must have a chat template (ValueError else). openings: how the model's questions begin, in the order in which they
    are tried; small models write none unless they are given the first word. Deterministic: decoding is greedy.
    """

    _PROMPT = "{text}\n\nWrite one very short question about this text. Only the question."

    def __init__(self, model, tokenizer, *, openings=("Who", "What", "Why", "Where", "How", "When", "Which", "Is")):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template: an instruct model is needed to write questions")
        self._model, self._tokenizer, self._openings = model, tokenizer, openings
        self.name = f"questions by {model.config.name_or_path or type(model).__name__}"

    def queries(self, passage: Passage):
        if passage.level == "entity":
            yield from _lists(passage, _weights(passage))
            return
        message = {"role": "user", "content": self._PROMPT.format(text=passage.text)}
        prompt = self._tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        for opening in self._openings:
            inputs = self._tokenizer(prompt + opening, add_special_tokens=False, return_tensors="pt")
            inputs = inputs.to(self._model.device)
            with torch.no_grad():
                output = self._model.generate(**inputs, max_new_tokens=max(passage.tokens, 1), do_sample=False)
            rest = self._tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            # Up to the first question mark; what has none is no question.
            if question := re.match(r"[^?\n]*\?", opening + rest):
                yield question[0]


def _summaries(passage, weight, runs):
    """A key phrase of every paragraph, fewer and fewer of them until they fit."""
    parts = passage.parts
    for kept in range(len(parts), 0, -1):
        chosen = parts[:: max(len(parts) // kept, 1)][:kept]
        tokens = passage.tokens // kept
        fitting = passage._replace(tokens=tokens)
        phrases = [next(_phrases([part], fitting, weight, runs), None) for part in chosen]
        phrases = [phrase for phrase in phrases if phrase]
        if len(phrases) == kept:
            yield _SEPARATOR.join(phrases)


def _phrases(sentences, passage, weight, runs):
    """Runs of words without a pause between them that fit, most telling first; those of the key sentence first."""
    longest = min(passage.tokens, MAX_SHARED_RUN)

    def telling(sentence):
        words = [weight(word[0]) for word in _WORD.finditer(sentence)]
        return sum(words) / max(len(words), 1) ** 0.5

    for sentence in sorted(sentences, key=telling, reverse=True) if len(sentences) > 1 else sentences:
        for run in runs(sentence, longest):
            if passage.count_tokens(run) <= longest:
                yield run


def _runs(sentence, longest, weight):
    """Runs of at most so many words without a pause between them, most telling first."""
    words, runs = list(_WORD.finditer(sentence)), {}
    for first, last in ((i, j) for i in range(len(words)) for j in range(i, min(i + longest, len(words)))):
        if any(word[0].lower() in STOP_WORDS for word in (words[first], words[last])):
            continue
        run = re.sub(r"\s+", " ", sentence[words[first].start() : words[last].end()])
        if _PAUSE.search(run):
            continue
        runs[run] = sum(weight(word[0]) for word in words[first : last + 1])
    return sorted(runs, key=runs.get, reverse=True)


def _lists(passage, weight):
    """Lists of entities as long as they fit; of telling words where there are none, or too few to be distinct."""
    words = dict.fromkeys(word[0] for word in _WORD.finditer(passage.text))
    known = {part for entity in passage.entities for part in _WORD.findall(entity)}
    others = sorted((w for w in words if w not in known and weight(w) > 0), key=weight, reverse=True)
    # First all that fit of the entities; then the same with one of the telling words; then those words alone.
    for start in (passage.entities, *([*passage.entities, other] for other in others)):
        if listed := _fitting(start, passage):
            yield listed
    for start in range(len(others)):
        if listed := _fitting(others[start:], passage):
            yield listed
    yield from others


def _pieces(passage):
    """Any runs of the text that fit, for what is hardly prose: tables, code, verses that repeat themselves."""
    for words in ([word[0] for word in _WORD.finditer(passage.text)], passage.text.split()):
        for length, start in itertools.product(range(1, max(passage.tokens, 1) + 1), range(len(words))):
            yield " ".join(words[start : start + length])
    if max(map(len, words)) <= _LONGEST_WORD:
        return
    # Scripts without spaces, and strings of characters that are no words.
    for length, start in itertools.product((12, 8, 6, 4, 3, 2, 1), range(0, len(passage.text), 4)):
        yield passage.text[start : start + length]


def _fitting(items, passage):
    """Join as many of the items as fit, the last one before the others: a list differs from others by its end."""
    chosen = []
    for item in [*items[-1:], *items[:-1]]:
        if passage.count_tokens(_SEPARATOR.join([*chosen, item])) <= passage.tokens:
            chosen.append(item)
    return _SEPARATOR.join(sorted(chosen, key=items.index))


def _weights(passage):
    """How telling a word is: nothing for function words, most for names and for long words that are rare here."""
    counts = Counter(word.lower() for word in _WORD.findall(passage.text))
    known = {part for entity in passage.entities for part in _WORD.findall(entity)}

    def weight(word):
        if word.lower() in STOP_WORDS or len(word) < 3:
            return 0.0
        return (1.0 + min(len(word), 10) / 10 + (word in known)) / counts.get(word.lower(), 1) ** 0.5

    return weight
