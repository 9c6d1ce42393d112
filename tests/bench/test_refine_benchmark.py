"""`bench.refine` and `bench.self_study`, on a tiny model: their arms, and the form of what they write."""

import json
import random

import pytest

from bench import answers_data, mixed_texts, refine, self_study, texts
from r3mem_fast import load_model
from r3mem_fast.data.corpus import read_texts

WORDS = "abcdefghij klmno pqrst uvwxyz"


def text_of(seed, length):
    letters = random.Random(seed)
    return "".join(letters.choice(WORDS) for _ in range(length)).strip()


@pytest.fixture
def data(tmp_path):
    """A folder with as little of XQuAD as there can be."""
    (tmp_path / "xquad").mkdir()
    paragraphs = [
        {
            "context": text_of(index, 40),
            "qas": [{"question": f"which{asked}", "answers": [{"text": text_of(asked, 4)}]} for asked in range(2)],
        }
        for index in range(3)
    ]
    (tmp_path / answers_data.XQUAD).write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return tmp_path


@pytest.fixture
def small(monkeypatch):
    """Segments that fit into the tiny model's positions."""
    monkeypatch.setattr(refine, "_LENGTH", 32)
    monkeypatch.setattr(refine, "_TAIL", 4)


def measured(folder, data, *arguments):
    output = data / "out.jsonl"
    options = ["--model", str(folder), "--data", str(data), "--dtype", "float32", "--json", "--output", str(output)]
    assert refine.main([*options, *arguments]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()][1:]


@pytest.mark.parametrize(("allocation", "closed"), [("uniform", "matched"), ("adaptive", "adaptive")])
def test_answers_behind_refined_memories(folder, data, small, allocation, closed):
    asked = "both asked text continued other"
    chosen = f"--kind xquad --questions 6 --slots 4 --ratio 3 --steps 1 2 --asked {asked} --allocation"
    found = measured(folder, data, *chosen.split(), allocation)
    refined = {f"{closed}+{steps}{by}" for steps in (1, 2) for by in ("", " asked", " text", " continued", " other")}
    kept = {"full", "nothing", "raw_3", "even_3", "attended_3", "matched_3"}
    kept |= {"adaptive_3", "attended_adaptive_3"} if allocation == "adaptive" else set()
    assert {record["arm"] for record in found if "f1" in record} == kept | refined
    assert refined <= {record["gained_by"] for record in found if "gained_by" in record}
    assert {"seconds_of": "step", "mean": pytest.approx(0.1, abs=10), "count": 30} in found
    better = {(r["arm"], r["nats_better_than"]): r["mean"] for r in found if "nats_better_than" in r}
    rivals = {
        (f"{closed}+{n}{by}", rival)
        for n in (1, 2)
        for by in ("", " asked", " text", " continued")
        for rival in (f"{closed}_3", f"{closed}+{n} other")
    }
    assert better.keys() == rivals
    nats = {record["arm"]: record["nats_per_answer_token"] for record in found if "f1" in record}
    for (arm, rival), mean in better.items():
        assert mean == pytest.approx(nats[rival] - nats[arm], abs=2e-4)


@pytest.mark.parametrize(("allocation", "closed"), [("uniform", "matched"), ("adaptive", "adaptive")])
def test_what_follows_behind_refined_memories(folder, data, small, allocation, closed):
    chosen = "--kind help --segments 3 --slots 8 4 --steps 1 --learning-rate 1e-9 --allocation"
    found = measured(folder, data, *chosen.split(), allocation)
    nats = {record["arm"]: record["nats_per_token"] for record in found if "nats_per_token" in record}
    assert nats.keys() == {"full", "tail", *(f"{closed}_{arm}" for arm in ("8", "8+1", "4", "4+1"))}
    # With no learning to speak of, the memory is what it was.
    better = {(r["arm"], r["nats_better_than"]) for r in found if "nats_better_than" in r}
    assert better == {(f"{closed}_{slots}+1", f"{closed}_{slots}") for slots in (8, 4)}
    assert nats[f"{closed}_8+1"] == nats[f"{closed}_8"] != nats[f"{closed}_4"] == nats[f"{closed}_4+1"]


@pytest.mark.parametrize("kind", ["xquad", "help"])
def test_an_interrupted_run_goes_on(folder, data, small, monkeypatch, kind):
    """The same command refines what is missing, to what a run without an interruption writes."""
    chosen = f"--kind {kind} --segments 3 --questions 6 --slots 4 --ratio 3 --steps 1 --asked both".split()
    whole, run, texts = measured(folder, data, *chosen), refine.refine, []

    def interrupted(*given, **settings):
        if len(texts) == 2:
            raise KeyboardInterrupt
        texts.append(given)
        return run(*given, **settings)

    (data / "out.jsonl").unlink()
    monkeypatch.setattr(refine, "refine", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured(folder, data, *chosen)
    assert (data / "out.jsonl.unfinished").exists()
    texts.clear()
    found = measured(folder, data, *chosen)
    assert len(texts) == 1 and not (data / "out.jsonl.unfinished").exists()
    assert [r for r in found if "seconds_of" not in r] == [r for r in whole if "seconds_of" not in r]


@pytest.mark.parametrize("talks", [False, True])
def test_windows_ask_for_their_passage(folder, tmp_path, monkeypatch, talks):
    model, tokenizer = load_model(folder)
    if talks:
        tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}="
    monkeypatch.setattr(self_study, "load_model", lambda *names, **settings: (model, tokenizer))
    questions = [("Who?", "Ahab"), ("Where?", "At sea")]
    monkeypatch.setattr(self_study, "_questions", lambda model, tokenizer, passages: [questions] * len(passages))
    output, length = tmp_path / "asked.jsonl", 256
    chosen = ["--passages", "6", "--batch", "2", "--segment", str(length), "-o", str(output)]
    assert self_study.main(["help", *chosen]) == 0
    lines = read_texts(output)
    learned = tokenizer.decode(texts.first_part(tokenizer(texts.texts_of("help")[0]).input_ids, 0.5))
    assert len(lines) == 6
    for index, line in enumerate(lines):
        chat = talks and index // 2 % 2 == 1
        passage, asked = line[:length], line[length:]
        assert (passage[1:] if chat else passage) in learned and passage.startswith("[") >= chat
        assert ("[The answer is" in asked) == chat and ("\nAnswer: " in asked) != chat
        assert len(line) <= 2 * length and ("Who?" in asked or "How does the sentence go on" in asked)


def test_questions_are_read_from_what_is_written():
    assert self_study.asked_in(" opened it?\nAnswer: Joseph Locke\nQuestion: Who") == ("opened it?", "Joseph Locke")
    for text in (" opened it?\nAnswer: Jo", " opened it.\nAnswer: Jo\n", f" it?\nAnswer: {'so ' * 30}\n", "", "?\n\n"):
        assert self_study.asked_in(text) is None


def test_held_out_ends_are_left_out_of_mixed_texts(folder, tmp_path):
    chosen = ["help", "--hold-out", "0.9", "--model", str(folder), "-o", str(tmp_path / "mixed.jsonl")]
    assert mixed_texts.main(chosen) == 0
    (found,), (whole,) = read_texts(tmp_path / "mixed.jsonl"), texts.texts_of("help")
    _, tokenizer = load_model(folder)
    assert len(tokenizer(found).input_ids) == pytest.approx(0.1 * len(tokenizer(whole).input_ids), rel=1e-3)
