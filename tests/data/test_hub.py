"""Adapters on the Hugging Face hub, which is a folder here: sent there, and loaded from there by their id."""

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, constants

from r3mem_fast import R3MemConfig, R3MemModel, R3MemPipeline, load_model

CONFIG = R3MemConfig(core=(1, 3), num_memory_tokens=2, segment_length=8)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that is a folder; `asked` is what it was asked for."""
    root, asked = tmp_path / "hub", []

    def create_repo(self, repo_id, **settings):
        (root / repo_id).mkdir(parents=True, exist_ok=True)
        asked.append(("create", repo_id, settings))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, **settings):
        asked.append(("upload", repo_id, settings))
        for name in allow_patterns:
            if (source := tmp_path / folder_path / name).exists():
                shutil.copy(source, root / repo_id / name)
        return f"hub/{repo_id}/commit"

    def model_info(self, name, **settings):
        asked.append(("info", name, settings))
        if not (root / name).is_dir():
            raise huggingface_hub.errors.RepositoryNotFoundError(
                "404", response=SimpleNamespace(headers={}, request=0)
            )
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=path.name) for path in (root / name).iterdir()])

    def snapshot_download(name, *, allow_patterns, **settings):
        asked.append(("download", name, settings))
        return str(root / name)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for method in (create_repo, upload_folder, model_info):
        monkeypatch.setattr(HfApi, method.__name__, method)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return SimpleNamespace(root=root, asked=asked)


def test_an_adapter_goes_there_and_comes_back(folder, hub):
    pipeline = R3MemPipeline(str(folder), config=CONFIG)
    assert pipeline.push_to_hub("me/adapter", private=True, commit_message="first") == "hub/me/adapter/commit"
    assert hub.asked[0] == ("create", "me/adapter", {"private": True, "exist_ok": True})
    assert hub.asked[1][2]["commit_message"] == "first"
    names = ["adapter_config.json", "adapter_model.safetensors", "memory_tokens.safetensors", "r3mem.json"]
    assert sorted(path.name for path in (hub.root / "me/adapter").iterdir()) == names
    again = R3MemPipeline("me/adapter", revision="v1")
    assert ("download", "me/adapter", {"revision": "v1", "token": None}) in hub.asked
    model = R3MemModel.from_pretrained("me/adapter")
    for loaded in (again.model, model):
        assert loaded.origin() == pipeline.model.origin()
    with pytest.raises(ValueError, match="repo_id must be USER/NAME"):
        pipeline.model.push_to_hub("adapter")


def test_what_is_not_there(folder, hub):
    with pytest.raises(OSError, match="no model on the hub"):
        R3MemModel.from_pretrained("me/none")
    (hub.root / "me/model").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="is no folder, and no adapter that comes with r3mem_fast"):
        R3MemModel.from_pretrained("me/model")


def test_a_base_that_lies_elsewhere(folder, tmp_path):
    """An adapter names where its base was; the fingerprint decides whether another place has the same."""
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(folder, tmp_path / "base")
    R3MemPipeline(str(tmp_path / "base"), config=CONFIG).save(tmp_path / "adapter")
    (tmp_path / "base").rename(moved)
    for load in (R3MemPipeline, R3MemModel.from_pretrained):
        with pytest.raises(OSError, match=r"was made for the model '.*base', which is not found .*name it \(--model"):
            load(tmp_path / "adapter")
        load(tmp_path / "adapter", base=str(moved))
    model, tokenizer = load_model(str(moved))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(ValueError, match="was made for another base model"):
        R3MemPipeline(tmp_path / "adapter", base=other)
    with pytest.raises(TypeError, match="base is of an adapter"):
        R3MemPipeline(str(moved), base=other)


def test_merged_into_the_base(folder):
    model = R3MemPipeline(str(folder), config=R3MemConfig(core=(1, 3))).model
    ids = torch.randint(3, 90, (1, 12))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        expected = model(ids).logits
        base = load_model(str(folder))[0](ids).logits
        merged = model.merge_and_unload()
        found = merged(input_ids=ids).logits
    assert type(merged) is type(load_model(str(folder))[0]) and not any("lora" in n for n, _ in merged.named_modules())
    # The coupling is not in it: as near to the network with adapters as that is to the plain one, and not the base.
    assert (found - expected).abs().max() < 0.2 * (base - expected).abs().max()
    config = R3MemConfig(core=(1, 3), num_memory_tokens=2, segment_length=8, adapter_rows="memory")
    rows = R3MemPipeline(str(folder), config=config)
    with pytest.raises(ValueError, match="memory tokens alone"):
        rows.model.merge_and_unload()
