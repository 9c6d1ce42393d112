"""Finds and reads `r3mem.json`, the manifest that makes a folder an adapter. Needs neither torch nor transformers.

The folder has what PEFT writes, and beside it `r3mem.json`, which says what belongs together: the format version, the
settings, the base model with its fingerprint, and the SHA-256 of the other files.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from .files import is_held, locked

FORMAT_VERSION = 2
MANIFEST = "r3mem.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MEMORY_TOKENS = "memory_tokens.safetensors"  # only where the model has memory tokens
# All files of an adapter. The manifest, which describes the others, comes last.
FILES = (*ADAPTER_FILES, MEMORY_TOKENS, MANIFEST)
# Subfolder in which the files of a complete save wait to be moved to their places.
SAVED = ".saved"
# What interrupted runs leave in a folder.
REMEMBER_CHECKPOINT = "remember-checkpoint.safetensors"
TRAIN_CHECKPOINTS = "train-checkpoints"
# The adapters that come with this package, each a folder named as the adapter.
EMBEDDED_ADAPTERS = Path(__file__).parent / "adapters"
# Seconds that a reader waits for a writer who is moving the last files of a save.
_MOVING = 10.0
# Names of folders in a folder that holds an adapter for each document, as a pattern: digits of two digests.
OF_A_DOCUMENT = "[0-9a-f]" * 32
# Keys of each entry under `remembered`, one entry a pair, and the types of their values.
_OF_A_PAIR = {
    "level": str,
    "document": str,
    "query": str,
    "entities": list,
    "builder": str,
    "tokens": int,
    "sha256": str,
}


def folder_of_adapter(name: str | os.PathLike[str]) -> Path:
    """Return the folder that a name stands for.

    Args:
        name: Path of a folder, or the name of an adapter that comes with this package.

    Returns:
        The embedded adapter's folder if one has this name and no file or folder of that name is here; else the path
        itself, whether or not it exists.
    """
    embedded, path = EMBEDDED_ADAPTERS / str(name), Path(name).expanduser()
    return embedded if path.name == str(name) and embedded.is_dir() and not path.exists() else path


def is_adapter(name: str | os.PathLike[str]) -> bool:
    """Whether a name stands for an adapter that was saved on this machine, or comes with this package.

    Args:
        name: Path of a folder, or the name of an adapter that comes with this package.
    """
    folder = folder_of_adapter(name)
    return (folder / MANIFEST).is_file() or (folder / SAVED / MANIFEST).is_file()


def adapters_in(folder: str | os.PathLike[str]) -> list[Path]:
    """Find the adapters in a folder that holds one for each document, an `AdapterShelf`'s.

    Args:
        folder: Path of the folder, which need not exist.

    Returns:
        Their folders, the oldest first.
    """
    found = [path for path in Path(folder).glob(OF_A_DOCUMENT) if is_adapter(path)]
    return sorted(found, key=lambda path: (_saved_at(path), path.name))


def is_shelf(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter for each document, or learning the first one was begun.

    Args:
        folder: Path of the folder.
    """
    return any(path.is_dir() for path in Path(folder).glob(OF_A_DOCUMENT))


def _saved_at(folder):
    """Time of an adapter's last save, in nanoseconds; a save that waits to be finished is the latest."""
    try:
        return (folder / MANIFEST).stat().st_mtime_ns
    except FileNotFoundError:  # or another process has just removed it
        return float("inf")


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the manifest of an adapter, after finishing a save that was interrupted.

    Args:
        folder: Path of a folder, or the name of an adapter that comes with this package.

    Returns:
        The content of `r3mem.json`.

    Raises:
        InUseError: Another process is moving the files of a save.
        FileNotFoundError: There is no folder, or no `r3mem.json` in it.
        ValueError: The file is damaged, or of another format version.
    """
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


def interrupted_run(folder: str | os.PathLike[str]) -> str | None:
    """Say what a user should know about a run in a folder that has not ended, or was interrupted.

    Args:
        folder: Path of the folder.

    Returns:
        A sentence or two; None if there is no such run.
    """
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


def finish_save(folder: Path) -> None:
    """Move the files of a complete save to their places, if one waits for that.

    Args:
        folder: The adapter's folder, which the caller holds (see `files.locked`).
    """
    saved = folder / SAVED
    if saved.is_dir():
        for name in FILES:
            if (saved / name).exists():
                os.replace(saved / name, folder / name)
        shutil.rmtree(saved)
