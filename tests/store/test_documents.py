"""`DocumentStore`: memories of documents, made once, side by side before a question; on a tiny model."""

import dataclasses
import json
import shutil

import pytest
import torch

from r3mem_fast import Memory, R3MemConfig, R3MemPipeline
from r3mem_fast.store import Answer, DocumentStore
from r3mem_fast.store.beside import side_by_side, with_layout
from r3mem_fast.store.documents import rows_of_one

TEMPLATE = "S:brief.{% for m in messages %}U:{{ m.content }}.{% endfor %}A:"
TEXTS = {"ship": "The ship left Nantucket at dawn.", "mill": "Anna took the blue key to the mill."}
SETTINGS = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def pipeline(folder):
    config = R3MemConfig(memory_writer="matched", adapter_rows="memory", num_memory_tokens=8, memory_budget=32)
    found = R3MemPipeline(str(folder), config=dataclasses.replace(config, segment_length=32))
    found.tokenizer.chat_template = TEMPLATE
    return found


def store_of(pipeline, folder, **sizes):
    return DocumentStore(folder, pipeline, **{"ratio": 1, "part_tokens": 40, "slots": 80, **sizes})


def rendered(pipeline, text, question):
    turn = [{"role": "user", "content": f"{text}\n\n{question}"}]
    return pipeline.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)


def test_a_memory_with_all_slots_is_read_as_the_text_itself(pipeline, tmp_path):
    """The control for where slots and question stand: the template with the text in it."""
    store = store_of(pipeline, tmp_path)
    found = store.answer("Who?", TEXTS["mill"], **SETTINGS)
    assert found.sources == ("document 1",) and found.passages == ()
    whole = rendered(pipeline, TEXTS["mill"], "Who?")
    assert found.text == pipeline.generate(whole, chat=False, **SETTINGS).strip()


def test_side_by_side_keeps_every_slot_at_its_distance(pipeline, tmp_path):
    store = store_of(pipeline, tmp_path)
    memories = [store.memory(text) for text in TEXTS.values()]
    pinned, lengths = int(memories[0].pinned[0]), [len(text) for text in TEXTS.values()]
    both = side_by_side(memories)
    assert both.slots.tolist() == [pinned + sum(lengths)] and both.tokens_seen.tolist() == [pinned + sum(lengths)]
    ages = both.ages[0, 0, 0]
    reach = both.layout.reach
    expected = [min(reach - pinned, age) for age in range(sum(lengths), 0, -1)]
    assert ages[pinned:].tolist() == expected
    assert ages[:pinned].tolist() == list(range(reach, reach - pinned, -1))
    assert torch.equal(both.states[..., pinned : pinned + lengths[0], :], memories[0].states[..., pinned:, :])
    assert torch.equal(both.states[..., pinned + lengths[0] :, :], memories[1].states[..., pinned:, :])
    near = side_by_side(memories, in_a_row=False).ages[0, 0, 0]
    assert near[pinned:].tolist() == [*range(lengths[0], 0, -1), *range(lengths[1], 0, -1)]
    pipeline.model.check_memory(both)
    assert torch.equal(side_by_side(memories[:1]).states, memories[0].states)


def test_a_text_is_read_once_whatever_its_name(pipeline, tmp_path, monkeypatch):
    store, read = store_of(pipeline, tmp_path), []
    compress = pipeline.model.compress

    def counted(*arguments, **settings):
        read.append(arguments)
        return compress(*arguments, **settings)

    monkeypatch.setattr(pipeline.model, "compress", counted)
    store.answer("Who?", TEXTS, **SETTINGS)
    first = len(read)
    assert first == 3  # the template, and each text
    store.answer(["Who?", "Where?"], {"other name": TEXTS["ship"], "mill": TEXTS["mill"]}, **SETTINGS)
    assert len(read) == first
    again = store_of(pipeline, tmp_path)
    assert again.answer("Who?", TEXTS, **SETTINGS) == store.answer("Who?", TEXTS, **SETTINGS)
    assert len(read) == first  # kept memories have the template in them
    store_of(pipeline, tmp_path, ratio=2).memory(TEXTS["ship"])
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_what_does_not_fit_is_chosen_by_the_question(pipeline, tmp_path):
    store = store_of(pipeline, tmp_path, slots=40)
    found = store.answer(["Where is the mill?", "When did the ship leave?"], TEXTS, **SETTINGS)
    assert [answer.sources for answer in found] == [("mill",), ("ship",)]
    assert all(isinstance(answer, Answer) for answer in found)
    alone = [store.answer(text, TEXTS, **SETTINGS) for text in ("Where is the mill?", "When did the ship leave?")]
    assert found == alone
    long = " ".join(TEXTS.values())
    parts = store.answer("Where is the mill?", {"both": f"{TEXTS['ship']}\n\n{TEXTS['mill']}"}, **SETTINGS)
    assert len(parts.sources) == 1 and parts.sources[0].startswith("both") and parts.sources[0] != "both"
    assert len(long) > 40


