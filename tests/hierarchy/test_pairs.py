"""Pairs: what a query must be, whoever wrote it; builders, entities and decoys."""

import pydoc_data.topics
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r3mem_fast.hierarchy import (
    LEVELS,
    CapitalisedWords,
    InstructBuilder,
    SpacyEntities,
    build_pairs,
    default_entity_finder,
)
from r3mem_fast.hierarchy.decoys import decoys, swap_entities
from r3mem_fast.hierarchy.pairs import Runs, mentioned, queries_of
from tests.hierarchy.test_split import PAGE


class Tokenizer:
    """A token a word, with the white space before it: gives every text back."""

    chat_template = None

    def __init__(self):
        self.ids = {}

    def __call__(self, text, add_special_tokens=False):
        pieces, word = [], ""
        for char in text:
            if char.isspace() and word.strip():
                pieces.append(word)
                word = ""
            word += char
        pieces += [word] if word else []
        tokens = type("Encoding", (), {})()
        tokens.input_ids = [self.ids.setdefault(piece, len(self.ids)) for piece in pieces]
        return tokens

    def decode(self, ids, **_):
        pieces = {number: piece for piece, number in self.ids.items()}
        return "".join(pieces[number] for number in ids)


@pytest.fixture
def tokenizer():
    return Tokenizer()


def check(pairs, tokenizer):
    """What the issue asks of every document's queries."""
    assert len({pair.query for pair in pairs}) == len(pairs)
    for pair in pairs:
        query, context = tokenizer(pair.query).input_ids, tokenizer(pair.context).input_ids
        assert len(query) <= max(0.15 * len(context), 1), pair
        if pair.level != "entity":
            inside = tokenizer(" " + pair.query).input_ids
            assert not (Runs(context, 9).are_in(query) or Runs(context, 9).are_in(inside)), pair


def test_a_page(tokenizer):
    pairs = build_pairs({"page": PAGE}, tokenizer)
    check(pairs, tokenizer)
    assert [pair.level for pair in pairs] == ["document", "paragraph", "paragraph", *["entity"] * 2]
    assert pairs[0].context == PAGE.strip() and {pair.builder for pair in pairs} == {"extractive"}
    assert all(pair.context in PAGE and pair.document == "page" for pair in pairs)
    assert "Bennet" in pairs[-1].query and "Bennet" in pairs[-1].entities
    assert build_pairs({"page": PAGE}, tokenizer) == pairs


def test_real_text_of_many_kinds(tokenizer):
    """Python's help topics: prose, tables, code, grammar; each topic is a document."""
    topics = pydoc_data.topics.topics
    documents = {name: topics[name][:3000] for name in sorted(topics)[:12]}
    pairs = build_pairs(documents, tokenizer)
    check(pairs, tokenizer)
    assert {pair.document for pair in pairs} == set(documents) and {pair.level for pair in pairs} == set(LEVELS)


def test_levels_and_queries_that_are_taken(tokenizer):
    everything = build_pairs({"page": PAGE}, tokenizer)
    assert {p.level for p in build_pairs({"page": PAGE}, tokenizer, levels=["paragraph"])} == {"paragraph"}
    others = build_pairs({"page": PAGE}, tokenizer, taken={pair.query for pair in everything})
    assert not {p.query for p in others} & {p.query for p in everything}
    assert [p.query for p in build_pairs({"a": "Hello"}, tokenizer)] == ["Hello"]  # has room for one
    twice = build_pairs({"a": PAGE, "b": PAGE}, tokenizer)
    check(twice, tokenizer)


def test_a_builder_whose_queries_are_not_fit(tokenizer):
    """Too long, a quotation, the same for all, nothing: the extractive builder steps in, and the pair says so."""

    class Builder:
        name = "mine"

        def queries(self, passage):
            quotation = " ".join(passage.text.split()[:9])
            yield from (passage.text, quotation, "", "?", "Who  is\nit?")

    pairs = build_pairs({"page": PAGE}, tokenizer, Builder(), levels=["document", "paragraph"])
    assert [(pair.query, pair.builder) for pair in pairs[:1]] == [("Who is it?", "mine")]
    assert {pair.builder for pair in pairs[1:]} == {"extractive"}
    check(pairs, tokenizer)


def test_an_instruct_model_writes_questions(folder, monkeypatch):
    """The prompt goes through the chat template, with a first word; the answer's first question is the query."""
    from r3mem_fast import load_model

    model, letters = load_model(str(folder))
    with pytest.raises(ValueError, match="no chat template"):
        InstructBuilder(model, letters)
    letters.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    asked = []

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample):
        asked.append(letters.decode(input_ids[0]))
        assert not do_sample
        answer = " knows, no question at all." if asked[-1].endswith("Who") else ' is rich?" It is he. Or?'
        return torch.cat([input_ids, letters(answer, return_tensors="pt").input_ids], 1)

    monkeypatch.setattr(type(model), "generate", generate)
    builder = InstructBuilder(model, letters)
    pairs = build_pairs({"page": PAGE[:171]}, letters, builder, levels=["document"])
    assert pairs[0].query == "What is rich?" and pairs[0].builder.startswith("questions by ")
    assert len(asked) == 2 and all(prompt.startswith(PAGE[:60]) for prompt in asked)


