"""`UserAdapters`: what a user has said comes back from adapters of their own, and goes with what they have learned."""

import dataclasses
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from r3mem_fast import R3MemConfig, R3MemModel, R3MemPipeline, RememberSettings, load_model, manifest
from r3mem_fast.adapter_folder import put_weights, replace_weights, weights_of
from r3mem_fast.manifest import adapters_in, read_manifest
from r3mem_fast.store import adapters as module
from r3mem_fast.store.items import Item
from r3mem_fast.store.shelf import adapter_in
from tests.store.conftest import CONFIG
from tests.store.test_conversations import GREEDY
from tests.test_pipeline import SETTINGS

FEW = RememberSettings(max_steps=1, anchor_windows=2, anchor_tokens=8, decoys=1)
SAID = {"anna": "Ahab of the Pequod was mad.", "boris": "Darcy met Elizabeth at dawn."}


@pytest.fixture(scope="module")
def own_pipeline(folder):
    """A pipeline whose adapters other tests do not change."""
    return R3MemPipeline(str(folder), config=CONFIG)


@pytest.fixture
def store(opened, own_pipeline):
    fresh = weights_of(own_pipeline.model)
    yield opened(model=own_pipeline)
    put_weights(own_pipeline.model, fresh)


def folders(store):
    path = store.folder / "adapters"
    return sorted(one.name for one in path.iterdir()) if path.is_dir() else []


def adapters(store, user):
    """Folders of a user's adapters."""
    return store._adapters()._adapters_of(store.database.held(user))


def learn(store, user, **settings):
    return store.consolidate(user_id=user, progress=False, **({"settings": FEW} | settings))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_each_user_has_their_own(store, opened, own_pipeline):
    items = {}
    for user, text in SAID.items():
        items[user] = store.add(text, user_id=user)[0]
        report = learn(store, user, settings=SETTINGS)
        assert report.exact_match == 1.0
    queries = {user: read_manifest(adapters(store, user)[0])["remembered"][0]["query"] for user in SAID}
    for one in (store, opened(model=own_pipeline), store):  # swapped back and forth
        for user in SAID:
            found = one.search(queries[user], user_id=user, by="backward")
            assert [(found.item, found.by, found.score) for found in found] == [(items[user], "backward", 1.0)]
    other = store.search(queries["boris"], user_id="anna", by="backward")
    assert all(found.by == "bm25" or found.item == items["anna"] for found in other)
    assert store.search(queries["anna"], user_id="anna", by="backward", run_id="another") == []
    # More is learned beside what was learned before, which stays what it is.
    (first,) = adapters(store, "anna")
    before = (first / "adapter_model.safetensors").read_bytes()
    more = store.add("Starbuck was not.", user_id="anna")[0]
    assert learn(store, "anna", settings=SETTINGS).exact_match == 1.0 and len(folders(store)) == 3
    assert (first / "adapter_model.safetensors").read_bytes() == before and len(adapters(store, "anna")) == 2
    assert store.database.held("anna").learned == more.id
    assert store.search(queries["anna"], user_id="anna", by="backward")[0].item == items["anna"]
    assert store.search(queries["boris"], user_id="boris", by="backward")[0].by == "backward"


def bits_of(store, path):
    """What the adapter of a folder has learned."""
    with adapter_in(store.answering().pipeline, path) as pipeline:
        return weights_of(pipeline.model)


def test_weights_are_swapped_bit_for_bit(store, own_pipeline):
    """While an adapter is needed; then the model has its own again, and everybody begins with these."""
    model = own_pipeline.model
    fresh, learned = weights_of(model), {}
    for user, text in SAID.items():
        store.add(text, user_id=user)
        learn(store, user)
        assert same(weights_of(model), fresh)
        learned[user] = bits_of(store, adapters(store, user)[0])
        assert not same(learned[user], fresh)
    assert not same(learned["anna"], learned["boris"])
    for user in ("anna", "boris", "anna", "boris"):
        store.search("Who?", user_id=user, by="backward")
        assert same(bits_of(store, adapters(store, user)[0]), learned[user]) and same(weights_of(model), fresh)
    store.add("Who is new begins as everybody did.", user_id="carla")
    assert store.search("new", user_id="carla", by="backward")[0].by == "bm25"


def test_answers_are_the_base_models(store):
    """Whatever was learned, and whether or not there is a memory yet."""
    store.add("short", user_id="anna")
    short = store.ask("What?", user_id="anna", **GREEDY)
    store.add("something that is long enough to be compressed", user_id="boris")
    long = store.ask("What?", user_id="boris", **GREEDY)
    learn(store, "anna", settings=dataclasses.replace(FEW, max_steps=5, learning_rate=0.1))
    assert store.ask("What?", user_id="anna", **GREEDY) == short
    assert store.ask("What?", user_id="boris", **GREEDY) == long


