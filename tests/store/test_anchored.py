"""Stores whose memories an adapter of anchors writes, and the base model reads."""

import dataclasses

import pytest
import torch

from r3mem_fast import MemoryStore, R3MemConfig, R3MemPipeline
from r3mem_fast.kernels.matching import MAX_KEPT
from r3mem_fast.store import DocumentStore, conversations, opening
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


class Loading:
    """Stands for `R3MemPipeline`, and notes what is asked of it."""

    def __init__(self, loaded, pipeline):
        self._loaded, self._pipeline = loaded, pipeline

    def __call__(self, given, *, config, **settings):
        self._loaded.append((given, config))
        return self._pipeline

    def __instancecheck__(self, other):
        return False


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
    # The base model reads it: its own store would answer the same behind it.
    reading = base.answering()
    history = store.answering().histories.history("anna")
    row = history.tail + reading.turns.reply([("user", "What?")], history.last_role)
    its_own = dataclasses.replace(memory, origin=its.origin)
    assert [store.ask("What?", user_id="anna", **GREEDY)] == reading.written([row], its_own, dict(GREEDY))


def test_sizes_can_be_chosen(opened):
    sizes = dataclasses.replace(CONFIG, memory_budget=8, beyond_budget="rematch")
    store = opened(config=sizes)
    said(store)
    memory = store.memory("anna")
    assert (memory.layout.num_memory_tokens, memory.layout.budget) == (4, 8)
    assert memory.layout.beyond_budget == "rematch" and int(memory.slots[0]) <= 4 * 8
    for wrong in ({"num_memory_tokens": 2, "segment_length": 8}, {"memory_writer": "matched", "memory_budget": 8}):
        with pytest.raises(ValueError, match="config gives the sizes of an adapter's memories"):
            opened("other", config=R3MemConfig(adapter_rows="memory", **wrong)).memory("anna")


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


def test_made_anew_by_an_adapter_it_has_the_sizes_that_this_has_learned_for(opened, adapter, folder, monkeypatch):
    """And made anew by the base model again, as before."""
    monkeypatch.setattr(conversations, "DEFAULT_CONFIG", CONFIG)
    base = opened(model=str(folder))
    said(base)
    before = bits_of(base.memory("anna"))
    assert base.memory("anna").layout.num_memory_tokens == 4
    store = opened()
    store.rebuild()
    assert store.memory("anna").layout.num_memory_tokens == 3 and bits_of(store.memory("anna")) != before
    assert bits_of(opened(model=None).memory("anna")) == bits_of(store.memory("anna"))
    again = opened(model=str(folder), config=CONFIG)
    again.rebuild()
    assert bits_of(again.memory("anna")) == before


def test_a_pipeline_of_an_adapter_is_found_from_elsewhere(opened, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(adapter.parent)
    store = opened(model=R3MemPipeline(adapter.name))
    said(store)
    monkeypatch.chdir(tmp_path)
    assert bits_of(opened(model=None).memory("anna")) == bits_of(store.memory("anna"))


def test_a_conversation_does_not_end(opened, adapter, folder, tmp_path):
    """What an adapter does when a text has ended, a store does with each segment; asked for by name, it is refused."""
    config = dataclasses.replace(CONFIG, beyond_budget="rematch_once")
    store = opened("refused", model=str(folder), config=config)
    with pytest.raises(ValueError, match='and a conversation goes on: use "rematch" or "forget"'):
        store.add("x", user_id="anna")
    assert opened("refused", model=str(folder), config=CONFIG).add("x", user_id="anna")  # nothing was written of it

    ending = R3MemPipeline(adapter)
    ending.model.r3mem_config = dataclasses.replace(ending.model.r3mem_config, beyond_budget="rematch_once")
    ending.save(tmp_path / "ending")
    store = opened("ends", model=R3MemPipeline(tmp_path / "ending"))
    said(store)
    memory = store.memory("anna")
    assert memory.layout.beyond_budget == "rematch" and int(memory.slots[0]) > 0
    assert bits_of(opened("ends", model=None).memory("anna")) == bits_of(memory)


def test_anchors_that_have_learned_nothing_are_refused(opened, folder):
    config = dataclasses.replace(CONFIG, memory_writer="anchored")
    with pytest.raises(ValueError, match="is for adapters that have learned"):
        opened(model=str(folder), config=config).add("x", user_id="anna")


def test_an_adapter_on_the_hub(adapter, folder, opened, monkeypatch):
    """It is found by its name there, and brings its own settings."""
    monkeypatch.setattr(opening, "adapter_named", lambda name, **settings: adapter)
    loaded = []
    pipeline = R3MemPipeline(adapter)
    monkeypatch.setattr(opening, "R3MemPipeline", Loading(loaded, pipeline))
    opening.pipeline_of("someone/anchors", CONFIG, {})
    assert loaded == [("someone/anchors", None)]


def test_what_stays_as_it_is_fits_beside_the_budget(opened):
    """The chat template's first tokens: where all slots are matched together, there is room for so many."""
    sizes = dataclasses.replace(CONFIG, memory_budget=MAX_KEPT, beyond_budget="rematch")
    with pytest.raises(ValueError, match="5 tokens before a conversation, and at most 0 can stay as they are beside"):
        opened(config=sizes).memory("anna")


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
