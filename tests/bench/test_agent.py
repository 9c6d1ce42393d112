"""The benchmarks of stores: what is read, asked and graded, on a tiny model and texts of the test's own."""

import functools
import hashlib
import json
from types import SimpleNamespace

import pytest
import torch

from bench import agent, asking, rag, store_times, talks
from bench.asking import Asked, grades, rouge_l
from r3mem_fast import Memory, MemoryStore, R3MemConfig
from r3mem_fast.memory.slots import slots_a_head
from r3mem_fast.store import lookup
from r3mem_fast.store.beside import pinned_memory
from r3mem_fast.store.memories import History

TURNS = {"2023-04-27": [["I have a dog called Rex.", "What a fine name."], ["He likes the park.", "Parks are good."]]}
DAYS = {day: [[("user", said), ("assistant", answer)] for said, answer in turns] for day, turns in TURNS.items()}
SPEAKERS = {"user": "I said: ", "assistant": "You said: "}


def test_rouge_l_is_the_longest_common_subsequence():
    assert rouge_l("the dog sat", "dog sat down") == pytest.approx(2 * 2 / (2 + 3))  # articles do not count
    assert rouge_l("a b c d", "d c b") == pytest.approx(2 * 1 / (3 + 3))
    assert rouge_l("", "word") == 0.0 and rouge_l("same words", "Same words!") == 1.0
    found = grades("It is Rex.", ["Rex", "the dog"])
    assert found == {"f1": 0.5, "rouge_l": 0.5, "contains": 1.0}


def write_talks(folder):
    data = folder / "memorybank"
    data.mkdir()
    history = {day: [{"query": q, "response": a} for q, a in turns] for day, turns in TURNS.items()}
    (data / "memory_bank_en.json").write_text(json.dumps({" Ann ": {"history": history}}))
    (data / "probing_questions_en.jsonl").write_text(json.dumps({"Ann": ["Which dog?", "Which cat?"]}) + "\n")
    return [
        {"user": "Ann", "index": 0, "answer": "Rex.", "answerable": True, "question_sha256": digest("Which dog?")},
        {"user": "Ann", "index": 1, "answer": "None.", "answerable": False, "question_sha256": digest("Which cat?")},
    ]


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_conversations_and_their_references(tmp_path, monkeypatch):
    references = write_talks(tmp_path)
    monkeypatch.setattr(talks, "REFERENCES", tmp_path / "references.jsonl")
    talks.REFERENCES.write_text("".join(json.dumps(line) + "\n" for line in references))
    (talk,) = talks.read_memorybank(tmp_path)
    assert talk.user == "Ann" and talk.questions == [("Which dog?", "Rex.")]
    assert talk.days == DAYS
    references[0]["question_sha256"] = digest("Which cat?")
    talks.REFERENCES.write_text("".join(json.dumps(line) + "\n" for line in references))
    with pytest.raises(ValueError, match="question 0 of Ann is another one"):
        talks.read_memorybank(tmp_path)


def test_a_meeting_is_told_in_pieces(tmp_path):
    (tmp_path / "qmsum").mkdir()
    utterances = [{"speaker": "A", "content": "word " * 60}, {"speaker": "B", "content": "Yes {vocalsound} ."}]
    asked = {"query": "What?", "answer": "That.", "relevant_text_span": [["0", "1"]]}
    meeting = {"meeting_transcripts": utterances * 3, "specific_query_list": [asked], "general_query_list": [asked]}
    (tmp_path / "qmsum" / "val.jsonl").write_text(json.dumps(meeting) + "\n")
    (talk,) = talks.read_qmsum(tmp_path)
    ((day, first), (_, second)) = talk.turns()
    assert day == "meeting" and [message["role"] for message in first + second] == ["user", "user"]
    # Utterances are never cut: the first piece has three, as two have less than 100 words.
    assert first[0]["content"].count("A: word") == 2 and first[0]["content"].split("\n")[1] == "B: Yes ."
    assert second[0]["content"].startswith("B: Yes .\nA: word") and talk.questions == [("What?", "That.")]