def test_answers_are_the_base_models_with_adapters_on_all_tokens(opened, folder):
    pipeline = R3MemPipeline(str(folder), config=R3MemConfig(core=(1, 3), first_adapted_layer=0))
    assert pipeline.model.adapts_tokens and pipeline.model.memories_are_of_base
    store = opened(model=pipeline)
    store.add("short", user_id="anna")
    before = store.ask("What?", user_id="anna", **GREEDY)
    with torch.no_grad():
        for weight in pipeline.model.parameters():
            if weight.requires_grad:
                weight.add_(0.03)
    assert pipeline.generate("User: short", **GREEDY) != before
    assert store.ask("What?", user_id="anna", **GREEDY) == before


@pytest.mark.parametrize("which", [0, 1])
def test_an_adapter_goes_with_what_it_has_learned(store, which):
    items = [store.add(text, user_id="anna")[0] for text in SAID.values()]
    learn(store, "anna")
    later = store.add("Said later.", user_id="anna")[0]
    kept = folders(store)
    assert kept == [store.database.held("anna").adapter]
    store.delete(later.id)
    assert folders(store) == kept and store.database.held("anna").adapter == kept[0]
    store.delete(items[which].id)
    assert folders(store) == [] and store.database.held("anna").adapter is None
    assert store.search("Darcy Ahab", user_id="anna", by="backward")[0].by == "bm25"
    learn(store, "anna")  # what is left is learned anew, beginning as everybody does
    assert len(folders(store)) == 1


