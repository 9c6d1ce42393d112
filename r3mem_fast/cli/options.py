"""Options that several commands have; those of settings are made from the fields of their classes."""

import argparse
from collections.abc import Iterable
from typing import Any

from ..choices import LEVELS
from ..config import ADAPTER, BACKWARD, MEMORY, TRAINING, R3MemConfig
from ..settings import check_value, default_text, is_whole, names_of_group, settings_of

_DTYPES = ("bfloat16", "float16", "float32")
# Settings of a new adapter, and of these the ones that need memory tokens.
NEW_ADAPTER = names_of_group(R3MemConfig, ADAPTER, BACKWARD, MEMORY)
OF_MEMORIES = names_of_group(R3MemConfig, MEMORY)[1:]
OF_TRAINING = names_of_group(R3MemConfig, TRAINING)


def add_settings(
    parser: argparse.ArgumentParser, kind: type, names: Iterable[str] | None = None, *, defaults: dict | None = None
):
    """Add the options of a settings class. One that is not given leaves None.

    Args:
        parser: A command's parser.
        kind: The class.
        names: Of its fields; None: all. Fields without an option are passed over.
        defaults: Defaults of the command that are not the class's, by field.
    """
    for name, (field, about) in settings_of(kind).items():
        if about.option is None or (names is not None and name not in names):
            continue
        default = (defaults or {}).get(name, default_text(field, about))
        parser.add_argument(
            f"--{about.option}",
            dest=name,
            type=_type_of(name, field, about),
            choices=about.choices,
            metavar=None if about.choices else about.metavar or about.option.upper().replace("-", "_"),
            help=f"{_lowered(about.summary)} ({default})".replace("%", "%%"),
        )


def given_settings(options: argparse.Namespace, kind: type, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Values of the options of a settings class that were given, by field.

    Raises:
        ValueError: One is out of range.
    """
    wanted = settings_of(kind) if names is None else names
    given = {name: value for name in wanted if (value := getattr(options, name, None)) is not None}
    for name, value in given.items():
        check_value(kind, name, value)
    return given


def option_of(name: str, kind: type = R3MemConfig) -> str:
    """The option of a field, as it is written."""
    return f"--{settings_of(kind)[name][1].option}"


def _type_of(name, field, about):
    if name == "core":
        return core
    if about.choices is not None:
        return str
    return int if is_whole(field) else float


def _lowered(text):
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def add_adapter(parser: argparse.ArgumentParser, folder: str):
    """Add the argument FOLDER, an adapter, and the option of its base model. `folder` says what adapter."""
    parser.add_argument("folder", metavar="FOLDER", help=f"{folder}; or its hub id")
    parser.add_argument("--model", help="its base model: a folder or hub id (where it was when the adapter was made)")


def add_row_options(parser: argparse.ArgumentParser):
    """Add options that choose rows of a memory."""
    parser.add_argument("--level", choices=LEVELS, help="only rows of this level")
    parser.add_argument("--name", help="only the row of this name, see `r3mem inspect`")


def add_run_options(parser: argparse.ArgumentParser):
    """Add the options of commands that run an adapter."""
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="of the weights (the adapter's; the fastest that fits)",
    )
    add_machine_options(parser)


def add_machine_options(parser: argparse.ArgumentParser):
    """Add options of what computes."""
    parser.add_argument("--device", help="cpu, cuda, ... (a GPU if there is one)")
    parser.add_argument("--threads", type=positive, help="of torch on the CPU; 1 on a busy machine (one a core)")


def add_model_options(parser: argparse.ArgumentParser, dtype: str):
    """Add the options of commands that make a model reversible. `dtype` is their default dtype."""
    parser.add_argument("--dtype", default=dtype, choices=_DTYPES, help="of the weights (%(default)s)")
    parser.add_argument("--bits", type=int, default=4, choices=[1, 2, 4, 8], help="side bits (%(default)s)")
    parser.add_argument(
        "--fraction-bits", type=fraction_bits, default=14, help="of the streams, a number or auto (%(default)s)"
    )
    add_machine_options(parser)


def positive(text: str) -> int:
    """A positive number, as a type of arguments."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def core(text: str) -> str | tuple[int, int]:
    """`all`, or FIRST,END as two numbers, as a type of arguments."""
    if text == "all":
        return text
    try:
        first, end = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be FIRST,END or all, got {text!r}") from None
    return first, end


def fraction_bits(text: str) -> str | int:
    """`auto`, or a number, as a type of arguments."""
    return text if text == "auto" else int(text)
