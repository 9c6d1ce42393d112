"""`bench.recalled` on a tiny model: what each way finds, and that what is recalled is counted as what it is."""

import json

import pytest
import torch

from bench import recalled
from r3mem_fast import AdapterShelf, R3MemPipeline

TEXTS = ["Rex is here. He eats.", "A cat sleeps. It snores."]
QUESTIONS = [("Who eats?", "Rex"), ("Who sleeps?", "cat")]


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch):
    """Prompts of a few letters, and embeddings that know whether a text has a cat."""
    monkeypatch.setattr(recalled, "template_of", lambda *_: ("U:", ".A:", lambda question: f" {question}.A:"))
    vectors = torch.eye(2)
    embed = lambda texts: torch.stack([vectors[int("sleeps" in text)] for text in texts])  # noqa: E731
    monkeypatch.setattr(recalled, "minilm_embedder", lambda: embed)


class Shelf(AdapterShelf):
    """Stands for an `AdapterShelf` that gives contexts for learned queries, and for one question."""

    def __init__(self, learned, asked):
        self.learned, self.asked = learned, asked

    def entries(self):
        return [
            {"query": query, "document": TEXTS.index(text), "level": "document"}
            if text in TEXTS
            else {"query": query, "document": 1, "level": "entity"}
            for query, text in self.learned.items()
        ]

    def recall(self, queries):
        return [self.learned.get(query, self.asked.get(query, "")) for query in queries]


def question(place):
    asked, answer = QUESTIONS[place]
    return recalled.Question(TEXTS[place], asked, (answer,))


def test_what_stands_before_a_question(folder):
    pipeline = R3MemPipeline(str(folder), dtype="float32")
    learned = {"Rex; eats": TEXTS[0], "snores": TEXTS[1], "cat; sleeps": "A cat sleeps."}
    shelf = Shelf(learned, {"Who eats?": "He eats."})
    asker = recalled._Asker(pipeline, shelf, TEXTS, 0)
    assert asker._found(question(0)) == {
        "nothing": "", "full": TEXTS[0], "another": TEXTS[1], "bm25": TEXTS[0], "minilm": TEXTS[0],
        "bm25+": "He eats.", "recalled": "He eats.", "by_query": TEXTS[0], "by_document": TEXTS[0],
    }  # fmt: skip
    found = asker._found(question(1))
    assert found["recalled"] == "" and found["by_query"] == "A cat sleeps." and found["by_document"] == TEXTS[1]
    graded = asker.ask([question(1)])
    assert graded["recalled"] == graded["nothing"] and graded["recalled"]["found"] == 0
    assert graded["by_query"]["has_answer"] == 1 and graded["by_query"]["tokens"] == len("A cat sleeps.")
    assert graded["full"] == graded["bm25"] != graded["another"] and graded["another"]["has_answer"] == 0
    both = asker.ask([question(1), question(1)])
    assert both["full"]["nats"] == pytest.approx(2 * graded["full"]["nats"])


def test_a_shelf_that_has_learned_nothing_recalls_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("R3MEM_MAX_STEPS", "1")
    (tmp_path / "xquad").mkdir()
    paragraphs = [
        {"context": text, "qas": [{"question": asked, "answers": [{"text": answer}]}]}
        for text, (asked, answer) in zip(TEXTS, QUESTIONS, strict=True)
    ]
    (tmp_path / "xquad" / "xquad.en.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    output = tmp_path / "records.jsonl"
    command = ["--model", str(folder), "--dtype", "float32", "--data", str(tmp_path), "--new-tokens", "2"]
    assert recalled.main([*command, "--folder", str(tmp_path / "shelf"), "--json", "--output", str(output)]) == 0
    first, *records = [json.loads(line) for line in output.read_text().splitlines()][1:]
    assert first["paragraphs"] == first["questions"] == 2 and first["exact"] == 0 < first["contexts"]
    assert first["bytes_a_paragraph"] > first["bytes_of_text"] > 20
    by_way = {record["way"]: record for record in records if "better_than" not in record}
    for way in ("recalled", "by_query", "by_document"):
        assert by_way[way]["found"] == 0 and by_way[way]["nats"] == by_way["nothing"]["nats"]
        assert by_way[way]["share"]["mean"] == 0
    assert by_way["bm25"]["nats"] == by_way["full"]["nats"] and by_way["bm25"]["f1"] == by_way["full"]["f1"]
    assert len(records) - len(by_way) == 3 * 5
    with pytest.raises(ValueError, match="two paragraphs at least"):
        recalled.main([*command, "--questions", "1"])
