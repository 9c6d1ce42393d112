"""`R3MemModel`: both directions, rows of any padding, adapters off, folders."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from r3mem_fast import (
    PairCollator,
    R3MemConfig,
    R3MemModel,
    adapter_folder,
    check_gradients,
    fingerprints,
    load_model,
    manifest,
)
from r3mem_fast.files import permissions_of
from r3mem_fast.reversible.direction import reading_backward
from r3mem_fast.training.collate import collate_ids
from tests.reversible.tiny import EXACT_FAMILIES, GENERIC_FAMILIES, build, token_ids

FAMILIES = [*EXACT_FAMILIES, *GENERIC_FAMILIES]
pytestmark = pytest.mark.filterwarnings("ignore:.*no exact branch is known:UserWarning")
ROWS = [([5, 6, 7, 8, 9, 10], [11, 12]), ([20, 21], [13, 14, 15]), ([], [30])]


def made(family="llama", adapted=True, **settings):
    base = build(family, scale=2.0)
    base.config.bos_token_id, base.config.eos_token_id = 1, 2
    torch.manual_seed(1)
    model = R3MemModel(base, R3MemConfig(**{"core": (1, 3), "fraction_bits": 20, **settings}))
    if adapted:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_off_is_the_base_model_bit_for_bit(family):
    base = build(family, scale=2.0).eval()
    with torch.no_grad():
        before = base(input_ids=token_ids()).logits
        model = made(family).eval()
        assert not torch.equal(model(token_ids()).logits, before)
        with model.disable_adapters():
            assert torch.equal(model(token_ids()).logits, before)
        assert not torch.equal(model(token_ids()).logits, before)


@pytest.mark.parametrize("backward", ["reversed", "inverse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_rows_and_recall_is_what_the_logits_say(family, backward):
    model = made(family, backward=backward).eval()
    batch = collate_ids(ROWS)
    with torch.no_grad():
        together = model(**batch)
        recalled = model.recall(batch["query_input_ids"], batch["query_attention_mask"], max_new_tokens=10)
        for index, row in enumerate(ROWS):
            alone = model(**collate_ids([row]))
            tokens = len(row[0]) + 1
            assert (together.logits[index, :tokens] - alone.logits[0, :tokens]).abs().max() <= 1e-4
            assert together.targets[index].tolist()[:tokens] == [*row[0], 2]
            assert (together.targets[index, tokens:] == -100).all()
            query = torch.tensor([row[1]])
            single = model.recall(query, max_new_tokens=10)[0]
            assert torch.equal(single, recalled[index])
            if len(single):
                said = model(single[None], query_input_ids=query).logits[0].argmax(-1)
                assert torch.equal(said[: len(single)], single)
        assert torch.isclose(together.loss, together.expand_loss + together.compress_loss)


def test_the_terms_are_what_they_say():
    """expand: the mean over context tokens, read backward; compress: over query tokens, read forward."""
    model = made().eval()
    context, query = ROWS[0]
    start, end = 1, 2

    def loss(first, second):
        ids = torch.tensor([[start, *first, start, *second, end]])
        labels = ids.clone()
        labels[:, : len(first) + 2] = -100
        return model.peft_model(input_ids=ids, labels=labels).loss

    with torch.no_grad():
        output = model(**collate_ids([ROWS[0]]))
        with reading_backward(model.peft_model, (1, 3)):
            assert torch.isclose(output.expand_loss, loss(query, context), atol=1e-6)
        assert torch.isclose(output.compress_loss, loss(context, query), atol=1e-6)
        # A row without a context has a backward term only.
        assert model(**collate_ids([ROWS[2]])).compress_loss == 0
        only = model(**collate_ids(ROWS), terms=["compress"])
        assert only.expand_loss is None and only.logits is None
        batch = collate_ids(ROWS)
        del batch["labels"]
        assert model(**batch).loss is None


@given(st.data())
def test_padding_makes_no_difference(data):
    model = _CACHE.setdefault("model", made().eval())
    lists = st.lists(st.integers(3, 95), min_size=1, max_size=5)
    rows = data.draw(st.lists(st.tuples(lists, lists), min_size=1, max_size=3))
    batch = collate_ids(rows)
    padded = dict(batch)
    for ids, mask in (("input_ids", "attention_mask"), ("query_input_ids", "query_attention_mask")):
        left, right = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
        for name in (ids, mask):
            padded[name] = torch.nn.functional.pad(batch[name], (left, right), value=0 if name == mask else 7)
        if ids == "input_ids":
            padded["labels"] = torch.nn.functional.pad(batch["labels"], (left, right), value=-100)
    with torch.no_grad():
        assert torch.isclose(model(**batch).loss, model(**padded).loss, atol=1e-4)


_CACHE = {}


def test_training_is_reversible_in_both_directions():
    model = made().train()
    calls = []
    hook = model.peft_model.get_base_model().model.layers[2].mlp.register_forward_hook(lambda *_: calls.append(1))
    model(**collate_ids(ROWS)).loss.backward()
    hook.remove()
    assert len(calls) == 4  # twice a direction: no graph is stored
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained and all(".layers.0." not in name and "lora" in name for name in trained)
    with reading_backward(model.peft_model, (1, 3)):
        assert check_gradients(model.peft_model, token_ids()).max_relative_error == 0.0


def test_adapters_off_twice_and_frozen_ones():
    model = made().requires_grad_(False)
    ids = token_ids()
    with torch.no_grad(), model.disable_adapters():
        before = model(ids).logits
        with model.disable_adapters():
            pass
        assert torch.equal(model(ids).logits, before)
    assert not any(p.requires_grad for p in model.parameters())


def test_the_models_own_generation_settings_are_left_out():
    """A penalty for repetition would make some contexts impossible to recall."""
    model = made().eval()
    query = torch.tensor([[11, 12]])
    expected = model.recall(query, max_new_tokens=12)[0]
    base = model.peft_model.get_base_model()
    base.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, suppress_tokens=[67], do_sample=True)
    assert torch.equal(model.recall(query, max_new_tokens=12)[0], expected)
    assert base.generation_config.repetition_penalty == 5.0


def test_recall_leaves_every_mode_as_it_was():
    model = made().train()
    model.peft_model.get_base_model().lm_head.eval()
    modes = [module.training for module in model.modules()]
    model.recall(torch.tensor([[11]]), max_new_tokens=2)
    assert [module.training for module in model.modules()] == modes


def test_a_base_model_that_is_refused_is_left_alone():
    base = build()
    names = [name for name, _ in base.named_modules()]
    for config, message in (
        (R3MemConfig(bits=(4, 4, 4)), "bits names 3 layers"),
        (R3MemConfig(core=(3, 9)), "core must be"),
    ):
        with pytest.raises(ValueError, match=message):
            R3MemModel(base, config)
    assert [name for name, _ in base.named_modules()] == names and all(p.requires_grad for p in base.parameters())
    R3MemModel(base)
    with pytest.raises(ValueError, match="reversible already"):
        R3MemModel(base)
    named = get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="other")
    with pytest.raises(ValueError, match="must be called 'default', not 'other'"):
        R3MemModel(named)


def test_trainer(tmp_path):
    """transformers' Trainer trains pairs, with accumulated gradients."""
    model = made(adapted=False)
    before = {name: p.clone() for name, p in model.named_parameters() if "lora_B" in name}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        learning_rate=1e-2, report_to=[], use_cpu=True, remove_unused_columns=False, save_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=ROWS[:2] * 2, data_collator=collate_ids).train()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_what_is_adapted():
    def names(**settings):
        return {
            name.split("base_model.model.")[1] for name, p in made(**settings).named_parameters() if p.requires_grad
        }

    assert all(name.startswith(("model.layers.1", "model.layers.2", "model.layers.3")) for name in names())
    assert len(names()) == 3 * 7 * 2 and len(names(first_adapted_layer=0)) == 4 * 7 * 2
    assert len(names(target_modules=["down_proj", "self_attn.o_proj"])) == 3 * 2 * 2
    assert len(names(family="gpt2")) == 3 * 4 * 2
    with pytest.raises(ValueError, match="names no linear module"):
        made(target_modules="nonsense")


