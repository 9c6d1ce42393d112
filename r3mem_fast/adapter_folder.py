"""Writes, finds and loads folders of adapters; `manifest` says what makes a folder one."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

import r3mem_fast

from .config import R3MemConfig
from .data import hub
from .data.models import EMBEDDED_MODEL, load_model
from .files import flush, locked, permissions_of
from .fingerprints import fingerprint
from .integrations.masters import master_weights
from .manifest import (
    ADAPTER_FILES,
    FORMAT_VERSION,
    MANIFEST,
    MEMORY_TOKENS,
    REMEMBER_CHECKPOINT,
    SAVED,
    TRAIN_CHECKPOINTS,
    finish_save,
    folder_of_adapter,
    is_adapter,
    read_manifest,
)


def save(model: Any, folder: str | Path, *, adapter_dtype: torch.dtype | None = None, **details: Any) -> None:
    """Write a model's adapters and settings into a folder.

    The folder changes as a whole. Until the last file is on the disk it is as it was, and from then on it is the new
    one, even if the process is killed while files move to their places: the next load or save moves the rest.

    Args:
        model: A `Network`.
        folder: The folder, made if it is not there.
        adapter_dtype: Dtype that the weights of adapters and memory tokens are rounded to; None: that which they have,
            in training with `MasterAdamW` that of their master weights.
        details: More entries of the manifest, values for JSON.

    Raises:
        InUseError: Another process writes to the folder (an OSError).
    """
    folder = Path(folder)
    manifest = {
        "format_version": FORMAT_VERSION,
        "r3mem_config": model.r3mem_config.to_dict(),
        "base_model": model.peft_model.get_base_model().name_or_path,
        "base_fingerprint": model.base_fingerprint(),
        "versions": {m.__name__: m.__version__ for m in (r3mem_fast, torch, transformers, peft)},
        **details,
    }
    with locked(folder):
        _save(model, folder, manifest, adapter_dtype)


def _save(model, folder, manifest, adapter_dtype):
    finish_save(folder)
    for leftover in folder.glob(".saving-*"):  # of a save that was killed before it was complete
        shutil.rmtree(leftover)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        files = list(ADAPTER_FILES)
        with master_weights(model):
            # Embeddings belong to the base model. PEFT would ask a model hub about them, if it were left to choose.
            model.peft_model.save_pretrained(staging, save_embedding_layers=False)
            if model.memory_embeddings is not None:
                save_file({"embeddings": model.memory_embeddings.detach().cpu().contiguous()}, staging / MEMORY_TOKENS)
                files.append(MEMORY_TOKENS)
        if adapter_dtype is not None:
            for name in files[1:]:
                rounded = {key: tensor.to(adapter_dtype) for key, tensor in load_file(staging / name).items()}
                save_file(rounded, staging / name, {"format": "pt"})
        manifest["files"] = {name: _digest(staging / name) for name in files}
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for name in (*files, MANIFEST):
            earlier = folder / name
            (staging / name).chmod(permissions_of(earlier if earlier.exists() else staging / MANIFEST))
            flush(staging / name)
        staging.rename(folder / SAVED)
        finish_save(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def find(name: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """Find the folder of an adapter; one on the hub is downloaded.

    Args:
        name: A folder, the name of an adapter that comes with this package, or a hub id.
        revision: Branch, tag or commit on the hub.
        token: Token of the hub.

    Raises:
        OSError: There is no adapter of this name.
    """
    folder = folder_of_adapter(name)
    if folder.exists() or hub.is_path(name) or MANIFEST not in hub.files_of(str(name), revision=revision, token=token):
        read_manifest(folder)  # raises an error that says what is wrong
        return folder
    return hub.download_adapter(str(name), revision=revision, token=token)


def adapter_named(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **settings: Any,
) -> Path | None:
    """The folder of the adapter that a name stands for; None if it stands for a model, or for nothing.

    Args:
        name: A folder, the name of an adapter that comes with this package, a hub id, or anything that `load_model`
            takes.
        revision: Branch, tag or commit on the hub.
        token: Token of the hub.
        cache_dir: Another cache than the hub's own: nothing is looked for on the hub then.
        local_files_only: Look for nothing on the hub.
        settings: More keyword arguments of `load_model`, which change nothing here.

    Raises:
        TypeError: A revision is given, and the adapter is on this machine.
    """
    if is_adapter(name):
        if revision is not None:
            raise TypeError(f"revision is for names on the hub, and {name} lies here")
        return find(name)
    if (
        name == EMBEDDED_MODEL
        or Path(name).expanduser().exists()
        or hub.is_path(name)
        or local_files_only
        or cache_dir
    ):
        return None
    try:
        files = hub.files_of(str(name), revision=revision, token=token)
    except OSError:
        return None  # and `load_model` says what is wrong
    return find(name, revision=revision, token=token) if MANIFEST in files else None


def load(
    cls: Any,
    folder: str | Path,
    base: Any,
    dtype: torch.dtype | str | None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Any:
    """Load an adapter that `save` wrote; see `R3MemModel.from_pretrained`.

    Args:
        cls: Class of the model, `R3MemModel`.
        folder: A folder, the name of an adapter that comes with this package, or a hub id.
        base: A base model without adapters, or its folder or hub id; None: the one in the manifest.
        dtype: Dtype that a base model is loaded in.
        revision: Branch, tag or commit of the adapter on the hub.
        token: Token of the hub.

    Returns:
        The model, in eval mode.

    Raises:
        OSError: The adapter or the base model is not found, or a file is missing.
        ValueError: A file is damaged, or the base model is another one, or has adapters.
    """
    folder = find(folder, revision=revision, token=token)
    manifest = read_manifest(folder)
    config = R3MemConfig.from_dict(manifest["r3mem_config"])
    _check_files(folder, manifest, config)
    if base is None or isinstance(base, (str, Path)):
        base, _ = load_base(folder, manifest, base, dtype=dtype)
    if isinstance(base, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in base.modules()):
        raise ValueError("base has adapters already, from an earlier load perhaps; pass a base model without any")
    found = fingerprint(base)
    _check_base(folder, manifest, base, found)
    model = cls(PeftModel.from_pretrained(base, folder, is_trainable=True), config)
    model.set_base_fingerprint(found)
    if model.memory_embeddings is not None:
        with torch.no_grad():
            model.memory_embeddings.copy_(load_file(folder / MEMORY_TOKENS)["embeddings"])
    return model.eval()


def _check_files(folder, manifest, config):
    """Raise OSError or ValueError if a file of an adapter is missing or is not what its manifest describes."""
    names = [*ADAPTER_FILES]
    if config.num_memory_tokens and config.memory_writer != "matched":
        names.append(MEMORY_TOKENS)
    for name in names:
        if not (folder / name).is_file():
            raise OSError(f"{folder} is incomplete: {name} is missing")
        if _digest(folder / name) != manifest["files"].get(name):
            raise ValueError(
                f"{folder / name} is not the file that {MANIFEST} describes: it is damaged, or was changed"
            )


def _check_base(folder, manifest, base, found):
    """Raise ValueError if an adapter was made for another base model than this, of such a fingerprint."""
    if found != manifest["base_fingerprint"]:
        raise ValueError(
            f"{folder} was made for another base model ({manifest['base_model']}, "
            f"{manifest['base_fingerprint'][:12]}…) than {base.name_or_path or type(base).__name__} ({found[:12]}…): "
            "its weights or settings differ (as they do when weights made in bfloat16 are loaded in float16). Name "
            "the right one (--model, or base=)"
        )


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all that a model's adapters have learned, by name of the parameter, for `put_weights`.

    Args:
        model: A `Network`.
    """
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


