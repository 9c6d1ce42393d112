"""Adapters and models on the Hugging Face hub: looks up what is there, and downloads and uploads adapters."""

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..manifest import FILES, MANIFEST

# Seconds to wait for the hub's answer.
_SECONDS = 10.0


def is_path(name: str | os.PathLike[str]) -> bool:
    """Whether a name can only be a path on this machine, because no hub id has such a form.

    Args:
        name: Name of a model or an adapter.
    """
    text = str(name)
    return isinstance(name, Path) or text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1


def files_of(name: str, *, revision: str | None = None, token: str | bool | None = None) -> set[str]:
    """List the files of a model on the hub.

    Args:
        name: Hub id.
        revision: Branch, tag or commit; None: main.
        token: Token for the hub; None: that of the login on this machine.

    Returns:
        The names of the files. Where the hub cannot be asked: of `r3mem.json` and `config.json`, those in the cache.

    Raises:
        OSError: There is no such model, or the hub cannot be reached and nothing of the model is in the cache.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        cached = {n for n in (MANIFEST, "config.json") if _is_file(try_to_load_from_cache(name, n, revision=revision))}
    except HFValidationError as error:
        raise OSError(f"{name!r} is no folder here, and can be no hub id: {error}") from None
    if constants.HF_HUB_OFFLINE:
        if not cached:
            raise OSError(f"{name!r} is no folder here and not in the hub's cache, and HF_HUB_OFFLINE is set")
        return cached
    try:
        # One request and no retries: from_pretrained would retry for a minute before it says what is wrong.
        info = HfApi().model_info(name, revision=revision, token=token, timeout=_SECONDS)
        return {file.rfilename for file in info.siblings or ()}
    except GatedRepoError:
        raise OSError(f"{name!r} is gated on the hub: ask for access there, and log in (`hf auth login`)") from None
    except RevisionNotFoundError:
        raise OSError(f"{name!r} has no revision {revision!r} on the hub") from None
    except RepositoryNotFoundError:
        raise OSError(
            f"{name!r} is no folder here and no model on the hub; if it is a private one, log in (`hf auth login`)"
        ) from None
    except Exception as error:  # a broken answer or connection: their types differ between versions of huggingface_hub
        if cached:
            return cached
        raise OSError(f"{name!r} is no folder here, and the hub cannot be reached ({error})") from error


def download_adapter(name: str, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """Bring an adapter from the hub into the hub's cache on this machine.

    Args:
        name: Hub id.
        revision: Branch, tag or commit; None: main.
        token: Token for the hub; None: that of the login on this machine.

    Returns:
        The folder of the adapter in the cache.
    """
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=list(FILES)))


def upload_adapter(
    save: Callable[[str], object],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Send an adapter to the hub, to a repository that is made if need be.

    Args:
        save: Writes the adapter into the folder whose path it is given.
        repo_id: `USER/NAME`.
        private: Whether a new repository is private; None: the account's default.
        token: Token for the hub; None: that of the login on this machine.
        revision: Branch to commit to; None: main.
        commit_message: Message of the commit; None: "Adapter of r3mem_fast".

    Returns:
        The address of the commit.

    Raises:
        ValueError: `repo_id` is not of the form `USER/NAME`.
    """
    from huggingface_hub import HfApi

    if not re.fullmatch(r"[^/\s]+/[^/\s]+", repo_id):
        raise ValueError(f"repo_id must be USER/NAME, got {repo_id!r}")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Adapter of r3mem_fast",
            allow_patterns=list(FILES),
        )
    return str(commit)


def _is_file(found: object) -> bool:
    """Whether `try_to_load_from_cache` found a file: it answers with a path, None or a marker."""
    return isinstance(found, (str, os.PathLike))
