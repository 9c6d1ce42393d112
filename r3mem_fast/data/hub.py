"""Adapters and models on the Hugging Face hub: what is there, and bringing and sending adapters."""

import os
import re
import tempfile
from pathlib import Path

from ..manifest import FILES, MANIFEST

_SECONDS = 10.0


def is_path(name) -> bool:
    """Whether a name can only be a path on this machine, and no hub id: of a form that ids do not have."""
    text = str(name)
    return isinstance(name, Path) or text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1


def files_of(name: str, *, revision=None, token=None) -> set[str]:
    """Names of the files of a model on the hub, or of those in the cache where the hub cannot be asked.

    Raises:
        OSError: There is no such model, or the hub cannot be reached and nothing of it is in the cache.
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
    except Exception as error:  # an answer that is none, or of the transport, whose errors have changed their types
        if cached:
            return cached
        raise OSError(f"{name!r} is no folder here, and the hub cannot be reached ({error})") from error


def download_adapter(name: str, *, revision=None, token=None) -> Path:
    """The folder of an adapter that lies on the hub, in the hub's cache."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=list(FILES)))


def upload_adapter(save, repo_id: str, *, private=None, token=None, revision=None, commit_message=None) -> str:
    """Send an adapter to the hub, in a repository that is made if need be; returns the address of the commit.

    Args:
        save: Writes the adapter into the folder that it is given.
        repo_id: `USER/NAME`.
        private: Whether a new repository is private; None: the account's default.
        token: Of the hub; None: of the login on this machine.
        revision: The branch; None: main.
        commit_message: None: one that says what this is.
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


def _is_file(found):
    return isinstance(found, (str, os.PathLike))
