"""Adds options that several commands have; those of settings are made from the fields of their classes."""

import argparse
from collections.abc import Iterable
from typing import Any

from ..choices import LEVELS
from ..config import ADAPTER, BACKWARD, MEMORY, TRAINING, R3MemConfig
from ..settings import check_value, default_text, is_whole, names_of_group, settings_of
from ..store.defaults import OF_MATCHED, PASSAGES, RAW_TOKENS, SETTINGS, WAYS

_DTYPES = ("bfloat16", "float16", "float32")
# Settings of a new adapter, and those among them that need memory tokens.
NEW_ADAPTER = names_of_group(R3MemConfig, ADAPTER, BACKWARD, MEMORY)
OF_MEMORIES = names_of_group(R3MemConfig, MEMORY)[1:]
OF_TRAINING = names_of_group(R3MemConfig, TRAINING)


def add_settings(
    parser: argparse.ArgumentParser,
    kind: type,
    names: Iterable[str] | None = None,
    *,
    defaults: dict[str, Any] | None = None,
) -> None:
    """Add the options of a settings class. The value of an option that is not given is None.

    Args:
        parser: Parser of a command.
        kind: The class.
        names: Names of the fields whose options are added; None: all. Fields without an option are left out.
        defaults: Defaults, by name of the field, to show where the command has other ones than the class.
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
    """Check the options of a settings class that were given.

    Args:
        options: The command's arguments.
        kind: The class.
        names: Names of the fields; None: all.

    Returns:
        Values of the options that were given, by name of the field.

    Raises:
        ValueError: A value is out of range.
    """
    wanted = settings_of(kind) if names is None else names
    given = {name: value for name in wanted if (value := getattr(options, name, None)) is not None}
    for name, value in given.items():
        check_value(kind, name, value)
    return given


def option_of(name: str, kind: type = R3MemConfig) -> str:
    """Option of a field as it is written on the command line, such as "--lora-r".

    Args:
        name: Name of the field.
        kind: Settings class.
    """
    return f"--{settings_of(kind)[name][1].option}"


def _type_of(name, field, about):
    if name in ("core", "drawn_memory_tokens"):
        return core if name == "core" else sizes
    if about.choices is not None:
        return str
    return int if is_whole(field) else float


def _lowered(text):
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def add_adapter(parser: argparse.ArgumentParser, folder: str) -> None:
    """Add the argument FOLDER for an adapter, and the option for its base model.

    Args:
        parser: Parser of a command.
        folder: Help text of FOLDER.
    """
    parser.add_argument("folder", metavar="FOLDER", help=f"{folder}; or its hub id")
    parser.add_argument("--model", help="its base model: a folder or hub id (where it was when the adapter was made)")


def add_row_options(parser: argparse.ArgumentParser) -> None:
    """Add options that choose rows of a memory."""
    parser.add_argument("--level", choices=LEVELS, help="only rows of this level")
    parser.add_argument("--name", help="only the row of this name, see `r3mem inspect`")


def add_store(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the folder of a store."""
    what = "folder of the store ($R3MEM_STORE, or ~/.local/share/r3mem/store)"
    parser.add_argument("--store", metavar="FOLDER", help=what)


def add_store_model(parser: argparse.ArgumentParser, *, json: bool = True, sizes: bool = False) -> None:
    """Add the options of commands that read a store with its model.

    Args:
        parser: Parser of a command.
        json: Whether there is an option `--json`.
        sizes: Whether there are options for the sizes of memories, of commands that make a store.
    """
    parser.add_argument(
        "--model", help="a folder, hub id or adapter of anchors (what the store was made with; smollm2-135m if new)"
    )
    if sizes:
        defaults = {name: f"{SETTINGS[name]} in a new store" for name in OF_MATCHED}
        add_settings(parser, R3MemConfig, OF_MATCHED, defaults=defaults)
        parser.add_argument(
            "--raw-tokens",
            type=int,
            help=f"tokens, the newest ones, that are never compressed ({RAW_TOKENS} in a new store)",
        )
        parser.add_argument("--system", help="system prompt of all conversations (the chat template's in a new store)")
    add_run_options(parser, json=json)


def add_lookup(parser: argparse.ArgumentParser) -> None:
    """Add the options that have what was said looked up for a question."""
    parser.add_argument(
        "--passages",
        type=whole,
        default=PASSAGES,
        help="items that are looked up, and read word for word (%(default)s)",
    )
    add_way(parser)


def add_way(parser: argparse.ArgumentParser) -> None:
    """Add the option that says how something is looked up."""
    what = "look up by words, by nearness of meaning, or by recalling backward what was consolidated (%(default)s)"
    parser.add_argument("--by", choices=WAYS, default="bm25", help=what)


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Add the options of writing.

    Args:
        parser: Parser of a command.
        max_new_tokens: Default of the most tokens that are written.
    """
    parser.add_argument("--max-new-tokens", type=positive, default=max_new_tokens, help="tokens at most (%(default)s)")
    parser.add_argument("--temperature", type=temperature, help="sample with this temperature; 0: greedily (greedy)")
    parser.add_argument(
        "--top-p", type=share, help="sample from the likeliest tokens that have this probability together"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (%(default)s)")


def add_run_options(parser: argparse.ArgumentParser, *, json: bool = True) -> None:
    """Add the options of commands that run a model.

    Args:
        parser: Parser of a command.
        json: Whether there is an option `--json`.
    """
    if json:
        parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="dtype of the weights (the adapter's; the fastest that fits)",
    )
    add_machine_options(parser)


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options `--device` and `--threads`."""
    parser.add_argument("--device", help="device: cpu, cuda, ... (a GPU if there is one)")
    parser.add_argument(
        "--threads", type=positive, help="threads of torch on the CPU; 1 on a busy machine (one a core)"
    )


def add_model_options(parser: argparse.ArgumentParser, dtype: str) -> None:
    """Add the options of commands that make a model reversible.

    Args:
        parser: Parser of a command.
        dtype: Default of the dtype.
    """
    parser.add_argument("--dtype", default=dtype, choices=_DTYPES, help="dtype of the weights (%(default)s)")
    parser.add_argument("--bits", type=int, default=4, choices=[1, 2, 4, 8], help="side bits (%(default)s)")
    parser.add_argument(
        "--fraction-bits",
        type=fraction_bits,
        default=14,
        help="binary places of the streams, a number or auto (%(default)s)",
    )
    add_machine_options(parser)


def positive(text: str) -> int:
    """Read a positive integer: the `type` of an argument."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def whole(text: str) -> int:
    """Read an integer of 0 or more: the `type` of an argument."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {number}")
    return number


def temperature(text: str) -> float:
    """Read a temperature, 0 or more: the `type` of an argument."""
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return number


def share(text: str) -> float:
    """Read a share above 0, and 1 at most: the `type` of an argument."""
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0, and 1 at most, got {text}")
    return number


def core(text: str) -> str | tuple[int, int]:
    """Read a core, `all` or FIRST,END: the `type` of an argument."""
    if text == "all":
        return text
    try:
        first, end = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be FIRST,END or all, got {text!r}") from None
    return first, end


def sizes(text: str) -> tuple[int, ...]:
    """Read positive numbers N,N,...: the `type` of an argument."""
    return tuple(positive(part) for part in text.split(","))


def fraction_bits(text: str) -> str | int:
    """Read fraction bits, `auto` or a number: the `type` of an argument."""
    return text if text == "auto" else int(text)