def test_conversations_may_be_too_long(pipeline):
    said = [[("user", "A dog."), ("assistant", "Yes.")]]
    short, long = (talks.Talk("Ann", {"monday": said * count}, [], SPEAKERS) for count in (1, 3))
    assert short.tokens(pipeline.codec) == len("A dog.Yes.")
    assert talks.short_enough([long, short], pipeline.codec, 10) == [short]
    assert talks.short_enough([long, short], pipeline.codec, None) == [long, short]


def test_every_reference_is_a_sentence_of_its_own():
    lines = [json.loads(line) for line in talks.REFERENCES.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 100 and sum(line["answerable"] for line in lines) == 99
    assert len({(line["user"], line["index"]) for line in lines}) == 100
    for line in lines:
        assert bool(line["key"]) == line["answerable"] == bool(line["evidence"])
        assert all(key.lower() in line["answer"].lower() for key in line["key"])


def test_a_summary_compares_at_equal_slots():
    def group(memory, rival):
        ways = {"nothing": 4.0, "full": 2.0, "memory_8": memory, "bm25_8": rival, "bm25_4": 9.0}
        return {way: {"nats": value, "slots": 8.0} for way, value in ways.items()}

    graded = [group(2.5, 3.0), group(3.0, 3.5)]
    found = list(agent.summary(graded, torch.ones(2), rivals=("bm25",)))
    shares = {record["way"]: record["share"]["mean"] for record in found if "share" in record}
    assert shares["memory_8"] == pytest.approx(0.625) and shares["bm25_8"] == pytest.approx(0.375)
    (paired,) = [record for record in found if "better_than" in record]
    assert (paired["way"], paired["better_than"], paired["mean"]) == ("memory_8", "bm25", 0.5)
    assert paired["low"] == paired["high"] == 0.5


@pytest.fixture(params=["uniform", "adaptive"])
def pipeline(folder, request):
    from r3mem_fast import R3MemPipeline

    config = agent._config(4, 16, request.param, segment_length=16, overlap=0)
    found = R3MemPipeline(str(folder), dtype="float32", config=config)
    found.tokenizer.chat_template = "{% for m in messages %}U:{{ m.content }}.{% endfor %}A:"
    return found


def test_nats_behind_a_memory_are_those_of_the_text(pipeline):
    """The control: with a slot for each token it is the text, read by the base model."""
    model, codec = pipeline.model, pipeline.codec
    head = pinned_memory(model, codec.ids("U:"))
    held = agent.held_as_it_is(pipeline, head, codec.ids("Rex is a dog."))
    ways = {
        "held": Asked(held, codec.ids(" Who?.A:")),
        "raw": Asked(head, codec.ids("Rex is a dog. Who?.A:")),
        "nothing": Asked(head, codec.ids(" Who?.A:")),
    }
    found = asking.ask_in_each_way(pipeline, ways, ["Rex"], most=2)
    assert list(found) == list(ways), "in their order, whatever is read first"
    nats = {way: grades["nats"] for way, grades in found.items()}
    ids = torch.tensor([codec.ids("U:Rex is a dog. Who?.A:Rex")])
    with torch.no_grad(), model.disable_adapters():
        logits = model.plain_model(ids).logits[0, -4:-1].float()
    expected = torch.nn.functional.cross_entropy(logits, ids[0, -3:]).item()
    assert nats["held"] == pytest.approx(expected, rel=1e-3) and nats["raw"] == pytest.approx(expected, rel=1e-3)
    assert abs(nats["nothing"] - expected) > 0.05 * expected
    assert ways["held"].slots == ways["raw"].slots == ways["nothing"].slots + len("Rex is a dog.")


def test_what_is_written_is_what_the_model_generates(pipeline):
    """In rows of several lengths, some of which end before the others, and after the reference's nats were read."""
    model, tokenizer = pipeline.model, pipeline.tokenizer
    head = pinned_memory(model, pipeline.codec.ids("U:"))
    rows = [pipeline.codec.ids(text) for text in ("Rex.A:", "Rex is a dog. Who?.A:", "A cat.A:")]
    generated = []
    for row in rows:
        ids = model.generate(torch.tensor([row]), memory=head, max_new_tokens=6, do_sample=False)
        generated.append(tokenizer.decode(ids[0, len(row) :], skip_special_tokens=True).strip())
    memory = Memory.cat([head] * 3)
    nats, texts = asking.answered(model, tokenizer, memory, rows, [[5, 6, 7], [5], [6, 5]], 6)
    assert texts == generated and len(set(texts)) > 1
    alone, _ = asking.answered(model, tokenizer, memory, rows, [[5, 6, 7], [5], [6, 5]], 0)
    assert alone == nats
    until = next(text for text in texts if len(text) > 2)[1]
    _, ended = asking.answered(model, tokenizer, memory, rows, [[5]] * 3, 6, until)
    assert ended == [text.partition(until)[0].strip() for text in texts]


def test_passages_fill_their_slots(pipeline, monkeypatch, tmp_path):
    monkeypatch.setattr(rag, "minilm_embedder", lambda: lambda texts: torch.eye(3)[: len(texts)])
    monkeypatch.setattr(rag, "template_of", lambda *_: ("U:", ".A:", lambda question: f" {question}.A:"))
    allocation = pipeline.model.r3mem_config.memory_allocation
    options = SimpleNamespace(slots=[12], new_tokens=0, adapter=None, allocation=allocation)
    asker = rag._Asker(options, pipeline, ["Rex is here. He eats.", "A cat.", "No."])
    assert [pipeline.codec.text(torch.tensor(ids)) for ids in asker._sentences][:2] == ["Rex is here.", "He eats."]
    text = pipeline.codec.text(torch.tensor(asker._passages("bm25", [1, 0], 12)))
    assert text == "A cat.\nRex \n" and len(text) == 12
    sentences = pipeline.codec.text(torch.tensor(asker._passages("bm25+", [1, 0], 12)))
    assert sentences == "Re\nHe eats.\n"  # in the order of the text
    assert slots_a_head(asker._memory(1, 4)) == 4
    mixed = asker._sentence_and_memory(1, 12, [5])
    assert mixed.slots == 13


@pytest.mark.parametrize("allocation, new_tokens, cut", [("uniform", 3, True), ("adaptive", 0, False)])
def test_an_adapter_that_has_learned_nothing_answers_as_the_match_does(
    folder, tmp_path, monkeypatch, allocation, new_tokens, cut
):
    """It begins at the match, so that each of its ways is that of the matched memory, in nats and in words."""
    from r3mem_fast import R3MemPipeline

    monkeypatch.setattr(agent, "_config", functools.partial(agent._config, segment_length=16, overlap=0))
    monkeypatch.setattr(agent, "_positions", lambda pipeline: 48)
    monkeypatch.setattr(lookup, "minilm_embedder", lambda: lambda texts: torch.eye(4)[: len(texts)])
    config = R3MemConfig(memory_writer="anchored", adapter_rows="memory", num_memory_tokens=4, segment_length=16)
    R3MemPipeline(str(folder), config=config).save(tmp_path / "adapter")
    pipeline = R3MemPipeline(str(folder), dtype="float32", config=agent._config(8, 64, allocation))
    settings = {"kept": [8, 4], "raw_tokens": 4, "presses": [], "passages": 1, "allocation": allocation}
    settings["new_tokens"] = new_tokens
    asker = agent.Asker(SimpleNamespace(adapter=str(tmp_path / "adapter"), **settings), pipeline)
    said = [[("user", "A dog."), ("assistant", "Yes.")], [("user", "Rex."), ("assistant", "Oh.")]]
    ann = talks.Talk("Ann", {"monday": said}, [("A dog?", "Rex.")], SPEAKERS)
    bo = talks.Talk("Bo", {"monday": [[("user", "A cat."), ("assistant", "No.")]] * 2}, [], SPEAKERS)
    found = asker.ask(ann, bo)
    for kept in (8, 4):
        for way in ("", "+bm25"):
            assert found[f"anchored{way}_{kept}"] == pytest.approx(found[f"memory{way}_{kept}"], abs=1e-4)
        assert found[f"memory+found_{kept}"]["slots"] > found[f"memory_{kept}"]["slots"]
    assert found["memory_8"]["slots"] > found["memory_4"]["slots"] and (found["history"]["cut"] > 0) == cut


def test_turns_that_are_found_fill_their_room(pipeline, tmp_path):
    from r3mem_fast import R3MemPipeline
    from r3mem_fast.store.turns import TurnCodec

    sizes = {"num_memory_tokens": 4, "memory_budget": 16, "segment_length": 16, "segment_overlap": 2}
    config = R3MemConfig(memory_writer="matched", adapter_rows="memory", **sizes)
    asker = agent.Asker(
        SimpleNamespace(adapter=None), R3MemPipeline(pipeline.model.plain_model.name_or_path, config=config)
    )
    with MemoryStore(tmp_path, asker._pipeline) as store:
        talk = talks.Talk("Ann", DAYS, [], SPEAKERS)
        talk.add_to(store)
        turns = TurnCodec(asker._pipeline.codec)
        found = asker._turns(store, talk, "Which dog?", "bm25", 50)
        text = asker._pipeline.codec.text(torch.tensor(found))
        # The turn that has the word first, then the newest; in the order of the conversation, and no token more.
        assert len(found) == 50 and text.startswith("- I said: I have a dog called Rex.\n- You said: Par")
        held = History(pinned_memory(asker._pipeline.model, []), [7], "assistant")
        (before, *ids) = agent._asked(turns, held, "Who?", [1, 2]).ids
        whole = turns.reply([("user", "Who?")], "assistant")
        place = len(turns.ids([("user", "Who?")], "assistant")) - len("Who?") - 1  # a space before the words
        assert before == 7 and ids == [*whole[:place], 1, 2, *whole[place:]]


@pytest.mark.slow
def test_times_of_a_store(folder, tmp_path, monkeypatch, capsys):
    """Every turn is added and read, every question asked in each way; sizes are those of the files."""
    references = write_talks(tmp_path)
    histories = tmp_path / "memorybank" / "memory_bank_en.json"
    turns = [{"query": "A dog: Rex.", "response": "Fine."}, {"query": "He eats.", "response": "Good."}]
    histories.write_text(json.dumps({name: {"history": {"2023-04-27": turns}} for name in ("Ann", "Bo")}))
    asked = {"Ann": ["Which dog?", "Which cat?"], "Bo": ["Which dog?"]}
    (tmp_path / "memorybank" / "probing_questions_en.jsonl").write_text(json.dumps(asked) + "\n")
    monkeypatch.setattr(talks, "REFERENCES", tmp_path / "references.jsonl")
    lines = [*references, references[0] | {"user": "Bo"}]
    talks.REFERENCES.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sizes = {"num_memory_tokens": 4, "memory_budget": 16, "segment_length": 16, "segment_overlap": 2}
    config = R3MemConfig(memory_writer="matched", adapter_rows="memory", cycle_weight=0.0, **sizes)
    monkeypatch.setattr(store_times, "DEFAULT_CONFIG", config)
    monkeypatch.setattr(store_times, "_RAW_TOKENS", 4)
    monkeypatch.setattr(store_times, "_PASSAGES", 1)
    output = tmp_path / "times.jsonl"
    options = ["--model", str(folder), "--dtype", "float32", "--data", str(tmp_path), "--users", "2", "--json"]
    assert store_times.main([*options, "--output", str(output)]) == 0
    head, *found = [json.loads(line) for line in output.read_text().splitlines()][1:]
    assert head["users"] == 2 and head["turns"] == 4
    turn = next(record for record in found if "turn" in record)
    assert turn["milliseconds"] > 0 and turn["over_read"]["low"] <= turn["over_read"]["mean"]
    assert [r["first_token"] for r in found if "first_token" in r] == ["memory", "passages", "opened", "prefill"]
    sizes = {record["of"]: record["mean"] for record in found if "of" in record}
    assert sizes["text_bytes"] == len("A dog: Rex.Fine.He eats.Good.") and sizes["memory_bytes"] > 0
    with pytest.raises(SystemExit):
        store_times.main([*options[:-2], "1"])
    capsys.readouterr()