def test_only_what_is_new_is_learned(store):
    with pytest.raises(ValueError, match="nothing new to learn of what 'anna' has said"):
        learn(store, "anna")
    first = store.add(SAID["anna"], user_id="anna", run_id="one")[0]
    assert {pair.document for pair in learn(store, "anna").pairs} == {f"one from {first.id}"}
    with pytest.raises(ValueError, match="nothing new"):
        learn(store, "anna")
    before = folders(store)
    second = store.add([{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ahab."}],
                       user_id="anna")[0]  # fmt: skip
    pairs = learn(store, "anna").pairs
    texts = {pair.document: pair.context for pair in pairs if pair.level == "document"}
    assert texts == {f"conversation from {second.id}": "User: Who?\nAssistant: Ahab."}
    assert len(folders(store)) == 2 and set(before) < set(folders(store))


def test_a_long_run_is_learned_in_pages(store, monkeypatch):
    monkeypatch.setattr(module, "_PAGE_TOKENS", 38)
    said = ["A first one.", "A second.", "A third one.", "And one that is as long as a page"]
    items = [store.add(text, user_id="anna", run_id="one")[0] for text in said]
    pairs = learn(store, "anna").pairs
    texts = {pair.document: pair.context for pair in pairs if pair.level == "document"}
    assert texts == {
        f"one from {items[0].id}": "User: A first one.\nUser: A second.",
        f"one from {items[2].id}": "User: A third one.",
        f"one from {items[3].id}": f"User: {said[3]}",
    }
    assert len(adapters(store, "anna")) == 3


def test_a_page_is_of_one_run():
    """Also where runs are mixed."""
    runs = ["monday", "monday", "tuesday", None, "monday"]
    items = [Item(n, "anna", None, run, "user", f"text {n}", {}, 0.0) for n, run in enumerate(runs, 1)]
    pages = module._pages(items, len)
    assert list(pages) == ["monday from 1", "tuesday from 3", "conversation from 4", "monday from 5"]
    assert pages["monday from 1"].count("text") == 2


def test_what_was_taught_before_stays_when_something_is_deleted(store):
    items = []
    for text in ("The first.", "The second.", "The third."):
        items += store.add(text, user_id="anna")
        learn(store, "anna")
    first, second, _ = adapters(store, "anna")
    store.delete(items[2].id)
    assert adapters(store, "anna") == [first, second] and len(folders(store)) == 2
    assert learn_again(store, "anna") == []
    store.add("The fourth.", user_id="anna")
    assert learn_again(store, "anna") == ["User: The fourth."]
    store.delete(items[1].id)  # and what was taught with it, and after it
    assert adapters(store, "anna") == [first] and len(folders(store)) == 1
    assert learn_again(store, "anna") == ["User: The fourth."]
    store.delete(items[0].id)
    assert folders(store) == [] and store.database.held("anna").learned == 0


def learn_again(store, user):
    """The texts that are learned when a user is consolidated once more."""
    try:
        return [pair.context for pair in learn(store, user).pairs if pair.level == "document"]
    except ValueError as error:
        assert "nothing new" in str(error)
        return []


def test_an_adapter_of_an_earlier_version_is_read(store, own_pipeline):
    """It had learned all that the user had said, in the place where a shelf is now."""
    item = store.add(SAID["anna"], user_id="anna")[0]
    learn(store, "anna")
    (path,), (name,) = adapters(store, "anna"), folders(store)
    earlier = name.replace("-after-0", f"-{item.id}")
    path.rename(store.folder / "adapters" / earlier)
    shutil.rmtree(store.folder / "adapters" / name)
    with store.database.changing() as connection:
        connection.execute("UPDATE users SET adapter = ?", (earlier,))
    assert adapters(store, "anna") == [store.folder / "adapters" / earlier]
    store.add("More.", user_id="anna")
    learn(store, "anna")
    assert len(adapters(store, "anna")) == 2 and len(folders(store)) == 2
    store.delete(item.id)
    assert folders(store) == []


def test_rebuilding_removes_them(store):
    for user, text in SAID.items():
        store.add(text, user_id=user)
        learn(store, user)
    store.rebuild("anna")
    assert folders(store) == [store.database.held("boris").adapter]
    store.rebuild()
    assert folders(store) == []


def test_what_is_deleted_while_it_is_learned(store, opened, own_pipeline, monkeypatch):
    other = opened(model=own_pipeline)
    item = store.add(SAID["anna"], user_id="anna")[0]
    remember = R3MemPipeline.remember

    def delete_meanwhile(self, *arguments, **settings):
        report = remember(self, *arguments, **settings)
        other.delete(item.id)
        return report

    monkeypatch.setattr(R3MemPipeline, "remember", delete_meanwhile)
    with pytest.raises(ValueError, match="changed meanwhile; consolidate again"):
        learn(store, "anna")
    assert folders(store) == []


def test_an_interrupted_run_leaves_no_weights_behind(store, own_pipeline, monkeypatch):
    store.add(SAID["anna"], user_id="anna")
    learn(store, "anna")
    fresh, before = weights_of(own_pipeline.model), store.database.held("anna").adapter
    store.add("More.", user_id="anna")

    def interrupted(self, *arguments, **settings):
        for weight in weights_of(self.model):
            self.model.get_parameter(weight).data.add_(1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(R3MemPipeline, "remember", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn(store, "anna")
    assert same(weights_of(own_pipeline.model), fresh) and store.database.held("anna").adapter == before


def test_what_was_begun_goes_on_whatever_is_said_since(store, monkeypatch):
    monkeypatch.setattr(module, "_PAGE_TOKENS", 20)
    store.add(SAID["anna"], user_id="anna")
    remember, learned = R3MemPipeline.remember, []

    def interrupted(self, documents, **settings):
        if len(learned) == 1:
            raise KeyboardInterrupt
        learned.append(documents)
        return remember(self, documents, **settings)

    store.add("The second page.", user_id="anna")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(R3MemPipeline, "remember", interrupted)
        learn(store, "anna")
    (begun,) = folders(store)
    (first,) = adapters_in(store.folder / "adapters" / begun)
    store.add("And a third one.", user_id="anna")
    learn(store, "anna")
    assert folders(store) == [begun] and first in adapters(store, "anna") and len(adapters(store, "anna")) == 3


def test_what_another_process_has_learned(store, opened, folder):
    store.add(SAID["anna"], user_id="anna")
    learn(store, "anna")
    other = opened(model=R3MemPipeline(str(folder), config=CONFIG))
    store.add("More.", user_id="anna")
    learn(store, "anna")
    first, newest = adapters(other, "anna")
    assert same(bits_of(other, newest), bits_of(store, newest)) and not same(
        bits_of(other, first), bits_of(store, newest)
    )


def test_an_adapter_that_is_removed_while_it_is_looked_for(store, monkeypatch):
    item = store.add(SAID["anna"], user_id="anna")[0]
    learn(store, "anna")
    users, asked_of = store._adapters(), module.asked_of

    def removed_meanwhile(queries, paths):
        found = asked_of(queries, paths)
        store.delete(item.id)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(module, "asked_of", removed_meanwhile)
        assert users.recalled("anna", "Who?") == [] and folders(store) == []
    store.add(SAID["boris"], user_id="boris")
    learn(store, "boris")
    (adapters(store, "boris")[0] / "adapter_model.safetensors").unlink()
    with pytest.raises(OSError, match="is incomplete"):
        users.recalled("boris", "Who?")
    shutil.rmtree(store.folder / "adapters")  # a copy without them
    assert users.recalled("boris", "Who?") == []


def test_an_adapter_that_comes_with_the_package_takes_its_place(own_pipeline, tmp_path, monkeypatch):
    own_pipeline.save(tmp_path / "packaged")
    monkeypatch.setattr(manifest, "EMBEDDED_ADAPTERS", tmp_path)
    found = R3MemPipeline("packaged", own_pipeline.tokenizer, base=own_pipeline.model)
    assert found.folder == tmp_path / "packaged" and found.model is own_pipeline.model
    monkeypatch.setenv("HOME", str(tmp_path))
    assert R3MemPipeline("~/packaged").folder == tmp_path / "packaged"


def test_what_cannot_take_an_adapters_place(own_pipeline, folder, tmp_path):
    model, before = own_pipeline.model, weights_of(own_pipeline.model)
    own_pipeline.save(tmp_path / "own")
    other = R3MemConfig(**vars(CONFIG) | {"lora_r": 4})
    R3MemPipeline(str(folder), config=other).save(tmp_path / "other")
    with pytest.raises(ValueError, match="was made with other settings than the model's adapters"):
        replace_weights(model, tmp_path / "other")
    damaged = tmp_path / "own" / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match="is damaged, or was changed"):
        R3MemPipeline(tmp_path / "own", own_pipeline.tokenizer, base=model)
    with pytest.raises(OSError, match="nowhere"):
        replace_weights(model, tmp_path / "nowhere")
    with pytest.raises(TypeError, match="takes the folder of an adapter, and its tokenizer"):
        R3MemPipeline(tmp_path / "own", base=model)
    for name, value in (("config", other), ("dtype", "float32"), ("revision", "main")):
        with pytest.raises(TypeError, match=f"{name} is for a model that is loaded here"):
            R3MemPipeline(tmp_path / "own", own_pipeline.tokenizer, base=model, **{name: value})
    assert same(weights_of(model), before)


def test_what_is_recalled_is_found_by_whole_lines(store):
    """A short word is in many texts, and tells nothing."""
    store.add(
        [{"role": "user", "content": text} for text in ("I", "I am here.", "The ship left at dawn today.")],
        user_id="anna",
    )
    from r3mem_fast.store.adapters import _is_of

    texts = [item.text for item in store.get_all(user_id="anna")]
    assert [text for text in texts if _is_of("I", text)] == ["I"]
    assert [text for text in texts if _is_of("The ship left at dawn", text)] == texts[2:]
    assert not any(_is_of("ship", text) for text in texts)


def test_a_whole_adapter_that_the_database_does_not_know_of(store, monkeypatch):
    """A process was killed between saving the adapter and telling of it: the same call takes it over."""
    store.add(SAID["anna"], user_id="anna")
    with monkeypatch.context() as patched:
        patched.setattr(type(store.database), "put_adapters", lambda *arguments: exit("killed"))
        with pytest.raises(SystemExit):
            learn(store, "anna")
    (begun,) = folders(store)
    assert store.database.held("anna").adapter is None
    learn(store, "anna")
    assert store.database.held("anna").adapter == begun and folders(store) == [begun]


def test_what_nobody_goes_on_with_is_swept_at_opening(store, opened, own_pipeline):
    item = store.add(SAID["anna"], user_id="anna")[0]
    learn(store, "anna")
    (kept,) = folders(store)
    revision = store.database.held("anna").revision
    prefix = kept.partition("-")[0]
    begun = f"{prefix}-{revision:x}-after-{item.id}"  # what has been said since will be learned there
    for name in (
        f"{prefix}-{revision ^ 1:x}-after-1",
        f"{prefix}-{revision:x}-after-9",
        "0123456789abcdef-5-1",
        begun,
    ):
        (store.folder / "adapters" / name).mkdir()
    opened(model=own_pipeline)
    assert folders(store) == sorted([kept, begun])


def test_an_adapter_of_another_scale_takes_no_place(folder, tmp_path):
    """Weights of the same names and sizes would compute something else."""

    def network(alpha):
        lora = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"], task_type="CAUSAL_LM")
        return R3MemModel(get_peft_model(load_model(str(folder))[0], lora))

    network(8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was made with other settings than the model's adapters"):
        replace_weights(network(4), tmp_path)
    replace_weights(network(8), tmp_path)
