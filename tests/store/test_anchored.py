"""Stores whose memories an adapter of anchors writes, and the base model reads."""

import dataclasses

import pytest
import torch

from r3mem_fast import MemoryStore, R3MemConfig, R3MemPipeline
from r3mem_fast.store import DocumentStore, conversations
from tests.store.conftest import CONFIG, RAW_TOKENS, bits_of

SAID = [f"Message {number} says something of its own." for number in range(6)]
GREEDY = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """Folder of an adapter of anchors that has learned something at random."""
    config = dataclasses.replace(CONFIG, memory_writer="anchored", num_memory_tokens=3, memory_budget=9)
    pipeline = R3MemPipeline(str(folder), config=config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        pipeline.model.memory_embeddings.normal_(generator=generator)
        for name, parameter in sorted(pipeline.model.named_parameters()):
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
    path = tmp_path_factory.mktemp("adapter")
    pipeline.save(path)
    return path


@pytest.fixture
def opened(adapter, tmp_path):
    stores = []

    def open_store(name="store", model=adapter, **settings):
        stores.append(MemoryStore(tmp_path / name, model, **{"raw_tokens": RAW_TOKENS, **settings}))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def said(store, texts=SAID, user="anna"):
    return [item for text in texts for item in store.add(text, user_id=user)]


def test_memories_are_those_of_the_adapter_in_the_sizes_of_the_store(opened, adapter, folder):
    """One that was streamed, and that of the whole text at once; the base model's is another: the control."""
    store = opened()
    said(store)
    memory = store.memory("anna")
    layout = memory.layout
    assert (layout.num_memory_tokens, layout.segment_length, layout.segment_overlap) == (3, 16, 2)
    assert layout.budget == conversations.DEFAULT_CONFIG.memory_budget and layout.is_adaptive
    own = store.answering().pipeline.model
    said(store, [" ".join(SAID)], "at once")
    assert memory.origin == own.origin() and store.memory("at once").tokens_seen.sum() > 16
    config = dataclasses.replace(CONFIG, num_memory_tokens=3, memory_budget=layout.budget)
    base = opened("base", str(folder), config=config)
    said(base)
    its = base.memory("anna")
    assert its.layout == layout and not torch.equal(its.states, memory.states)
    answers = [one.ask("What?", user_id="anna", **GREEDY) for one in (store, base)]
    assert all(isinstance(answer, str) for answer in answers)


def test_sizes_can_be_chosen(opened):
    sizes = dataclasses.replace(CONFIG, memory_budget=8, beyond_budget="rematch")
    store = opened(config=sizes)
    said(store)
    memory = store.memory("anna")
    assert (memory.layout.num_memory_tokens, memory.layout.budget) == (4, 8)
    assert memory.layout.beyond_budget == "rematch" and store.ask("What?", user_id="anna", **GREEDY) is not None
    with pytest.raises(ValueError, match="config gives the sizes of an adapter's memories"):
        opened("other", config=R3MemConfig(num_memory_tokens=2, segment_length=8)).memory("anna")


def test_what_is_deleted_is_gone_from_the_memory(opened):
    """It is that of a user who never said it, bit for bit."""
    store, never = opened(), opened("never")
    items = said(store)
    store.delete(items[1].id)
    said(never, SAID[:1] + SAID[2:])
    assert bits_of(store.memory("anna")) == bits_of(never.memory("anna")) is not None


def test_it_is_opened_again_as_it_was(opened, adapter):
    store = opened()
    said(store)
    kept = bits_of(store.memory("anna"))
    for model in (None, adapter, R3MemPipeline(adapter)):
        if isinstance(model, R3MemPipeline):  # which has sizes of its own
            with pytest.raises(ValueError, match="differ in: layout"):
                opened(model=model).memory("anna")
        else:
            assert bits_of(opened(model=model).memory("anna")) == kept
    own = opened("own", R3MemPipeline(adapter))
    said(own)
    assert own.memory("anna").layout.budget == 9
    assert bits_of(opened("own", None).memory("anna")) == bits_of(own.memory("anna"))


def test_another_adapter_or_none(opened, adapter, folder, tmp_path):
    store = opened()
    said(store)
    pipeline = R3MemPipeline(adapter)
    with torch.no_grad():
        pipeline.model.memory_embeddings.mul_(2)
    pipeline.save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"differ in: adapter\)"):
        opened(model=tmp_path / "other").memory("anna")
    config = dataclasses.replace(CONFIG, num_memory_tokens=3, memory_budget=store.memory("anna").layout.budget)
    base = opened(model=str(folder), config=config)
    with pytest.raises(ValueError, match="differ in: adapter"):
        base.memory("anna")
    base.rebuild()
    assert base.memory("anna").layout == store._model.layout


def test_it_is_not_consolidated(opened):
    store = opened()
    said(store)
    with pytest.raises(ValueError, match=r"written by an adapter.*consolidate it in a store with the base model"):
        store.consolidate(user_id="anna", progress=False)
    assert store.search("own", user_id="anna", by="backward")  # looked up by words


def test_documents(adapter, folder, tmp_path):
    """Memories of the adapter lie beside those of the base model, and neither is taken for the other."""
    texts = {"ship": "The ship left Nantucket at dawn.", "mill": "Anna took the blue key to the mill."}
    sizes = {"ratio": 4, "part_tokens": 40, "slots": 40}
    anchored, base = DocumentStore(tmp_path, adapter, **sizes), DocumentStore(tmp_path, str(folder), **sizes)
    found = anchored.answer(["Who?", "Where?"], texts, **GREEDY)
    assert [answer.sources for answer in found] == [("ship", "mill")] * 2
    mine, its = anchored.memory(texts["ship"]), base.memory(texts["ship"])
    assert mine.layout == its.layout and not torch.equal(mine.states, its.states)
    again = DocumentStore(tmp_path, adapter, **sizes)
    assert bits_of(again.memory(texts["ship"])) == bits_of(mine)
    before = sorted(tmp_path.iterdir())
    assert again.answer(["Who?", "Where?"], texts, **GREEDY) == found and sorted(tmp_path.iterdir()) == before
