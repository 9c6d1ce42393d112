"""`bench.memory_answers`: its data, grades and arms, on a tiny model and made-up questions."""

import gzip
import json
import random

import pytest
import torch

from bench import answers_data, memory_answers, prompts
from bench.answers_data import Question
from bench.asking import answered
from bench.presses import PRESSES, is_installed, keep_shared
from bench.rivals import laid_out
from r3mem_fast import R3MemConfig, R3MemModel, R3MemPipeline, load_model

WORDS = "abcdefghij klmno pqrst uvwxyz"


def text_of(seed, length):
    letters = random.Random(seed)
    return "".join(letters.choice(WORDS) for _ in range(length)).strip()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with as little of each data set as there can be."""
    root = tmp_path_factory.mktemp("data")
    for name in ("xquad", "qmsum", "lost_in_the_middle"):
        (root / name).mkdir()
    paragraphs = [
        {
            "context": text_of(index, 40),
            "qas": [{"question": f"which{asked}", "answers": [{"text": text_of(asked, 4)}]} for asked in range(3)],
        }
        for index in range(3)
    ]
    (root / answers_data.XQUAD).write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    turns = [{"speaker": "S", "content": f"{text_of(index, 12)} {{disfmarker}}"} for index in range(8)]
    meeting = {
        "meeting_transcripts": turns,
        "general_query_list": [{"query": "all", "answer": "abc"}],
        "specific_query_list": [{"query": "part", "answer": "def", "relevant_text_span": [["5", "6"]]}],
    }
    (root / answers_data.QMSUM).write_text(json.dumps(meeting) + "\n")
    records = []
    for row in range(3):
        pairs = [[f"k{row}{index}", f"v{row}{index}"] for index in range(6)]
        records.append({"ordered_kv_records": pairs, "key": pairs[5][0], "value": pairs[5][1]})
    with gzip.open(root / answers_data.PAIRS, "wt") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
    return root


def test_grades_are_those_of_squad():
    assert answers_data.normalised("The  Cat, a DOG!") == "cat dog"
    assert answers_data.f1("the cat sat", ["a cat", "bird"]) == pytest.approx(2 / 3)
    assert answers_data.f1("dog", ["cat"]) == 0 and answers_data.f1("", ["cat"]) == 0
    assert answers_data.contains("It was in 1849, they say", ["1850", "in 1849"]) == 1
    assert answers_data.contains("anything", ["the"]) == 0


def test_readers(data):
    xquad = answers_data.read_xquad(data)
    assert len(xquad) == 9 and xquad[4] == Question(text_of(1, 40), "which1", (text_of(1, 4),))
    for question in answers_data.read_pairs(data, 4):
        pairs = json.loads(question.context)
        asked = question.question.split('"')[1]
        assert len(pairs) == 4 and pairs[asked] == question.answers[0]
    with pytest.raises(ValueError, match="fewer than 7"):
        answers_data.read_pairs(data, 7)


def test_a_meeting_is_cut_around_what_is_asked(data):
    turn = len(f"S: {text_of(0, 12)}\n")
    whole, part = answers_data.read_qmsum(data, len, 3 * turn + 2)
    lines = [f"S: {text_of(index, 12)}".strip() for index in range(8)]
    assert whole.context.splitlines() == lines[:3] and part.context.splitlines() == lines[5:8]
    assert "disfmarker" not in part.context
    (_, narrow) = answers_data.read_qmsum(data, len, 1)
    assert narrow.context.splitlines() == lines[5:6]


def test_groups_hold_all_questions_of_a_context(data):
    groups = answers_data.chosen_groups(answers_data.read_xquad(data), 5)
    assert [len(group) for group in groups] == [3, 2]
    assert all(len({question.context for question in group}) == 1 for group in groups)


def test_template_parts_surround_the_words():
    class Tokenizer:
        chat_template = "some"

        def apply_chat_template(self, talk, **settings):
            return "".join(f"[{turn['role']}]{turn['content']}" for turn in talk) + "[assistant]"

    assert answers_data.template_parts(Tokenizer()) == ("[user]", "[assistant]")
    before, _ = answers_data.template_parts(Tokenizer(), [("q", "a")])
    assert before == "[user]q[assistant]a[user]"


def options_of(monkeypatch, *arguments):
    found = []
    monkeypatch.setattr(memory_answers, "_records", lambda options: found.append(options) or iter(()))
    memory_answers.main(["--data", ".", *arguments])
    return found[0]


@torch.no_grad()
def test_arms_of_all_slots_are_the_text_itself(folder, monkeypatch):
    """Answers and nats are those of the base model, which reads prefix, text and question in one pass."""
    options = options_of(monkeypatch, "--ratios", "1", "--instruction", "", "--opener", "")
    base, tokenizer = load_model(folder)
    group = [
        Question(text_of(3, 40), f"what{index}" * (1 + index), (text_of(index, 2 + index),)) for index in range(2)
    ]
    plain, model = load_model(folder)[0].eval(), R3MemModel(base).eval()
    monkeypatch.setattr(prompts, "template_parts", lambda tokenizer, turns=(): ("<<sys>>", "\n"))
    prompt = prompts.prompt_of(options, tokenizer, group)
    memories = memory_answers.memories_of(options, model, None, prompt)
    with laid_out(model, memories["full"].layout):
        for arm in memories:
            memory = memories[arm].rows([0, 0])
            nats, texts = answered(model, tokenizer, memory, prompt.asked, prompt.answers, 5)
            context = prompt.context[:, :0] if arm == "nothing" else prompt.context
            for index, (asked, answer) in enumerate(zip(prompt.asked, prompt.answers, strict=True)):
                ids = torch.cat([prompt.before, context, torch.tensor([asked])], 1)
                whole = torch.cat([ids, torch.tensor([answer])], 1)
                logits = plain(whole).logits[0, ids.shape[1] - 1 : -1]
                expected = torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).item()
                assert nats[index] == pytest.approx(expected, abs=1e-3), arm
                settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
                output = plain.generate(ids, **settings, pad_token_id=0)
                expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
                assert texts[index] == expected.strip(), arm


@torch.no_grad()
def test_arms_of_a_ratio_have_the_same_number_of_slots(folder, monkeypatch):
    options = options_of(monkeypatch, "--ratios", "4", "--instruction", "", "--opener", "")
    base, tokenizer = load_model(folder)
    model = R3MemModel(base).eval()
    monkeypatch.setattr(prompts, "template_parts", lambda tokenizer, turns=(): ("<<sys>>", "\n"))
    prompt = prompts.prompt_of(options, tokenizer, [Question("x" + text_of(5, 40) + "x", "why", ("ab",))])
    memories = memory_answers.memories_of(options, model, None, prompt)
    slots = -(-prompt.context.shape[1] // 4)
    expected = {"full": prompt.context.shape[1], "nothing": 0}
    assert {arm: int(memory.slots[0]) - 7 for arm, memory in memories.items()} == {
        arm: expected.get(arm, slots) for arm in memories
    }
    for memory in memories.values():  # the prefix is in front of all of them, as it is
        torch.testing.assert_close(memory.states[..., :7, :], memories["nothing"].states)


def test_heads_that_share_slots_have_as_many(folder, monkeypatch):
    options = options_of(monkeypatch, "--ratios", "4", "--adaptive", "--presses")
    base, tokenizer = load_model(folder)
    model = R3MemModel(base).eval()
    monkeypatch.setattr(prompts, "template_parts", lambda tokenizer, turns=(): ("<<sys>>", "\n"))
    prompt = prompts.prompt_of(options, tokenizer, [Question("x" + text_of(5, 40) + "x", "why", ("ab",))])
    memories = memory_answers.memories_of(options, model, None, prompt)
    stored = {arm: int((memory.ages > 0).sum()) for arm, memory in memories.items()}
    assert stored["adaptive_4"] == stored["attended_adaptive_4"] == stored["matched_4"] == stored["attended_4"]
    shared = memories["adaptive_4"]
    assert torch.equal(shared.ages, memories["attended_adaptive_4"].ages)
    whole = memories["full"]
    scores = torch.rand(whole.ages.shape).masked_fill(torch.arange(whole.ages.shape[-1]) < 7, torch.inf)
    pressed = keep_shared(whole, scores - 2, int(memories["matched_4"].slots[0]) - 7)
    assert int((pressed.ages > 0).sum()) == stored["matched_4"]
    assert pressed.ages.shape != shared.ages.shape or not torch.equal(pressed.ages, shared.ages)


def test_anchors_that_have_learned_nothing_are_the_matched_memory(data, folder, tmp_path):
    config = R3MemConfig(memory_writer="anchored", adapter_rows="memory", num_memory_tokens=4, segment_length=16)
    R3MemPipeline(folder, config=config, dtype="float32").save(tmp_path / "anchors")
    R3MemPipeline(folder, dtype="float32").save(tmp_path / "others")
    output = tmp_path / "out.jsonl"
    arguments = ["--questions", "3", "--new-tokens", "3", "--ratios", "4", "--instruction", "", "--model", str(folder)]
    arguments += ["--dtype", "float32", "--data", str(data), "--output", str(output), "--adapter"]
    assert memory_answers.main([*arguments, str(tmp_path / "anchors")]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    arms = {record.pop("arm"): record for record in found if "f1" in record}
    assert arms["anchored_4"] == arms["matched_4"] != arms["attended_4"]
    with pytest.raises(ValueError, match="no adapter of anchors"):
        memory_answers.main([*arguments, str(tmp_path / "others")])


@pytest.mark.parametrize("kind", memory_answers.KINDS)
def test_records(kind, data, folder, tmp_path):
    output = tmp_path / "out.jsonl"
    settings = {"kind": kind, "questions": 4, "context": 40, "new-tokens": 3, "batch": 8, "pairs": 2}
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    arguments += ["--ratios", "2", "4", "--instruction", "", "--model", str(folder), "--dtype", "float32"]
    assert memory_answers.main(["--data", str(data), "--output", str(output), *arguments]) == 0
    head, size, *found = [json.loads(line) for line in output.read_text().splitlines()][1:]
    presses = list(PRESSES) if is_installed() else []
    assert head["kind"] == kind and head["presses"] == presses
    assert size["questions"] == {"xquad": 4, "qmsum": 2, "pairs": 3}[kind]
    kinds = ("raw", "even", "attended", "matched", *presses)
    arms = [record["arm"] for record in found if "arm" in record]
    assert arms[:2] == ["full", "nothing"]
    assert set(arms[2:]) == {f"{arm}_{ratio}" for arm in kinds for ratio in (2, 4)}
    gained = {(record["gained_by"], record["of"]) for record in found if "gained_by" in record}
    assert gained == {(arm, measure) for arm in arms[2:] for measure in ("f1", "contains", "nats")}
    better = {(r["nats_better_than"], r["ratio"]) for r in found if "nats_better_than" in r}
    assert better == {(rival, ratio) for rival in kinds if rival != "matched" for ratio in (2, 4)}


def test_an_interrupted_run_goes_on(data, folder, tmp_path, monkeypatch):
    """The same command asks about what is missing, of each number of pairs, to what a run at once writes."""
    settings = ["--kind", "pairs", "--pairs", "1", "2", "--questions", "4", "--new-tokens", "3", "--ratios", "2"]
    settings += ["--instruction", "", "--model", str(folder), "--dtype", "float32", "--presses", "--json"]
    output, graded, texts = tmp_path / "out.jsonl", memory_answers.graded, []

    def measured():
        texts.clear()
        assert memory_answers.main(["--data", str(data), "--output", str(output), *settings]) == 0
        return output.read_text().splitlines()[1:]

    def interrupted(*given):
        if len(texts) == 4:
            raise KeyboardInterrupt
        texts.append(given)
        return graded(*given)

    whole = measured()
    output.unlink()
    monkeypatch.setattr(memory_answers, "graded", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured()
    assert len(texts) == 4 and output.with_name("out.jsonl.unfinished").exists()
    assert measured() == whole
    assert len(texts) == 2 and not output.with_name("out.jsonl.unfinished").exists()