def test_a_peft_model_keeps_its_adapters():
    peft = get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj"]))
    model = R3MemModel(peft, R3MemConfig(core="all"))
    assert model.peft_model is peft and model.r3mem_config.core == (0, 4)


def test_config():
    assert R3MemConfig().resolved(30).core == R3MemConfig.from_dict(R3MemConfig().resolved(30).to_dict()).core
    for depth in (1, 2, 4, 12, 80):
        first, end = R3MemConfig().resolved(depth).core
        assert 0 <= first < end <= depth
    for settings, message in (
        ({"fraction_bits": "auto"}, "must be a number here"),
        ({"backward": "up"}, "backward must be one of"),
        ({"backward_momentum": 0.3}, "backward_momentum must be one of"),
        ({"lora_r": 0}, "lora_r must be an integer of at least 1"),
        ({"expand_weight": -1.0}, "expand_weight must be a number that is not negative"),
        ({"bits": 3}, "bits must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            R3MemConfig(**settings)
    with pytest.raises(ValueError, match="core must be 'all' or"):
        R3MemConfig(core=(3, 9)).resolved(4)
    with pytest.raises(ValueError, match="first_adapted_layer must lie in"):
        R3MemConfig(first_adapted_layer=4).resolved(4)
    with pytest.raises(ValueError, match=r"unknown settings \['colour'\]"):
        R3MemConfig.from_dict({"colour": 1})


def test_bad_input():
    model = made()
    batch = collate_ids(ROWS)
    with pytest.raises(ValueError, match="3 contexts and 2 queries"):
        model(**{**batch, "query_input_ids": torch.ones(2, 1, dtype=torch.int64), "query_attention_mask": None})
    with pytest.raises(ValueError, match=r"the mask .* must have the shape"):
        model(**{**batch, "attention_mask": torch.ones(3, 2)})
    with pytest.raises(ValueError, match=r"token ids must be int64 \[batch, tokens\]"):
        model.recall(torch.ones(3))
    with pytest.raises(ValueError, match="takes 133 tokens, the model has 128 positions"):
        model(torch.ones(1, 126, dtype=torch.int64), query_input_ids=torch.ones(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="the model has 128 positions"):
        model.recall(torch.ones(1, 126, dtype=torch.int64))
    assert len(model.recall(torch.ones(1, 120, dtype=torch.int64), max_new_tokens=50)[0]) <= 6
    with pytest.raises(ValueError, match="terms must be some of"):
        model(**batch, terms=["cycle"])
    with pytest.raises(ValueError, match=r"takes no \['use_cache'\]"):
        model(**batch, use_cache=True)
    endless = build()
    endless.config.eos_token_id = None
    with pytest.raises(ValueError, match="no eos_token_id"):
        R3MemModel(endless)


def test_the_collator(folder):
    _, tokenizer = load_model(str(folder))
    collate = PairCollator(tokenizer)
    batch = collate([{"context": "abcd", "query": "q"}, {"context": "", "query": "xyz"}])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert batch["query_attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert (batch["labels"][1] == -100).all() and torch.equal(batch["labels"][0], batch["input_ids"][0])
    assert made(family="llama")(**batch).loss.isfinite()
    with pytest.raises(ValueError, match="no pair"):
        collate([])
    with pytest.raises(ValueError, match="empty query"):
        collate([{"context": "abcd", "query": ""}])


def test_saved_and_loaded(folder, tmp_path):
    base, _ = load_model(str(folder))
    model = made_of(base)
    with torch.no_grad():
        expected = model(token_ids()).logits
    model.save_pretrained(tmp_path / "a")
    again = R3MemModel.from_pretrained(tmp_path / "a")
    assert again.r3mem_config == model.r3mem_config and not again.training
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, expected)
    assert any(p.requires_grad for p in again.parameters())
    # Over what is there; and other files stay.
    (tmp_path / "a" / "notes.txt").write_text("mine")
    again.save_pretrained(tmp_path / "a")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {".r3mem.lock", "adapter_config.json", "adapter_model.safetensors", "notes.txt", "r3mem.json"}
    # Who may read the folder's files may read all of them, whatever safetensors thinks, and also after another save.
    modes = {permissions_of(tmp_path / "a" / name) for name in names - {".r3mem.lock", "notes.txt"}}
    assert modes == {permissions_of(tmp_path / "a" / "notes.txt")}
    (tmp_path / "a" / "adapter_model.safetensors").chmod(0o640)
    again.save_pretrained(tmp_path / "a")
    assert permissions_of(tmp_path / "a" / "adapter_model.safetensors") == 0o640
    # A plain PEFT folder, which the plain network understands.
    plain = PeftModel.from_pretrained(load_model(str(folder))[0], tmp_path / "a")
    with torch.no_grad():
        assert (plain(input_ids=token_ids()).logits - expected).abs().max() < 0.2 * expected.abs().max()
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    mine = {name.replace(".default", ""): p for name, p in plain.named_parameters() if "lora" in name}
    assert saved.keys() == mine.keys() and all(torch.equal(saved[name], mine[name]) for name in saved)


def made_of(base):
    torch.manual_seed(0)
    model = R3MemModel(base, R3MemConfig(core=(1, 3))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def test_the_fingerprint(folder):
    base, _ = load_model(str(folder))
    expected = fingerprints.fingerprint(base)
    assert made_of(base).base_fingerprint() == expected
    assert fingerprints.fingerprint(load_model(str(folder), dtype=torch.bfloat16)[0]) == expected
    other, _ = load_model(str(folder))
    with torch.no_grad():
        other.lm_head.weight[3, 3] += 0.1
    assert fingerprints.fingerprint(other) != expected
    other = load_model(str(folder))[0]
    other.config.rms_norm_eps = 0.1
    assert fingerprints.fingerprint(other) != expected


def test_the_fingerprint_of_adapters_after_a_fused_optimizer(folder):
    """Which changes weights and not their versions, also of those that are frozen before and after."""
    model = made_of(load_model(str(folder))[0])
    weights = [p for name, p in model.named_parameters() if "lora_B" in name]
    model.requires_grad_(False)
    before, versions = model.origin_of_adapters(), [p._version for p in weights]
    for weight in weights:
        weight.requires_grad_(True).grad = torch.ones_like(weight)
    torch.optim.AdamW(weights, fused=True).step()
    model.requires_grad_(False)
    after = model.origin_of_adapters()
    assert [p._version for p in weights] == versions, "PyTorch counts these steps now: sums need not be compared"
    assert (after.base, after.adapter != before.adapter) == (before.base, True)


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("adapter")
    made_of(load_model(str(folder))[0]).save_pretrained(target)
    return target


def damage(name, change):
    def apply(folder):
        path = folder / name
        change(path)

    return apply


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rewrite(**values):
    def change(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (shutil.rmtree, OSError, "is no folder"),
        (damage("r3mem.json", lambda p: p.unlink()), OSError, "no adapter was saved there"),
        (damage("r3mem.json", lambda p: p.write_text("{")), ValueError, "is damaged, or was not written by"),
        (damage("r3mem.json", lambda p: p.write_text("[1]")), ValueError, "is damaged, or was not written by"),
        (damage("r3mem.json", lambda p: p.write_bytes(b"\xff")), ValueError, "is damaged, or was not written by"),
        (damage("r3mem.json", rewrite(format_version=99)), ValueError, "has format version 99"),
        (damage("r3mem.json", rewrite(files=None)), ValueError, "is damaged, or was not written by"),
        (damage("r3mem.json", rewrite(base_fingerprint="0" * 32)), ValueError, "was made for another base model"),
        (damage("r3mem.json", rewrite(r3mem_config={"new": 1, "core": [1, 3]})), ValueError, "unknown settings"),
        (damage("r3mem.json", rewrite(r3mem_config={})), ValueError, "is damaged, or was not written by"),
        (damage("r3mem.json", rewrite(remembered=[{"query": "q"}])), ValueError, "is damaged, or was not written by"),
        (damage("r3mem.json", rewrite(remembered=None)), ValueError, "is damaged, or was not written by"),
        (damage("r3mem.json", rewrite(dtype=[1])), ValueError, "is damaged, or was not written by"),
        (damage("r3mem.json", rewrite(base_model="")), OSError, "made for a model that had no name"),
        (damage("adapter_model.safetensors", flip), ValueError, "is not the file that r3mem.json describes"),
        (damage("adapter_model.safetensors", lambda p: p.unlink()), OSError, "is incomplete: adapter_model"),
        (damage("adapter_config.json", flip), ValueError, "is not the file that r3mem.json describes"),
        (damage("r3mem.json", rewrite(base_model="no-such/model")), OSError, "no-such/model"),
    ],
)
def test_damaged_and_foreign_folders(saved, tmp_path, broken, error, message):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    broken(copy)
    with pytest.raises(error, match=message):
        R3MemModel.from_pretrained(copy)


def test_a_save_that_is_killed_while_files_move_is_finished_by_the_next_load(saved, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    model = R3MemModel.from_pretrained(copy)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
        expected = model(token_ids()).logits
    replace, moved = manifest.os.replace, []

    def killed(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr(manifest.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(copy)
    monkeypatch.undo()
    with torch.no_grad():
        assert torch.equal(R3MemModel.from_pretrained(copy)(token_ids()).logits, expected)
    assert sorted(path.name for path in copy.iterdir()) == sorted(path.name for path in saved.iterdir())


def test_a_base_with_adapters_in_it_is_refused(saved):
    model = R3MemModel.from_pretrained(saved)
    with pytest.raises(ValueError, match="base has adapters already"):
        R3MemModel.from_pretrained(saved, model.peft_model.get_base_model())


def test_a_save_that_fails_leaves_what_was_there(saved, folder, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    model = R3MemModel.from_pretrained(copy)

    def full(path):
        raise OSError("no space left on device")

    monkeypatch.setattr(adapter_folder, "flush", full)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert manifest.read_manifest(copy)
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
