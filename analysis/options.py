"""Options of the command line that several commands share, and the types of their values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class ListOf(click.ParamType):
    """A comma-separated list of one type, such as `2,3,4,8`."""

    def __init__(self, kind: type, length: int | None = None) -> None:
        self.kind, self.length = kind, length
        self.name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The values as a tuple."""
        if isinstance(value, tuple):
            return value
        try:
            items = tuple(self.kind(part.strip()) for part in str(value).split(","))
        except ValueError:
            self.fail(
                f"{value!r} is no comma-separated list of {self.kind.__name__} values, such as 2,3,4.", param, ctx
            )
        if self.length is not None and len(items) != self.length:
            self.fail(f"{value!r} has {len(items)} values, expected {self.length}.", param, ctx)
        return items


class JsonObject(click.ParamType):
    """A JSON object."""

    name = "JSON"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The object as a dictionary."""
        if isinstance(value, dict):
            return value
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError) as error:
            self.fail(f"{str(value)[:80]!r} is no JSON: {error}. Write such as '{{\"num_classes\": 10}}'.", param, ctx)
        if not isinstance(parsed, dict):
            self.fail(f"{value!r} is no JSON object; write such as '{{\"num_classes\": 10}}'.", param, ctx)
        return parsed


class CommandWithSettings(click.Command):
    """A command whose help ends with the settings of a training and their defaults."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the settings below the options."""
        from dataclasses import fields

        from quant.config import QATConfig

        defaults = [f"{field.name}={'none' if field.default is None else field.default}" for field in fields(QATConfig)]
        with formatter.section("Settings (--set, --config) with their defaults; quant/config.py explains each"):
            formatter.write_text(", ".join(defaults))


def _stacked(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


quiet_option = click.option("--quiet", is_flag=True, help="No progress bar, no table.")
run_option = click.option(
    "--run",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="The run folder, which keeps model, images and results; it is made where it is not there.",
)
model_options = _stacked(
    click.argument("model", required=False),
    click.option("--pretrained", is_flag=True, help="timm's published weights (needs a network or a cache)."),
    click.option("--weights", type=click.Path(path_type=Path), help="Weights: .safetensors, or .pt without code."),
    click.option("--model-kwargs", type=JsonObject(), help="Arguments of the model's constructor, as JSON."),
    click.option(
        "--include",
        multiple=True,
        metavar="PATTERN",
        help="Only modules whose name matches, * and ? as in a shell; may be repeated.",
    ),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave out modules that match; may be repeated."),
)
image_options = _stacked(
    click.option("--data", help="digits, folder:PATH, csv:FILE, or a timm data set (torch/cifar10, hfds/..., wds/...)"),
    click.option("--images", type=click.IntRange(min=1), help="How many images, balanced over the classes: by default "
                 "2,000 for stats, 256 for sensitivity, all for eval and train; when repeated, as before."),
    click.option("--num-workers", type=click.IntRange(min=0), default=2, show_default=True, help="Decoding processes."),
    click.option("--holdout", type=click.FloatRange(0, 1, max_open=True),
                 help="Share of one-split data that becomes the validation split (0.5); 0: every image serves both."),
    click.option("--class-map", type=click.Path(path_type=Path), help="Lines `class` or `class,index`, where the "
                 "folders are a subset of the head's classes."),
    click.option("--data-root", type=click.Path(path_type=Path), help="Where a timm data set lies."),
    click.option("--mean", type=ListOf(float), help="Normalisation, where the model does not say: 0.49,0.48,0.45."),
    click.option("--std", type=ListOf(float), help="Normalisation, where the model does not say."),
    click.option("--input-size", type=ListOf(int, 3), help="Channels, height, width: 3,32,32."),
    click.option("--crop-pct", type=click.FloatRange(0, 1, min_open=True), help="Centre crop share after resizing."),
    click.option("--skip-broken", is_flag=True, help="Leave out images that cannot be read, and count them."),
)  # fmt: skip
data_options = _stacked(
    image_options,
    click.option("--split", type=click.Choice(["train", "val"]), help="Which images; each command says its default."),
    click.option("--batch-size", type=click.IntRange(1, 2**16), default=64, show_default=True),
)
seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), help="Choice of images, splits, untrained weights (0)."
)
common_options = _stacked(
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, mps."),
    click.option("--overwrite", is_flag=True, help="Start this step anew where the run folder holds other results."),
    quiet_option,
)