def test_passages_stand_word_for_word(pipeline, tmp_path):
    store = store_of(pipeline, tmp_path, slots=40)
    texts = {"ship": "It left at dawn.", "mill": "Anna saw the mill."}
    found = store.answer("A mill?", texts, passages=1, **SETTINGS)
    assert found.sources == ("ship", "mill") and found.passages == ("mill",)
    alone = store.answer("A mill?", {"mill": texts["mill"]}, passages=1, **SETTINGS)
    whole = rendered(pipeline, texts["mill"], "A mill?")
    assert alone.text == pipeline.generate(whole, chat=False, **SETTINGS).strip()
    assert alone.passages == alone.sources == ("mill",)


def test_bad_input(pipeline, tmp_path):
    with pytest.raises(ValueError, match="ratio must be at least 1"):
        store_of(pipeline, tmp_path, ratio=0)
    with pytest.raises(ValueError, match="does not fit into 8 slots"):
        store_of(pipeline, tmp_path, slots=8)
    with pytest.raises(TypeError, match="dtype is for a model that is given by name"):
        DocumentStore(tmp_path, pipeline, dtype="bfloat16").memory("text")
    store = store_of(pipeline, tmp_path)
    for question in ("", [], ["Who?", " "]):
        with pytest.raises(ValueError, match="a question is empty"):
            store.answer(question, TEXTS)
    with pytest.raises(ValueError, match="there is no document"):
        store.answer("Who?", {})
    for empty in ("", " \n"):
        with pytest.raises(ValueError, match="the document 'b' is empty"):
            store.answer("What?", {"a": "x", "b": empty})
    with pytest.raises(ValueError, match="passages must be 0 or more, got -1"):
        store.answer("What?", "x", passages=-1)
    with pytest.raises(ValueError, match="a text is empty"):
        store.memory(" ")
    ship, mill = (store.memory(text) for text in TEXTS.values())
    with pytest.raises(ValueError, match="no memory to put side by side"):
        side_by_side([])
    with pytest.raises(ValueError, match="one row each"):
        side_by_side([Memory.cat([ship, dataclasses.replace(mill, layout=ship.layout, origin=ship.origin)])])
    waiting = pipeline.model.compress(torch.tensor([[5, 6, 7]]))
    with pytest.raises(ValueError, match="tokens that are not compressed"):
        side_by_side([ship, waiting])
    unpinned = pipeline.model.compress(torch.tensor([[5, 6, 7]]), finish=True)
    with pytest.raises(ValueError, match="other pinned tokens"):
        side_by_side([ship, with_layout(unpinned, ship.layout)])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        store_of(pipeline, tmp_path / "file")


def test_a_sentence_of_any_length_is_cut(pipeline, tmp_path):
    store = store_of(pipeline, tmp_path)
    found = store.answer("Who?", {"long": "whereas the party " * 5, "digits": "7" * 90}, **SETTINGS)
    assert all(source.partition(",")[0] in ("long", "digits") for source in found.sources) and len(found.sources) > 1


def test_a_damaged_memory_is_made_again(pipeline, tmp_path):
    store_of(pipeline, tmp_path).memory(TEXTS["ship"])
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    again = store_of(pipeline, tmp_path).memory(TEXTS["ship"])
    assert path.read_bytes() == whole and torch.equal(again.states, Memory.load(path).states)


def test_the_turn_of_a_folder_stays(pipeline, tmp_path, monkeypatch):
    """A template may tell today's date."""
    store = store_of(pipeline, tmp_path)
    store.memory(TEXTS["ship"])
    monkeypatch.setitem(pipeline.codec.__dict__, "turn", (pipeline.codec.ids("Tomorrow"), pipeline.codec.ids("A:")))
    again = store_of(pipeline, tmp_path)
    again.answer("Who?", TEXTS, **SETTINGS)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 and again._turn == store._turn


