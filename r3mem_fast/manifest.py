"""`r3mem.json`, which makes a folder an adapter: finding it, and reading it. Needs neither torch nor transformers.

The folder has what PEFT writes, and beside it `r3mem.json`, which says what belongs together: the format version, the
settings, the base model with its fingerprint, and the SHA-256 of the other files.
"""

import json
import os
import shutil
from pathlib import Path

from .files import is_held, locked

FORMAT_VERSION = 2
MANIFEST = "r3mem.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MEMORY_TOKENS = "memory_tokens.safetensors"  # of a model that has some
# All files of an adapter; the manifest, which describes the others, is the last.
FILES = (*ADAPTER_FILES, MEMORY_TOKENS, MANIFEST)
# Where a save that is complete waits for its files to be moved to their places.
SAVED = ".saved"
# What runs that were interrupted leave in a folder.
REMEMBER_CHECKPOINT = "remember-checkpoint.safetensors"
TRAIN_CHECKPOINTS = "train-checkpoints"
# The adapters that come with this package: a folder for each, by its name.
EMBEDDED_ADAPTERS = Path(__file__).parent / "adapters"
# Seconds that a reader waits for a writer who is moving the last files of a save.
_MOVING = 10.0
_OF_A_PAIR = {
    "level": str,
    "document": str,
    "query": str,
    "entities": list,
    "builder": str,
    "tokens": int,
    "sha256": str,
}


def folder_of_adapter(name) -> Path:
    """The folder of an adapter: of one that comes with this package by its name, else the folder of that name."""
    embedded = EMBEDDED_ADAPTERS / str(name)
    return embedded if Path(name).name == str(name) and embedded.is_dir() and not Path(name).exists() else Path(name)


def is_adapter(name) -> bool:
    """Whether this names an adapter that was saved here, or comes with this package."""
    folder = folder_of_adapter(name)
    return (folder / MANIFEST).is_file() or (folder / SAVED / MANIFEST).is_file()


def read_manifest(folder) -> dict:
    """`r3mem.json` of a folder. Raises OSError if there is none, ValueError if it is no such file."""
    folder = folder_of_adapter(folder)
    if (folder / SAVED).is_dir():
        with locked(folder, wait=_MOVING):
            finish_save(folder)
    path = folder / MANIFEST
    if not path.is_file():
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder, and no adapter that comes with r3mem_fast")
        if run := interrupted_run(folder):
            raise FileNotFoundError(f"{folder} has no adapter yet. {run}")
        raise FileNotFoundError(f"{folder} has no {MANIFEST}: no adapter was saved there by r3mem_fast")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        kinds = {"r3mem_config": dict, "base_model": str, "base_fingerprint": str, "files": dict}
        whole = all(isinstance(manifest[key], kind) for key, kind in kinds.items())
        whole = whole and isinstance(manifest.get("dtype", ""), str)
        whole = whole and all(
            isinstance(entry[key], kind)
            for entry in manifest.get("remembered", [])
            for key, kind in {**_OF_A_PAIR, "exact": bool}.items()
        )
        whole = whole and len(manifest["r3mem_config"].get("core") or ()) == 2
    except (ValueError, KeyError, TypeError):
        whole, version = False, None
    if not whole and version in (None, FORMAT_VERSION):
        raise ValueError(f"{path} is damaged, or was not written by r3mem_fast")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version!r}; this version of r3mem_fast reads {FORMAT_VERSION}")
    return manifest


def interrupted_run(folder) -> str | None:
    """What to know about a run in this folder that has not ended, or was interrupted; None if there is none."""
    folder = Path(folder)
    if is_held(folder):
        return "A process is writing there right now: wait for it to end"
    if (folder / REMEMBER_CHECKPOINT).exists():
        return (
            "A run of `r3mem remember` was interrupted there: give the same command again (or call remember with the "
            "same documents, model and folder), and it goes on where it was"
        )
    if (folder / TRAIN_CHECKPOINTS).is_dir():
        return (
            "A run of `r3mem train` was interrupted there: give the same command again (or call train with the same "
            "texts, model and folder), and it goes on from its last checkpoint"
        )
    return None


def finish_save(folder):
    """Move the files of a complete save to their places. The caller holds the folder."""
    saved = folder / SAVED
    if saved.is_dir():
        for name in FILES:
            if (saved / name).exists():
                os.replace(saved / name, folder / name)
        shutil.rmtree(saved)
