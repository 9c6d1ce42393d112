"""Settings that describe themselves: a field of a dataclass says its help, its group, its range and its option.

The command's options, the checks of values, and the tables of the documentation are made from that. Needs no torch.
"""

import dataclasses
import inspect
import math
import textwrap
from typing import Any


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a field of a settings class says of itself.

    Attributes:
        help: What it does. The first sentence stands alone, as an option's help.
        group: Fields of one group stand together.
        option: Name of the command's option, without dashes; None: it has none.
        choices: Its values; None: any of its kind.
        least: Smallest value; None: any.
        most: Largest value; None: any.
        above: Values are larger than this; None: any.
        below: Values are smaller than this; None: any.
        unset: What None stands for; None: it must have a value.
        metavar: What stands for the value in the command's help; None: the option's name.
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


def setting(default: Any, help: str, *, group: str, **more) -> Any:
    """A field of a settings class.

    Args:
        default: Its default.
        help: See `Setting`.
        group: See `Setting`.
        more: More attributes of `Setting`.
    """
    return dataclasses.field(default=default, metadata={"setting": Setting(help, group, **more)})


def settings_of(kind: type) -> dict[str, tuple[dataclasses.Field, Setting]]:
    """The fields of a settings class and what they say of themselves, by name, in order."""
    return {field.name: (field, field.metadata["setting"]) for field in dataclasses.fields(kind)}


def names_of_group(kind: type, *groups: str) -> tuple[str, ...]:
    """Names of the fields of these groups."""
    return tuple(name for name, (_, about) in settings_of(kind).items() if about.group in groups)


def described(kind: type) -> type:
    """Append what the fields say of themselves to a settings class's docstring: a decorator."""
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


def check(values: Any):
    """Check a settings object's fields against what they say of themselves.

    Fields whose default is neither a number nor a string are left to their class.

    Raises:
        ValueError: A value is out of range, names the field and says what it may be.
    """
    for name in settings_of(type(values)):
        check_value(type(values), name, getattr(values, name))


def check_value(kind: type, name: str, value: Any):
    """Check a value for one field of a settings class, as `check` does."""
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
    """A field's default, in words where it is None."""
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
