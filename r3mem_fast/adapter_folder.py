"""Folders of adapters on disk: writing, finding and loading them. What makes a folder one: see `manifest`."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import peft
import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

import r3mem_fast

from .config import R3MemConfig
from .data import hub
from .data.models import EMBEDDED_MODEL, load_model
from .files import flush, locked
from .fingerprints import fingerprint
from .manifest import (
    ADAPTER_FILES,
    FORMAT_VERSION,
    MANIFEST,
    MEMORY_TOKENS,
    SAVED,
    finish_save,
    folder_of_adapter,
    is_adapter,
    read_manifest,
)


def save(model, folder, *, adapter_dtype=None, **details):
    """Write a model's adapters, settings and `details` (values for JSON) into a folder, made if need be.

    adapter_dtype: that weights of adapters and memory tokens are rounded to; None: as they are.
    All files together: until the last of them is on the disk the folder is as it was, and from then on it is the new
    one, also if the process is killed while they move to their places: the next load or save moves the rest.
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
        # Embeddings are the base model's; left to choose, PEFT would ask a model hub about them.
        model.peft_model.save_pretrained(staging, save_embedding_layers=False)
        files = list(ADAPTER_FILES)
        if model.layout is not None:
            save_file({"embeddings": model.memory_embeddings.detach().cpu().contiguous()}, staging / MEMORY_TOKENS)
            files.append(MEMORY_TOKENS)
        if adapter_dtype is not None:
            for name in files[1:]:
                rounded = {key: tensor.to(adapter_dtype) for key, tensor in load_file(staging / name).items()}
                save_file(rounded, staging / name, {"format": "pt"})
        manifest["files"] = {name: _digest(staging / name) for name in files}
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for name in (*files, MANIFEST):
            flush(staging / name)
        staging.rename(folder / SAVED)
        finish_save(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def find(name, *, revision=None, token=None) -> Path:
    """The folder of an adapter: a local one, one that comes with this package, or one on the hub, which is downloaded.

    Raises OSError if there is none of this name.
    """
    folder = folder_of_adapter(name)
    if folder.exists() or hub.is_path(name) or MANIFEST not in hub.files_of(name, revision=revision, token=token):
        read_manifest(folder)  # which says what is wrong
        return folder
    return hub.download_adapter(name, revision=revision, token=token)


def adapter_named(name, *, revision=None, token=None, cache_dir=None, local_files_only=False, **settings):
    """The folder of the adapter that a name stands for; None if it stands for a model, or for nothing.

    Args:
        name: A folder, the name of an adapter that comes with this package, a hub id, or anything that `load_model`
            takes.
        revision: Branch, tag or commit on the hub.
        token: Token of the hub.
        cache_dir: Another cache than the hub's own: nothing is looked for on the hub then.
        local_files_only: Look for nothing on the hub.
        settings: More keywords of `load_model`, which change nothing here.

    Raises:
        TypeError: A revision of an adapter that lies here.
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


def load(cls, folder, base, dtype, revision=None, token=None):
    """What `save` wrote, as a model in eval mode; see `R3MemModel.from_pretrained`."""
    folder = find(folder, revision=revision, token=token)
    manifest = read_manifest(folder)
    config = R3MemConfig.from_dict(manifest["r3mem_config"])
    for name in (*ADAPTER_FILES, *([MEMORY_TOKENS] if config.num_memory_tokens else [])):
        if not (folder / name).is_file():
            raise OSError(f"{folder} is incomplete: {name} is missing")
        if _digest(folder / name) != manifest["files"].get(name):
            raise ValueError(
                f"{folder / name} is not the file that {MANIFEST} describes: it is damaged, or was changed"
            )
    if base is None or isinstance(base, (str, Path)):
        base, _ = load_base(folder, manifest, base, dtype=dtype)
    if isinstance(base, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in base.modules()):
        raise ValueError("base has adapters already, from an earlier load perhaps; pass a base model without any")
    found = fingerprint(base)
    if found != manifest["base_fingerprint"]:
        raise ValueError(
            f"{folder} was made for another base model ({manifest['base_model']}, "
            f"{manifest['base_fingerprint'][:12]}…) than {base.name_or_path or type(base).__name__} ({found[:12]}…): "
            "its weights or settings differ (as they do when weights made in bfloat16 are loaded in float16). Name "
            "the right one (--model, or base=)"
        )
    model = cls(PeftModel.from_pretrained(base, folder, is_trainable=True), config)
    model.set_base_fingerprint(found)
    if model.layout is not None:
        with torch.no_grad():
            model.memory_embeddings.copy_(load_file(folder / MEMORY_TOKENS)["embeddings"])
    return model.eval()


def load_base(folder, manifest, name=None, **settings):
    """`(model, tokenizer)` that an adapter was made for, by a name of one's own or by that in its manifest.

    Where the base lies does not matter: whether it is the right one is decided by its fingerprint.

    Args:
        folder: Folder of the adapter, for messages.
        manifest: Its `r3mem.json`.
        name: Folder or hub id of the base; None: the one in the manifest.
        settings: Keywords of `load_model`.

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
    """The folder that an adapter was loaded from or saved to, as it was last seen.

    Attributes:
        path: The folder; None: there is none.
    """

    def __init__(self):
        self.path: Path | None = None
        self._digest: str | None = None

    def seen(self, folder: str | Path):
        """Take note of a folder, as it is now."""
        self.path = Path(folder)
        self._digest = _digest(self.path / MANIFEST)

    def refuse_foreign(self, folder: Path, checkpoint: str):
        """Raise ValueError for a folder that holds another adapter, or this one, changed since it was seen.

        Args:
            folder: Where something is to be written.
            checkpoint: Name of what a run of the same kind leaves there; its adapter may be in the folder.
        """
        if not (folder / MANIFEST).is_file() or self.refuse_changed(folder):
            return
        if not (folder / checkpoint).exists():
            # With a checkpoint beside it: of the very run that made it, or refused where that is read.
            raise ValueError(
                f"{folder} holds an adapter already; choose another folder, or go on from it with "
                f"R3MemPipeline({str(folder)!r})"
            )

    def refuse_changed(self, folder: Path) -> bool:
        """Whether a folder is the one that was seen. Raises ValueError if it is, and has changed."""
        own = self.path is not None and self.path.resolve() == folder.resolve()
        if own and (folder / MANIFEST).is_file() and _digest(folder / MANIFEST) != self._digest:
            raise ValueError(
                f"{folder} was changed after this pipeline loaded it (by another process?), which would be lost; "
                f"load it again: R3MemPipeline({str(folder)!r})"
            )
        return own


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
