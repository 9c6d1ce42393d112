"""Settings that describe themselves: each field of a settings class has a help text, a group, a range and an option.

The options of the command, checks of values, and tables of the documentation are made from these. Needs no torch.
"""

import dataclasses
import inspect
import math
import textwrap
from typing import Any


@dataclasses.dataclass(frozen=True)
class Setting:
    """Description of one field of a settings class.

    Attributes:
        help: Meaning of the setting. The first sentence alone is the help of the command's option.
        group: Name of the group that the documentation shows it in.
        option: Name of the command's option, without dashes; None: there is none.
        choices: Allowed values; None: any of its type.
        least: Smallest allowed value; None: there is none.
        most: Largest allowed value; None: there is none.
        above: Number that values must be larger than; None: there is none.
        below: Number that values must be smaller than; None: there is none.
        unset: Meaning of the value None; None: the value None is not allowed.
        metavar: Placeholder for the value in the command's help; None: the option's name.
    """

    help: str
    group: str
    option: str | None = None
    choices: tuple | None = None
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    unset: str | None = None
    metavar: str | None = None

    @property
    def summary(self) -> str:
        """The first sentence of the help, without its period."""
        return self.help.partition(". ")[0].rstrip(".")


def setting(default: Any, help: str, *, group: str, **more: Any) -> Any:
    """Make a field of a settings class.

    Args:
        default: Default of the field.
        help: Meaning of the setting, see `Setting`.
        group: Name of its group.
        more: More attributes of `Setting`.

    Returns:
        A field of a dataclass.
    """
    return dataclasses.field(default=default, metadata={"setting": Setting(help, group, **more)})


def settings_of(kind: type) -> dict[str, tuple[dataclasses.Field, Setting]]:
    """Fields of a settings class and their descriptions, by name, in order."""
    return {field.name: (field, field.metadata["setting"]) for field in dataclasses.fields(kind)}


def names_of_group(kind: type, *groups: str) -> tuple[str, ...]:
    """Names of the fields that belong to the given groups.

    Args:
        kind: Settings class.
        groups: Names of groups.
    """
    return tuple(name for name, (_, about) in settings_of(kind).items() if about.group in groups)


def described(kind: type) -> type:
    """Add the descriptions of its fields to the docstring of a settings class: a decorator."""
    entries = [
        textwrap.fill(
            f"{name}: {about.help} Default: {default_text(field, about)}.",
            width=110,
            initial_indent="    ",
            subsequent_indent="        ",
        )
        for name, (field, about) in settings_of(kind).items()
    ]
    kind.__doc__ = "\n".join([inspect.cleandoc(kind.__doc__ or ""), "", "Attributes:", *entries])
    return kind


def check(values: Any) -> None:
    """Check all fields of a settings object that have choices or a range. Other fields are checked by their class.

    Args:
        values: An instance of a settings class.

    Raises:
        ValueError: A value is not allowed. The message names the field, and says which values are.
    """
    for name in settings_of(type(values)):
        check_value(type(values), name, getattr(values, name))


def check_value(kind: type, name: str, value: Any) -> None:
    """Check a value for one field of a settings class, as `check` does.

    Args:
        kind: Settings class.
        name: Name of the field.
        value: The value.

    Raises:
        ValueError: The value is not allowed.
    """
    field, about = settings_of(kind)[name]
    if value is None and about.unset is not None:
        return
    if about.choices is not None:
        if value not in about.choices:
            raise ValueError(f"{name} must be one of {about.choices}, got {value!r}")
    elif _has_range(about) and not _is_in_range(value, field, about):
        raise ValueError(f"{name} must be {_range(field, about)}, got {value!r}")


def is_whole(field: dataclasses.Field) -> bool:
    """Whether a field holds whole numbers."""
    return field.type in (int, int | None)


def default_text(field: dataclasses.Field, about: Setting) -> str:
    """Default of a field as text; the meaning of None in place of None.

    Args:
        field: The field.
        about: Its description.
    """
    return str(about.unset) if field.default is None else str(field.default)


def _has_range(about):
    return any(bound is not None for bound in (about.least, about.most, about.above, about.below))


def _is_in_range(value, field, about):
    kinds = int if is_whole(field) else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not math.isfinite(value):
        return False
    return (
        (about.least is None or value >= about.least)
        and (about.most is None or value <= about.most)
        and (about.above is None or value > about.above)
        and (about.below is None or value < about.below)
    )


def _range(field, about):
    kind = "an integer" if is_whole(field) else "a number"
    bounds = []
    if about.least is not None and about.most is not None:
        bounds.append(f"from {about.least} to {about.most}")
    elif about.least is not None:
        bounds.append(
            "that is not negative" if about.least == 0 and about.below is None else f"of at least {about.least}"
        )
    if about.above is not None:
        bounds.append(f"above {about.above}")
    if about.below is not None:
        bounds.append(f"below {about.below}")
    return " ".join([kind, " and ".join(bounds)])
