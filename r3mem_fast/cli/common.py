"""Functions that several commands use."""

import argparse
import contextlib
import sys
from collections.abc import Generator
from typing import Any

from ..config import R3MemConfig
from ..store.defaults import OF_MATCHED
from .options import given_settings


def say(options: argparse.Namespace, text: str) -> None:
    """Print a line to standard error, for the person at the terminal.

    Args:
        options: The command's arguments.
        text: The line.
    """
    print(f"r3mem {options.command}: {text}", file=sys.stderr, flush=True)


def begin(options: argparse.Namespace, what: str) -> None:
    """Print what is being done; then import torch and transformers, which takes some seconds, and set them up.

    Args:
        options: The command's arguments.
        what: What is being done.
    """
    print(f"{what} ...", file=sys.stderr, flush=True)
    from ..integrations.quiet import quiet

    quiet()
    if getattr(options, "threads", None) is not None:
        import torch

        torch.set_num_threads(options.threads)


def pipeline_of(options: argparse.Namespace, model: str, **settings: Any) -> Any:
    """The pipeline of a model or an adapter, on the device and in the dtype that are asked for.

    Args:
        options: The command's arguments.
        model: Name of a model, or the folder of an adapter.
        settings: More arguments of `R3MemPipeline`.
    """
    from .. import R3MemPipeline

    return R3MemPipeline(model, device=device_of(options), dtype=options.dtype, **settings)


def sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `transformers`' `generate` for the options of writing; sets the seed.

    Args:
        options: The command's arguments.
    """
    import torch

    torch.manual_seed(options.seed)
    names = () if options.temperature == 0 else ("temperature", "top_p")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    return {"max_new_tokens": options.max_new_tokens, "do_sample": bool(given), **given}


def store_of(options: argparse.Namespace) -> Any:
    """The store that is asked for, with its model, which it loads when it is needed.

    Args:
        options: The command's arguments.

    Raises:
        OSError: The folder cannot be made or written to.
        ValueError: The folder holds something else, or a size is out of range.
    """
    from ..store.texts import store_folder

    given = given_settings(options, R3MemConfig, OF_MATCHED)
    from .. import MemoryStore

    return MemoryStore(
        store_folder(options.store),
        options.model,
        config=given or None,
        raw_tokens=getattr(options, "raw_tokens", None),
        system=getattr(options, "system", None),
        device=device_of(options),
        dtype=options.dtype,
    )


def agreed(question: str) -> bool:
    """Ask a question that is answered by yes or no; whatever is not yes is no."""
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def print_streamed(pieces: Generator[str, None, None]) -> str:
    """Print a text while it is written; returns it."""
    found = ""
    with contextlib.closing(pieces):  # so that an interruption ends the writing, too
        try:
            for piece in pieces:
                found += piece
                print(piece, end="", flush=True)
        finally:
            print(flush=True)
    return found.strip()


def adapter_of(options: argparse.Namespace) -> dict[str, Any]:
    """Read the `r3mem.json` of the adapter that is asked for, before anything that takes long is loaded.

    Args:
        options: The command's arguments.

    Raises:
        OSError: There is no such adapter.
        ValueError: Its manifest is damaged.
    """
    from ..data.hub import is_path
    from ..manifest import folder_of_adapter, read_manifest

    folder = folder_of_adapter(options.folder)
    if not folder.exists() and not is_path(options.folder) and "/" in options.folder:
        print(f"Looking for {options.folder} on the hub ...", file=sys.stderr, flush=True)
        from .. import adapter_folder

        folder = adapter_folder.find(options.folder)
    return read_manifest(folder)


def texts_of(options: argparse.Namespace) -> dict[str, str]:
    """Read the texts that are asked for.

    Args:
        options: The command's arguments.

    Returns:
        The texts by their paths.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is named twice, or is no text.
    """
    from pathlib import Path

    from ..data.text import read_text

    if len({Path(path).resolve() for path in options.texts}) < len(options.texts):
        raise ValueError("a text is named twice")
    return {path: read_text(path) for path in options.texts}


def device_of(options: argparse.Namespace) -> Any:
    """The device that is asked for; if none is, a GPU if there is one, else the CPU.

    Args:
        options: The command's arguments.

    Raises:
        ValueError: The device is not there.
    """
    import torch

    if options.device is not None:
        from ..devices import as_device

        return as_device(options.device)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
