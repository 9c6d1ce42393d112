"""The command: its parser, its errors, its exit status."""

import argparse
import contextlib
import sys
import warnings

from .. import __version__
from . import check, memories, remember, train
from .common import say


def main(arguments=None):
    """Run the command; returns its exit status.

    0: done. 1: what was asked for was done, and a check failed, or nothing came of it. 2: the request cannot be met;
    the message says what to do. 130: interrupted.
    """
    options = parser().parse_args(arguments)
    try:
        with _plain_warnings():
            return options.run(options)
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
def _plain_warnings():
    """Show warnings as lines of the command's own, without the place in the source that gave them."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *place, **more: print(f"Note: {message}", file=sys.stderr, flush=True)
        yield


def _interrupted_run(folder):
    from ..manifest import interrupted_run

    return interrupted_run(folder)


def parser():
    """The parser of the command, with all of its commands."""
    parser = argparse.ArgumentParser(prog="r3mem", description="Reversible memory networks from language models.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"r3mem_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    check.add_demo(commands)
    check.add_check(commands)
    remember.add_commands(commands)
    train.add_commands(commands)
    memories.add_commands(commands)
    check.add_env(commands)
    parser.epilog = (
        "R3MEM_CACHE: the folder of the embedded model. R3MEM_MAX_STEPS: a limit of training steps, to try commands "
        "out. R3MEM_KERNELS, R3MEM_ATTENTION: reference or triton."
    )
    return parser