def test_bad_input(tokenizer):
    with pytest.raises(ValueError, match="levels must be some of"):
        build_pairs({"x": PAGE}, tokenizer, levels=["chapter"])
    with pytest.raises(ValueError, match="holds no text"):
        build_pairs({"x": "  "}, tokenizer)
    with pytest.raises(ValueError, match="no query of its own is left for the document 'word'"):
        build_pairs({"a": "word", "b": "word"}, tokenizer, levels=["document"])
    lossy = Tokenizer()
    lossy.decode = lambda ids, **_: PAGE.strip().lower()
    with pytest.raises(ValueError, match=r"does not give the text back, from character 0 on: 'It is"):
        build_pairs({"x": PAGE}, lossy)


def test_entities_by_capital_letters():
    text = 'The ship left Nantucket. "Ahab is mad," said Mr. Starbuck of the Iron Crown. He knew '
    text += "Ahab's mind; I'll go. Then"
    assert CapitalisedWords()(text) == ["Nantucket", "Ahab", "Starbuck", "Iron Crown"]
    assert CapitalisedWords()("no name here. None at all.") == []
    assert default_entity_finder().name


def test_entities_by_spacy():
    pytest.importorskip("spacy", reason="the extra [ner] is not installed")
    finder = SpacyEntities()
    assert "spaCy" in finder.name and "Elizabeth" in " ".join(finder("Elizabeth met Mr. Darcy in London in 1813."))


def test_entities_by_spacy_that_is_not_there(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    with pytest.raises(OSError, match=r"pip install 'r3mem_fast\[ner\]'"):
        SpacyEntities()


def test_names_in_queries_are_swapped():
    names = ["Anne", "Anne Elliot", "Bath"]
    assert swap_entities("Anne Elliot went to Bath; Anne", names, ["X", "Y", "Z"]) == "Y went to Z; X"
    assert swap_entities("Annette walks", names, []) == "Annette walks"
    assert mentioned(names, "Bath, said\nAnne\nElliot") == ["Bath", "Anne", "Anne Elliot"]
    with pytest.raises(ValueError, match="3 entities to replace"):
        swap_entities("Anne Elliot in Bath", names, ["X"])


def test_decoys_are_no_queries(tokenizer):
    pairs = build_pairs({"page": PAGE}, tokenizer)
    found = decoys(pairs, 50, random.Random(0))
    assert len(found) == 50 and {pair.context for pair in found} == {""}
    assert not {pair.query for pair in found} & {pair.query for pair in pairs}
    assert found == decoys(pairs, 50, random.Random(0)) != decoys(pairs, 50, random.Random(1))


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12), st.integers(1, 4))
def test_runs_that_two_sequences_share(left, right, length):
    runs = [left[start : start + length] for start in range(len(left) - length + 1)]
    shared = [run for run in runs if any(right[k : k + length] == run for k in range(len(right)))]
    assert Runs(left, length).are_in(right) == bool(shared)


@pytest.mark.parametrize("text", ["-" * 80, "* * *", '."', " \n "])
def test_a_piece_without_a_word_asks_for_nothing(tokenizer, text):
    """Pieces of a text are cut at any token: one may be a rule alone."""
    assert queries_of(text, tokenizer) == []


class Letters(Tokenizer):
    """Two tokens a letter, as byte-level tokenizers of English read Chinese."""

    def __call__(self, text, add_special_tokens=False):
        tokens = type("Encoding", (), {})()
        tokens.input_ids = [code for letter in text for code in (ord(letter), 0x110000)]
        return tokens

    def decode(self, ids, **_):
        return "".join(map(chr, ids[::2]))


@pytest.mark.parametrize("text", ["安娜把钥匙放在磨坊里。", "清晨的阳光洒在古老的石桥上，河水静静地流过小镇。"])
def test_a_clause_without_spaces_is_cut_where_it_is_too_long_for_a_query(text):
    pairs = build_pairs({"zh": text}, Letters())
    assert {pair.level for pair in pairs} == {"document", "entity"} and pairs[0].query != pairs[1].query
    assert all(pair.query in text and 0 < len(pair.query) < 5 for pair in pairs)


@pytest.mark.parametrize("rule", ["🎉🏆 " * 40, "◆◇ " * 40, "- - " * 40])
def test_a_block_without_a_word_belongs_to_its_neighbour(tokenizer, rule):
    pairs = build_pairs({"page": f"{PAGE}\n\n{rule}\n\n{PAGE.replace('Bennet', 'Lucas')}"}, tokenizer)
    check(pairs, tokenizer)
    assert any(rule.strip() in pair.context for pair in pairs if pair.level == "paragraph")


def test_a_document_of_one_paragraph_has_one(tokenizer):
    """The document is no context of its own where that level is left out."""
    both = {"short": "Anna took the blue key to the mill.", "long": PAGE}
    assert {pair.document for pair in build_pairs(both, tokenizer, levels=["paragraph"])} == set(both)
    assert not [p for p in build_pairs(both, tokenizer) if (p.document, p.level) == ("short", "paragraph")]
