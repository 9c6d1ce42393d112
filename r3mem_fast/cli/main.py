"""The `r3mem` command: its parser, its error messages and its exit status."""

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence

from .. import __version__
from . import calibrate, chat, check, mcp, memories, remember, store, train
from .common import say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Arguments of the command; None: those that the process was started with.

    Returns:
        The exit status. 0: it is done. 1: it is done, and a check failed, or nothing came of it. 2: it cannot be done;
        the message says what to do. 130: it was interrupted.
    """
    commands = parser()
    options, more = commands.parse_known_args(arguments)
    # Words behind an option, which argparse does not add to those before it.
    if more and (not hasattr(options, "words") or any(word.startswith("-") for word in more)):
        commands.error(f"unrecognized arguments: {' '.join(more)}")
    options.words = [*getattr(options, "words", ()), *more]
    try:
        with _plain_warnings():
            return options.run(options)
    except BrokenPipeError:  # who reads the output has had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        if options.debug:
            raise
        say(options, str(error))
        return 2
    except KeyboardInterrupt:
        folder = getattr(options, "trained_folder", None)
        what = None if folder is None else _interrupted_run(folder)
        say(options, f"interrupted. {what}" if what else "interrupted")
        return 130


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings as plain lines, without the place in the source that they come from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *place, **more: print(f"Note: {message}", file=sys.stderr, flush=True)
        yield


def _interrupted_run(folder: str) -> str | None:
    from pathlib import Path

    from ..manifest import interrupted_run

    # Also of an adapter of one document, which has a folder of its own in this one.
    runs = [interrupted_run(path) for path in (Path(folder), *Path(folder).glob("*"))]
    return next((run for run in runs if run), None)


def parser() -> argparse.ArgumentParser:
    """Parser of the `r3mem` command, with all of its commands."""
    parser = argparse.ArgumentParser(prog="r3mem", description="Reversible memory networks from language models.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"r3mem_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    check.add_demo(commands)
    check.add_check(commands)
    calibrate.add_commands(commands)
    remember.add_commands(commands)
    train.add_commands(commands)
    memories.add_commands(commands)
    store.add_commands(commands)
    chat.add_commands(commands)
    mcp.add_commands(commands)
    check.add_env(commands)
    check.add_families(commands)
    parser.epilog = (
        "R3MEM_CACHE: the folder of the embedded model. R3MEM_STORE: the folder of the store. R3MEM_MAX_STEPS: a "
        "limit of training steps, to try commands out. R3MEM_KERNELS, R3MEM_ATTENTION: reference or triton."
    )
    return parser
