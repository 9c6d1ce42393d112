"""Query builders: one that takes a text's own words, and one that has an instruct model write questions."""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .passage import MAX_SHARED_RUN, Passage
from .words import STOP_WORDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
# What ends a phrase: a key phrase never reaches over one of these.
_PAUSE = re.compile(r"[.!?;:—\"“”()\[\]_]")
_SEPARATOR = "; "


class ExtractiveBuilder:
    """Makes queries from the text's own words; works offline and is deterministic.

    A document is asked for by a key phrase of each of its paragraphs, a paragraph by a key phrase of its key sentence,
    and an entity's passage by the list of its entities, or of its most telling words where it has too few entities.

    Attributes:
        name: How the queries were made, for reports.
    """

    name = "extractive"

    def queries(self, passage: Passage) -> Iterator[str]:
        """Propose queries for a passage.

        Args:
            passage: The context to ask for.

        Returns:
            Candidates, best first. The last ones are arbitrary pieces of the text, so that there are always some.
        """
        weight = _weights(passage)
        # Cached, because a document's summaries ask for the runs of the same paragraphs once for each length.
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
    """Has a local instruct model of `transformers` write questions for documents and paragraphs.

    Entities are asked for by their list, which needs no model. Decoding is greedy, so the result is deterministic.

    Attributes:
        name: How the queries were made, for reports.
    """

    _PROMPT = "{text}\n\nWrite one very short question about this text. Only the question."

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        openings: Sequence[str] = ("Who", "What", "Why", "Where", "How", "When", "Which", "Is"),
    ) -> None:
        """Take the model that is to write.

        Args:
            model: A causal language model, as `load_model` returns it.
            tokenizer: The model's tokenizer, with a chat template.
            openings: First words of the questions, in the order in which they are tried. Small models write no
                question unless they are given its first word.

        Raises:
            ValueError: The tokenizer has no chat template.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template: an instruct model is needed to write questions")
        # Any: `generate` is not declared by PreTrainedModel.
        self._model: Any = model
        self._tokenizer: Any = tokenizer
        self._openings = openings
        self.name = f"questions by {model.config.name_or_path or type(model).__name__}"

    def queries(self, passage: Passage) -> Iterator[str]:
        """Propose queries for a passage, one for each opening of which the model makes a question.

        Args:
            passage: The context to ask for.

        Yields:
            Candidates, in the order of the openings; for an entity's passage, lists of entities, best first.
        """
        if passage.level == "entity":
            yield from _lists(passage, _weights(passage))
            return
        import torch  # here, so that what needs no model needs no torch

        message = {"role": "user", "content": self._PROMPT.format(text=passage.text)}
        prompt = self._tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        for opening in self._openings:
            inputs = self._tokenizer(prompt + opening, add_special_tokens=False, return_tensors="pt")
            inputs = inputs.to(self._model.device)
            with torch.no_grad():
                output = self._model.generate(**inputs, max_new_tokens=max(passage.tokens, 1), do_sample=False)
            rest = self._tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            # Keep what stands before the first question mark; a text without one is no question.
            if question := re.match(r"[^?\n]*\?", opening + rest):
                yield question[0]


def _summaries(passage: Passage, weight: Callable[[str], float], runs: Callable) -> Iterator[str]:
    """Yield lists of a key phrase from every paragraph, then from fewer and fewer paragraphs until the list fits."""
    parts = passage.parts
    for kept in range(len(parts), 0, -1):
        chosen = parts[:: max(len(parts) // kept, 1)][:kept]
        tokens = passage.tokens // kept
        fitting = passage._replace(tokens=tokens)
        found = [next(_phrases([part], fitting, weight, runs), None) for part in chosen]
        phrases = [phrase for phrase in found if phrase]
        if len(phrases) == kept:
            yield _SEPARATOR.join(phrases)


def _phrases(sentences: list[str], passage: Passage, weight: Callable[[str], float], runs: Callable) -> Iterator[str]:
    """Yield runs of words that are short enough for a query, most telling first; those of the key sentence first."""
    longest = min(passage.tokens, MAX_SHARED_RUN)

    def telling(sentence: str) -> float:
        words = [weight(word[0]) for word in _WORD.finditer(sentence)]
        return sum(words) / max(len(words), 1) ** 0.5

    for sentence in sorted(sentences, key=telling, reverse=True) if len(sentences) > 1 else sentences:
        for run in runs(sentence, longest):
            if passage.count_tokens(run) <= longest:
                yield run


def _runs(sentence: str, longest: int, weight: Callable[[str], float]) -> list[str]:
    """Return the runs of at most `longest` words without a pause between them, most telling first.

    A run neither begins nor ends with a function word.
    """
    words = list(_WORD.finditer(sentence))
    runs: dict[str, float] = {}
    for first, last in ((i, j) for i in range(len(words)) for j in range(i, min(i + longest, len(words)))):
        if any(word[0].lower() in STOP_WORDS for word in (words[first], words[last])):
            continue
        run = re.sub(r"\s+", " ", sentence[words[first].start() : words[last].end()])
        if _PAUSE.search(run):
            continue
        runs[run] = sum(weight(word[0]) for word in words[first : last + 1])
    return sorted(runs, key=runs.__getitem__, reverse=True)


def _lists(passage: Passage, weight: Callable[[str], float]) -> Iterator[str]:
    """Yield lists of entities, each as long as fits, then lists of telling words.

    The words serve passages without entities, and those whose entities other passages have too.
    """
    words = dict.fromkeys(word[0] for word in _WORD.finditer(passage.text))
    known = {part for entity in passage.entities for part in _WORD.findall(entity)}
    others = sorted((w for w in words if w not in known and weight(w) > 0), key=weight, reverse=True)
    # First the entities, as many as fit; then the entities with one of the telling words; then those words alone.
    for start in (passage.entities, *([*passage.entities, other] for other in others)):
        if listed := _fitting(start, passage):
            yield listed
    for first in range(len(others)):
        if listed := _fitting(others[first:], passage):
            yield listed
    yield from others


def _pieces(passage: Passage) -> Iterator[str]:
    """Yield arbitrary pieces of the text, for what is hardly prose: tables, code, verses that repeat themselves."""
    for words in ([word[0] for word in _WORD.finditer(passage.text)], passage.text.split()):
        for length, start in itertools.product(range(1, max(passage.tokens, 1) + 1), range(len(words))):
            yield " ".join(words[start : start + length])
    if all(passage.count_tokens(word) <= max(passage.tokens, MAX_SHARED_RUN) for word in words):
        return
    # Scripts without spaces, and strings of characters that are no words, have to be cut inside of "words".
    for length, start in itertools.product((12, 8, 6, 4, 3, 2, 1), range(0, len(passage.text), 4)):
        yield passage.text[start : start + length]


def _fitting(items: Sequence[str], passage: Passage) -> str:
    """Join as many items as fit into a query, in their order.

    The last item is chosen before the others, because the lists that are tried differ in their ends.
    """
    chosen: list[str] = []
    for item in [*items[-1:], *items[:-1]]:
        if passage.count_tokens(_SEPARATOR.join([*chosen, item])) <= passage.tokens:
            chosen.append(item)
    return _SEPARATOR.join(sorted(chosen, key=items.index))


def _weights(passage: Passage) -> Callable[[str], float]:
    """Return a function that says how telling a word is.

    It gives 0 to function words, and most to names and to long words that are rare in the passage.
    """
    counts = Counter(word.lower() for word in _WORD.findall(passage.text))
    known = {part for entity in passage.entities for part in _WORD.findall(entity)}

    def weight(word: str) -> float:
        if word.lower() in STOP_WORDS or len(word) < 3:
            return 0.0
        return (1.0 + min(len(word), 10) / 10 + (word in known)) / counts.get(word.lower(), 1) ** 0.5

    return weight