def test_memories_whose_heads_share_slots_stand_side_by_side(folder, tmp_path):
    sizes = {"num_memory_tokens": 4, "memory_budget": 16, "segment_length": 32, "memory_allocation": "adaptive"}
    config = R3MemConfig(memory_writer="matched", adapter_rows="memory", beyond_budget="error", **sizes)
    found = R3MemPipeline(str(folder), config=config)
    texts = [found.codec.ids(text) for text in TEXTS.values()]
    memories = [found.model.compress(torch.tensor([ids]), finish=True) for ids in texts]
    both = side_by_side(memories)
    assert both.layout.is_adaptive and (both.ages > 0).sum() == sum(int((m.ages > 0).sum()) for m in memories)
    first, second = (memory.ages[0, 0] for memory in memories)
    for head in range(first.shape[0]):
        moved = (first[head][first[head] > 0] + len(texts[1])).clamp_max(both.layout.reach).tolist()
        own = both.ages[0, 0, head]
        assert own[own > 0].tolist() == moved + second[head][second[head] > 0].tolist()
    store = DocumentStore(tmp_path, found, ratio=2, part_tokens=40, slots=80, allocation="adaptive")
    found.tokenizer.chat_template = TEMPLATE
    assert store.answer("Who?", TEXTS["mill"], **SETTINGS).sources == ("document 1",)
    memory = store.memory(TEXTS["mill"])
    assert memory.layout.is_adaptive and (memory.ages == 0).any()
    with pytest.raises(ValueError, match="memory_allocation"):
        DocumentStore(tmp_path, found, allocation="some")


@torch.no_grad()
@pytest.mark.parametrize("budget", [16, 64])
def test_a_row_of_other_heads_is_read_as_alone(folder, budget):
    """Beside one in which all heads have as many slots, whichever has the larger budget."""
    sizes = {"num_memory_tokens": 16, "memory_budget": 32, "segment_length": 32}
    config = R3MemConfig(memory_writer="matched", adapter_rows="memory", memory_allocation="adaptive", **sizes)
    model = R3MemPipeline(str(folder), config=config, dtype="float32").model
    shared = model.compress(torch.arange(30, 70)[None], finish=True)
    other = dataclasses.replace(shared.layout, allocation="uniform", budget=budget)
    uniform = model.compress(torch.arange(40, 44)[None], finish=True)  # a slot for each token
    rows = rows_of_one([with_layout(uniform, other), shared])
    assert (shared.ages == 0).any() and rows.layout.is_adaptive
    ids = torch.arange(50, 56)[None]
    found = model(ids.expand(2, -1), memory=rows).logits
    for row, memory in enumerate((uniform, shared)):
        assert torch.allclose(found[row], model(ids, memory=memory).logits[0], atol=1e-4)


def test_heads_share_slots_where_the_model_can_read_such_memories(pipeline, tmp_path, monkeypatch):
    store = DocumentStore(tmp_path, pipeline, ratio=2, part_tokens=40)
    assert store.memory(TEXTS["mill"]).layout.is_adaptive
    assert not DocumentStore(tmp_path, pipeline, part_tokens=40, allocation="uniform")._layout(9).is_adaptive
    monkeypatch.setattr(pipeline.model.reader, "keeps_latents", lambda: True)
    assert not store._layout(9).is_adaptive
    monkeypatch.undo()
    monkeypatch.setattr(pipeline.model.decoder.config, "_attn_implementation", "r3mem")
    assert not store._layout(9).is_adaptive


def test_the_folder_can_be_deleted_at_any_time(pipeline, tmp_path):
    """Before anything is asked, and while the store is open; and what is damaged is made again."""
    folder = tmp_path / "library"
    store = store_of(pipeline, folder)
    shutil.rmtree(folder)
    expected = store.answer("Who?", TEXTS["mill"], **SETTINGS)
    (turn,) = folder.glob("turn-*.json")
    turn.write_text("[torn")
    assert store_of(pipeline, folder).answer("Who?", TEXTS["mill"], **SETTINGS) == expected
    assert json.loads(turn.read_text())
    shutil.rmtree(folder)
    assert store.answer("Who?", TEXTS["mill"], **SETTINGS) == expected
