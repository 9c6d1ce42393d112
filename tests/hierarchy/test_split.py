"""Splitting: spans of the text itself, nothing lost between them, of lengths that leave room for a query."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r3mem_fast.hierarchy import cut_document, split_document

PAGE = """It is a truth universally acknowledged, that a single man in possession of a good
fortune, must be in want of a wife. However little known the feelings of such a man may be!

"My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield Park
is let at last?" Mr. Bennet replied that he had not. "But it is," returned she; "for Mrs. Long
has just been here, and she told me all about it."

Yes.

No.
"""


def words(text):
    return len(text.split())


def pieces(text):
    """As a tokenizer counts that takes one line break to the word behind it: two more make another token."""
    return len(re.findall(r"\n?\w+|\n|[^\w\s]", text))


def test_a_page():
    document = split_document(PAGE, "page", words)
    assert document.name == "page" and document.span.text == PAGE.strip()
    first, second = document.paragraphs
    assert first.span.text.startswith("It is a truth") and first.span.text.endswith("such a man may be!")
    # Short paragraphs are joined with what stands before them.
    assert second.span.text.endswith("Yes.\n\nNo.")
    # Neither a line break nor a title ends a sentence.
    assert [sentence.text.split()[0] for sentence in first.sentences] == ["It", "However"]
    assert any(sentence.text.startswith("Mr. Bennet replied") for sentence in second.sentences)
    assert [passage.text for passage in first.passages] == [first.span.text]


def test_a_long_paragraph_is_cut_between_sentences():
    text = " ".join(f"This is the sentence of number {n} of them." for n in range(40))
    document = split_document(text, "long", words)
    assert len(document.paragraphs) == 3
    assert all(p.span.text.endswith("of them.") for p in document.paragraphs)
    sizes = [words(p.span.text) for p in document.paragraphs]
    assert sum(sizes) == words(text) and max(sizes) - min(sizes) <= 18
    assert all(words(passage.text) >= 27 for p in document.paragraphs for passage in p.passages)


@given(st.text(alphabet="ab. \n!?'\"—é\t\r\u2028中1", max_size=300))
def test_every_span_is_a_piece_of_the_text_and_no_word_is_lost(text):
    if not any(c.isalnum() for c in text):
        with pytest.raises(ValueError, match="holds no text"):
            split_document(text, "x", words)
        return
    document = split_document(text, "x", words)
    passages = [passage for p in document.paragraphs for passage in p.passages]
    sentences = [sentence for p in document.paragraphs for sentence in p.sentences]
    for level in ([p.span for p in document.paragraphs], passages, sentences):
        assert all(span.text == text[span.start : span.end] and span.text.strip() == span.text for span in level)
        assert all(a.end <= b.start for a, b in itertools.pairwise(level))
        covered = "".join(span.text for span in level)
        assert [c for c in covered if not c.isspace()] == [c for c in text if not c.isspace()]


def test_bad_documents():
    for text in ("", " \n ", "—!?"):
        with pytest.raises(ValueError, match="document 'x' holds no text"):
            split_document(text, "x", words)
    with pytest.raises(TypeError, match="must be a string, got bytes"):
        split_document(b"text", "x", words)


BOOK = "".join(f"CHAPTER {n}\n\n" + f"Words of chapter {n} stand here, and more.\n\n" * n for n in range(1, 8))


def test_a_long_text_is_cut_at_chapters():
    assert cut_document(BOOK, "book", words, 1000) == {"book": BOOK}
    parts = cut_document(BOOK, "book", words, 60)
    assert list(parts) == [f"book, part {n}" for n in range(1, len(parts) + 1)]
    assert all(part.startswith("CHAPTER") and words(part) <= 60 for part in parts.values())
    assert " ".join(" ".join(parts.values()).split()) == " ".join(BOOK.split())
    prose = (
        "The part I played in it was small." + BOOK.replace("CHAPTER", "section") + "A letter\npart I wrote is lost."
    )
    assert not any(part.startswith("part I") for part in cut_document(prose, "book", words, 60).values())


TEXTS = [BOOK, BOOK.replace("CHAPTER", "x"), BOOK.replace("\n", " "), BOOK.replace(".", '."'), "a\n\n\nb" * 400]


@given(st.integers(14, 200), st.sampled_from(TEXTS), st.sampled_from([words, pieces]))
def test_parts_fit_and_nothing_is_lost(most, text, count):
    parts = cut_document(text, "book", count, most)
    assert all(count(part) <= most for part in parts.values())
    assert "".join("".join(parts.values()).split()) == "".join(text.split())


def test_what_cannot_be_cut():
    with pytest.raises(ValueError, match=r"passage of 20 tokens without the end of a sentence .* at most 10 fit"):
        cut_document("long " * 20, "book", words, 10)


def test_a_text_of_which_one_part_alone_has_words():
    text = f"{PAGE}\n" + "- - - - -\n" * 40
    assert cut_document(text, "page", words, 100) == {"page": PAGE.strip()}
    assert cut_document(PAGE, "page", words, 200) == {"page": PAGE}
