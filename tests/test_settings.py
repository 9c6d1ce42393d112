"""Settings describe themselves: what is made from that is right for every field of every class."""

import dataclasses

import pytest

from r3mem_fast import R3MemConfig, RefineSettings, RememberSettings, TrainSettings
from r3mem_fast.cli import parser
from r3mem_fast.cli.options import NEW_ADAPTER, OF_MEMORIES, OF_TRAINING
from r3mem_fast.config import TRAINING_SETTINGS
from r3mem_fast.settings import check_value, default_text, settings_of

KINDS = (R3MemConfig, RememberSettings, TrainSettings, RefineSettings)
FIELDS = [(kind, name) for kind in KINDS for name in settings_of(kind)]


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_each_field_says_what_it_is(kind, name):
    field, about = settings_of(kind)[name]
    assert about.help[0].isupper() and about.help.endswith(".") and about.group
    assert not about.help.startswith(("Of ", "By ", "As "))
    assert f"{name}: {about.help[:20]}" in kind.__doc__
    assert field.default is not None or about.unset, "what None stands for"
    check_value(kind, name, field.default)
    assert default_text(field, about) not in ("None", "")


def values_out_of_range():
    for kind, name in FIELDS:
        _, about = settings_of(kind)[name]
        beyond = [about.least is not None and about.least - 1, about.most is not None and about.most + 1,
                  about.above, about.below, "sideways" if about.choices else None]  # fmt: skip
        yield from ((kind, name, value) for value in beyond if value is not None and value is not False)
        if about.choices is None and isinstance(settings_of(kind)[name][0].default, int) and about.least is not None:
            yield from ((kind, name, value) for value in (True, 1.5, float("nan")))


@pytest.mark.parametrize(("kind", "name", "value"), list(values_out_of_range()))
def test_a_value_out_of_range_is_named(kind, name, value):
    with pytest.raises(ValueError, match=f"{name} must be "):
        check_value(kind, name, value)
    with pytest.raises(ValueError, match=f"^{name}"):
        kind(**{name: value})


def test_options_are_made_of_fields():
    """Each has the field's name, its choices and its default in words, and leaves None where it is not given."""
    commands = next(action for action in parser()._actions if action.dest == "command").choices
    for command, kinds in (
        ("remember", {R3MemConfig: NEW_ADAPTER, RememberSettings: settings_of(RememberSettings)}),
        (
            "train",
            {R3MemConfig: (*NEW_ADAPTER[:2], *OF_MEMORIES, *OF_TRAINING), TrainSettings: settings_of(TrainSettings)},
        ),
        ("refine", {RefineSettings: settings_of(RefineSettings)}),
    ):
        options = {action.dest: action for action in commands[command]._actions}
        for kind, names in kinds.items():
            for name in names:
                field, about = settings_of(kind)[name]
                if about.option is None:
                    assert name not in options
                    continue
                option = options[name]
                assert option.option_strings == [f"--{about.option}"] and option.default is None
                assert option.choices == about.choices
                assert about.summary[1:] in option.help
                # The commands have defaults of their own for the number of memory tokens.
                assert default_text(field, about) in option.help or name == "num_memory_tokens"


def test_what_training_alone_depends_on():
    """Fingerprints leave these out: with one more or one less, memories of today would be foreign tomorrow."""
    assert set(TRAINING_SETTINGS) == {
        "bptt_segments", "kept_segments", "offload_side_bits", "memory_dropout", "distillation_weight",
        "compress_weight", "expand_weight", "cycle_weight",
    }  # fmt: skip
    assert [field.name for field in dataclasses.fields(R3MemConfig)][:3] == ["lora_r", "lora_alpha", "lora_dropout"]