@torch.no_grad()
def put_weights(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Put weights of `weights_of` in the place of what a model's adapters have learned since.

    Args:
        model: The model that they are of.
        weights: The weights.
    """
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        parameters[name].copy_(weight)


# Settings of PEFT's that change what the same weights compute.
_OF_LORA = ("r", "target_modules", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


@torch.no_grad()
def replace_weights(model: Any, folder: str | Path) -> dict[str, Any]:
    """Put the adapter of a folder in the place of a model's own, without loading the base model again.

    Args:
        model: A `Network` with the same base model and the same settings. It is as it was if this fails.
        folder: A folder that `save` wrote.

    Returns:
        The manifest of the folder.

    Raises:
        OSError: A file is missing.
        ValueError: A file is damaged, or base model or settings are other ones.
    """
    folder = find(folder)
    manifest = read_manifest(folder)
    config = R3MemConfig.from_dict(manifest["r3mem_config"])
    _check_files(folder, manifest, config)
    _check_base(folder, manifest, model.peft_model.get_base_model(), model.base_fingerprint())
    saved = PeftConfig.from_pretrained(folder)
    own = model.peft_model.peft_config[model.peft_model.active_adapter]
    differ = [name for name in _OF_LORA if getattr(saved, name, None) != getattr(own, name, None)]
    if config != model.r3mem_config or differ:
        raise ValueError(
            f"{folder} was made with other settings than the model's adapters, and cannot take their place; load it "
            f"alone: R3MemPipeline({str(folder)!r})"
        )
    weights = load_file(folder / ADAPTER_FILES[1])
    shapes = {name: weight.shape for name, weight in get_peft_model_state_dict(model.peft_model).items()}
    if {name: weight.shape for name, weight in weights.items()} != shapes:
        raise ValueError(f"{folder} holds weights of other names or sizes than the model's adapters")
    set_peft_model_state_dict(model.peft_model, weights)
    if model.memory_embeddings is not None:
        model.memory_embeddings.copy_(load_file(folder / MEMORY_TOKENS)["embeddings"])
    return manifest


def load_base(
    folder: str | Path, manifest: dict[str, Any], name: str | Path | None = None, **settings: Any
) -> tuple[Any, Any]:
    """Load the base model that an adapter was made for.

    Whether it is the right one is not checked here; its fingerprint decides that.

    Args:
        folder: Folder of the adapter, for messages.
        manifest: Contents of its `r3mem.json`.
        name: Folder or hub id of the base model; None: the one in the manifest.
        settings: Keyword arguments of `load_model`.

    Returns:
        The model and its tokenizer.

    Raises:
        OSError: It cannot be found.
    """
    recorded = manifest["base_model"]
    if not (name or recorded):
        raise FileNotFoundError(f"{folder} was made for a model that had no name; pass that model (--model, or base=)")
    try:
        return load_model(name or recorded, **settings)
    except OSError as error:
        if name:
            raise
        raise OSError(
            f"{folder} was made for the model {recorded!r}, which is not found ({error}). If it lies elsewhere now, "
            "name it (--model, or base=)"
        ) from error


class OwnFolder:
    """Remembers the folder that an adapter was loaded from or saved to, to notice changes by others.

    Attributes:
        path: The folder; None: there is none.
    """

    def __init__(self):
        self.path: Path | None = None
        self._digest: str | None = None

    def seen(self, folder: str | Path) -> None:
        """Take note of a folder as it is now."""
        self.path = Path(folder)
        self._digest = _digest(self.path / MANIFEST)

    def refuse_foreign(self, folder: Path, checkpoint: str) -> None:
        """Refuse to write to a folder whose adapter is another one, or was changed since it was seen, or to a model's.

        Args:
            folder: The folder that is to be written to.
            checkpoint: Name of the checkpoint that a run of the same kind leaves. With one in the folder, its adapter
                is not refused here.

        Raises:
            ValueError: The folder must not be written to.
        """
        _refuse_model(folder)
        for other in {REMEMBER_CHECKPOINT, TRAIN_CHECKPOINTS} - {checkpoint}:
            if (folder / other).exists():
                raise ValueError(
                    f"a run of another kind was interrupted in {folder}, which has left {other}: finish that run, "
                    "delete what it has left, or choose another folder"
                )
        if not (folder / MANIFEST).is_file() or self.refuse_changed(folder):
            return
        if not (folder / checkpoint).exists():
            # A checkpoint beside the adapter is of the run that made it. If not, it is refused when it is read.
            raise ValueError(
                f"{folder} holds an adapter already; choose another folder, or go on from it with "
                f"R3MemPipeline({str(folder)!r})"
            )

    def refuse_changed(self, folder: Path) -> bool:
        """Whether a folder is the one that was seen.

        Args:
            folder: The folder.

        Raises:
            ValueError: It is, and its adapter has changed since then.
        """
        own = self.path is not None and self.path.resolve() == folder.resolve()
        if own and (folder / MANIFEST).is_file() and _digest(folder / MANIFEST) != self._digest:
            raise ValueError(
                f"{folder} was changed after this pipeline loaded it (by another process?), which would be lost; "
                f"load it again: R3MemPipeline({str(folder)!r})"
            )
        return own


def _refuse_model(folder):
    """Raise ValueError where a new adapter would stand in the way of a model, which is loaded by the same name."""
    if (folder / MANIFEST).is_file():
        return
    if str(folder) == EMBEDDED_MODEL or (folder / "config.json").is_file():
        raise ValueError(f"{folder} is a model, and an adapter there would hide it; choose another folder")


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
