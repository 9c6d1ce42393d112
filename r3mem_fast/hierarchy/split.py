"""Splits a text into a hierarchy: document → paragraph → passage of sentences, each a span of the text itself."""

import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

with warnings.catch_warnings():
    # pysbd 0.3.4 has regular expressions with escapes that Python warns about when it compiles them.
    warnings.simplefilter("ignore", SyntaxWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    import pysbd

# Fewest and most tokens of a paragraph, and the fewest of a passage. A query may take 15 % of its context's tokens;
# shorter contexts than these would leave it hardly a word.
PARAGRAPH_TOKENS = (32, 128)
PASSAGE_TOKENS = 27

_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
_HEADING = re.compile(
    # Only punctuation may stand behind the number: "part I played in it" is no heading.
    r"(?=^[ \t]*(?:#{1,3}[ \t]+\S|(?:chapter|book|part|volume|act|scene|canto|letter|section)[ \t]+"
    r"(?:\d+|[ivxlc]+)[ \t]*(?:[.:—–-]|$)))",
    re.IGNORECASE | re.MULTILINE,
)
# Where a long text is cut, best places first: before a chapter's heading, at a blank line, at the end of a line, after
# a sentence. Chinese and Japanese sentences end without white space.
_BORDERS = (
    _HEADING, _BLANK_LINES, re.compile(r"\n"), re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"'”’)\]]))\s+|(?<=[。！？])"),
)  # fmt: skip
# And where a sentence is cut that is too long: between words, and in words between letters.
_INSIDE = (re.compile(r"\s+"), re.compile(r"(?<=\S)(?=\S)"))


class Span(NamedTuple):
    """A piece of a document, without white space around it.

    Attributes:
        text: The piece, `document[start:end]`.
        start: Index of its first character.
        end: Index behind its last character.
    """

    text: str
    start: int
    end: int


class Paragraph(NamedTuple):
    """A paragraph of a document.

    Attributes:
        span: The whole paragraph.
        sentences: Its sentences, in order.
        passages: Runs of whole sentences, which are the contexts of the level "entity".
    """

    span: Span
    sentences: list[Span]
    passages: list[Span]


class Document(NamedTuple):
    """A document and its paragraphs.

    Attributes:
        name: The document's name.
        span: The whole text.
        paragraphs: Its paragraphs, in order.
    """

    name: str
    span: Span
    paragraphs: list[Paragraph]


def has_words(text: str) -> bool:
    """Whether a text has a letter or a digit, and is not a rule or white space alone."""
    return re.search(r"\w", text) is not None


