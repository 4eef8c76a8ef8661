"""What can be typed for an option: bit-widths as lists and ranges, sizes with units."""

import click
import pytest

from analysis.commands.plan_command import plan
from analysis.commands.sensitivity_command import sensitivity
from analysis.commands.shared_options import BitWidths, Bytes
from analysis.planning.plan_request import parse_kind
from analysis.planning.uniform import parse_widths
from quant.choices import ALLOWED_BIT_WIDTHS
from quant.errors import InputError


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2,3,4,8", [2, 3, 4, 8]), ("2-8", [2, 3, 4, 5, 6, 7, 8]), ("2-4,8", [2, 3, 4, 8]), ("8,2", [2, 8]),
     ("4", [4]), ("3-3", [3]), ("2-4,3-5", [2, 3, 4, 5]), (" 2 , 4 - 5 ", [2, 4, 5]),
     ("1-16", list(ALLOWED_BIT_WIDTHS)), ("8-16", [8, 16])],
)  # fmt: skip
def test_lists_and_ranges_of_bit_widths(text, expected):
    """A range holds the allowed widths between its ends, both included; the result rises and has each once."""
    assert list(parse_widths(text)) == expected
    assert parse_kind(f"mlp.*={text}") == ("mlp.*", expected)


@pytest.mark.parametrize(
    "text", ["", "two", "2,", "-4", "2-", "0-4", "2-9", "12", "8-2", "2..8", "2.5", "2-4-8", "1-99"]
)
def test_other_texts_are_refused(text):
    """Nothing is guessed from a text that is not a list or range of allowed bit-widths."""
    with pytest.raises(click.BadParameter):
        BitWidths().convert(text, None, None)
    with pytest.raises(InputError, match="candidates"):
        parse_kind(f"mlp.*={text}")


@pytest.mark.parametrize(("command", "name"), [(sensitivity, "bits"), (plan, "candidates")])
def test_both_options_take_a_range(command, name):
    """`--bits 2-4,8` of sensitivity and `--candidates 2-4,8` of plan arrive as the widths."""
    option = next(each for each in command.params if each.name == name)
    assert option.type_cast_value(click.Context(command), "2-4,8") == (2, 3, 4, 8)


def test_lists_that_are_written_out_are_those_of_the_modules():
    """Names that the command line checks without importing torch are the names that the modules define."""
    import timm

    import analysis.tasks
    from analysis import tasks
    from analysis.inputs.timm_names import model_names
    from analysis.planning.objectives import MEASURED
    from analysis.planning.plan_request import OBJECTIVES
    from quant.choices import PROXIES, TASKS

    assert (*MEASURED, *PROXIES) == OBJECTIVES
    assert all(callable(getattr(analysis.tasks, name)) for name in TASKS)
    assert all(callable(getattr(tasks, name)) for name in TASKS)
    assert model_names() == timm.list_models()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("50KB", 50_000), ("50kb", 50_000), ("1.5MiB", 1_572_864), ("50000", 50_000), ("1 GiB", 2**30), (".5MB", 500_000),
     ("1B", 1), ("0.1KiB", 102), (4096, 4096)],
)  # fmt: skip
def test_sizes(text, expected):
    """With units of 1,000 or 1,024, or plain bytes; parts of a byte are dropped."""
    assert Bytes().convert(text, None, None) == expected


@pytest.mark.parametrize("text", ["", "KB", "0", "-5KB", "nan", "inf", "5 apples", "1e3", "5K", "1TB", "0.5", "9" * 30])
def test_what_is_no_size_is_refused(text):
    """No unit is guessed."""
    with pytest.raises(click.BadParameter):
        Bytes().convert(text, None, None)