def split_document(text: str, name: str, count_tokens: Callable[[str], int], language: str = "en") -> Document:
    """Split a text into paragraphs (at blank lines), sentences (pysbd) and passages of sentences.

    Neighbouring paragraphs of fewer than 32 tokens (headings, lines of dialogue) are joined, and one of more than 128
    is cut between sentences; passages have at least 27 tokens where the paragraph allows it. A single sentence is
    never cut.

    Args:
        text: The text.
        name: The document's name.
        count_tokens: Returns the number of tokens of a string.
        language: Language of the sentences, as pysbd names it.

    Returns:
        The document, whose spans refer to `text`.

    Raises:
        TypeError: The text is no string.
        ValueError: The text has no word.
    """
    if not isinstance(text, str):
        raise TypeError(f"document {name!r} must be a string, got {type(text).__name__}")
    if not has_words(text):
        raise ValueError(f"document {name!r} holds no text")
    segmenter = pysbd.Segmenter(language=language, clean=False, char_span=True)
    low, high = PARAGRAPH_TOKENS
    blocks = _joined(_split_at(text, _BLANK_LINES), text, low, count_tokens)
    paragraphs = []
    for block in blocks:
        sentences = _sentences(segmenter, text, block)
        parts = -(-count_tokens(block.text) // high)
        for run in _runs(sentences, parts, count_tokens):
            span = _span(text, run[0].start, run[-1].end)
            paragraphs.append(Paragraph(span, run, _joined(run, text, PASSAGE_TOKENS, count_tokens)))
    return Document(name, _span(text, 0, len(text)), paragraphs)


def cut_document(
    text: str, name: str, count_tokens: Callable[[str], int], most: int, *, anywhere: bool = False
) -> dict[str, str]:
    """Cut a long text into documents of at most `most` tokens.

    A text that is too long is cut before the headings of chapters; a part that is still too long, at paragraphs, lines
    or sentences. Neighbours stay together as far as they fit. Nothing is lost but white space, and parts without a
    word.

    Args:
        text: The text.
        name: The text's name.
        count_tokens: Returns the number of tokens of a string.
        most: The most tokens that a document may have.
        anywhere: Whether a sentence is cut, too, if it has more tokens.

    Returns:
        Documents by name: the text itself under its name, or its parts under `NAME, part 1` and so on.

    Raises:
        ValueError: A sentence has more tokens, and is not to be cut.
    """
    borders = _BORDERS + _INSIDE if anywhere else _BORDERS
    cut = [span.text for span in _cut(text, _span(text, 0, len(text)), name, count_tokens, most, borders)]
    parts = [part for part in cut if has_words(part)]
    if len(cut) < 2 or not parts:
        return {name: text}
    if len(parts) == 1:
        return {name: parts[0]}
    return {f"{name}, part {number}": part for number, part in enumerate(parts, 1)}


def _cut(
    text: str,
    whole: Span,
    name: str,
    count_tokens: Callable[[str], int],
    most: int,
    borders: tuple[re.Pattern[str], ...],
) -> list[Span]:
    """Cut the span `whole` of a text at the first of the borders; parts that are too long, at the other ones."""
    if count_tokens(whole.text) <= most:
        return [whole]
    if not borders:
        raise ValueError(
            f"document {name!r} has a passage of {count_tokens(whole.text)} tokens without the end of a sentence or a "
            f"line, and at most {most} fit the model's positions: break it into lines. It begins {whole.text[:60]!r}"
        )
    parts: list[Span] = []
    size = 0  # tokens of the last part
    for found in _split_at(whole.text, borders[0]):
        span = _span(text, whole.start + found.start, whole.start + found.end)
        if parts:
            both = _span(text, parts[-1].start, span.end)
            # Adding up is quick but, as pieces are counted with the white space before them, not exact: count the
            # whole anew near the limit.
            joined = size + count_tokens(text[parts[-1].end : span.end])
            joined = count_tokens(both.text) if joined > 0.9 * most else joined
        if parts and joined <= most:
            parts[-1], size = both, joined
        else:
            parts += _cut(text, span, name, count_tokens, most, borders[1:])
            size = count_tokens(parts[-1].text)
    return parts


def _split_at(text: str, separator: re.Pattern[str]) -> list[Span]:
    """Return what stands between the matches of a pattern, leaving out what is empty."""
    starts = [0, *(match.end() for match in separator.finditer(text))]
    ends = [*(match.start() for match in separator.finditer(text)), len(text)]
    spans = (_span(text, start, end) for start, end in zip(starts, ends, strict=True))
    return [span for span in spans if span.text]


def _span(text: str, start: int, end: int) -> Span:
    """Return the span from `start` to `end`, less the white space around it."""
    piece = text[start:end]
    start += len(piece) - len(piece.lstrip())
    piece = piece.strip()
    return Span(piece, start, start + len(piece))


def _sentences(segmenter: pysbd.Segmenter, text: str, block: Span) -> list[Span]:
    """Return the sentences of a block; a piece without a word belongs to the sentence before it."""
    # White space becomes spaces, as a line break inside a paragraph ends no sentence.
    found = segmenter.segment(re.sub(r"\s", " ", block.text))
    starts = [block.start + sentence.start for sentence in found if has_words(sentence.sent)]
    starts = [block.start, *(start for start in sorted(set(starts)) if start > block.start)]
    return [_span(text, start, end) for start, end in zip(starts, [*starts[1:], block.end], strict=True)]


def _joined(spans: list[Span], text: str, least: int, count_tokens: Callable[[str], int]) -> list[Span]:
    """Join neighbours until each span has `least` tokens and a word; a rest goes to the span before it."""
    joined: list[Span] = []
    start = None
    for span in spans:
        start = span.start if start is None else start
        whole = _span(text, start, span.end)
        if has_words(whole.text) and count_tokens(whole.text) >= least:
            joined.append(whole)
            start = None
    if start is not None:
        start = joined.pop().start if joined else start
        joined.append(_span(text, start, spans[-1].end))
    return joined


def _runs(sentences: list[Span], parts: int, count_tokens: Callable[[str], int]) -> list[list[Span]]:
    """Group sentences into at most `parts` runs of about equal length in tokens."""
    lengths = [count_tokens(sentence.text) for sentence in sentences]
    total, passed = sum(lengths), 0
    runs: list[list[Span]] = [[]]
    for sentence, length in zip(sentences, lengths, strict=True):
        # A sentence belongs to the part that its middle lies in.
        part = min(int((passed + length / 2) * parts / total), parts - 1)
        if runs[-1] and part >= len(runs):
            runs.append([])
        runs[-1].append(sentence)
        passed += length
    return runs
