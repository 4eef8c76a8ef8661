"""Load the network to be measured: a timm name, or a factory in the user's own file."""

import difflib
import importlib.util
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from torch import nn

from analysis.inputs.option_names import MODEL_OPTIONS, OptionNames
from analysis.inputs.weights import load_weights_
from quant.errors import InputError, first_line
from quant.network import check_form


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model comes from, as the user typed it."""

    model: str  # a timm name, or path/to/file.py:factory
    pretrained: bool = False
    weights: str | None = None  # a .safetensors, .pt, .pth or .bin file
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # arguments of the constructor, from JSON
    seed: int = 0  # an untrained model's weights depend on it
    options: OptionNames = MODEL_OPTIONS

    @property
    def untrained(self) -> bool:
        """Whether the weights are drawn at random: a timm name without weights; a factory may bring its own."""
        return self.factory is None and not self.pretrained and self.weights is None

    @property
    def factory(self) -> tuple[Path, str] | None:
        """The file and the function of a user's factory; None for a timm name."""
        file, _, function = self.model.rpartition(":")
        if file.endswith(".py"):
            return Path(file), function
        return (Path(self.model), "") if self.model.endswith(".py") else None


def load_model(source: ModelSource) -> nn.Module:
    """The model in eval mode on the CPU; the global random state is left as it was.

    Raises InputError for a name, a factory, arguments or weights that cannot be used.
    """
    if source.pretrained and source.weights is not None:
        raise InputError(
            f"`{source.options.pretrained}` and `{source.options.weights}` were both given. Choose one of them."
        )
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.default_generator.manual_seed(source.seed)
        model = _timm_model(source) if source.factory is None else _factory_model(source, *source.factory)
    check_form(model, source.model)
    model = model.cpu()
    if source.weights is not None:
        load_weights_(model, Path(source.weights), source.options)
    return model.eval()


def model_names(pattern: str | None = None) -> list[str]:
    """The timm names that match `pattern`, where * and ? are wildcards; without them it matches as a substring."""
    if pattern and not set("*?[") & set(pattern):
        pattern = f"*{pattern}*"
    return timm.list_models(pattern or "")


def near_names(name: str) -> list[str]:
    """The timm names most like a misspelt one, three at most: those that begin with it, else the most similar."""
    names = timm.list_models()
    begin = sorted((known for known in names if known.startswith(name)), key=len)
    return begin[:3] or difflib.get_close_matches(name, names, n=3)


def num_classes(model: nn.Module) -> int | None:
    """The number of classes of the model's head; None where it does not say or has no head."""
    count = getattr(model, "num_classes", None)
    return count if isinstance(count, int) and count > 0 else None


def _timm_model(source: ModelSource) -> nn.Module:
    """A model of timm's; names such as `hf-hub:user/model` go to timm unchecked."""
    architecture, options = source.model.partition(".")[0], source.options
    if ":" not in source.model and not timm.is_model(architecture):
        near = near_names(architecture)
        hint = f"The nearest: {', '.join(near)}" if near else "`qvw models` lists them"
        raise InputError(
            f"timm has no model {source.model!r}. {hint}. A model of your own is written path/to/file.py:factory."
        )
    try:
        return timm.create_model(source.model, pretrained=source.pretrained, **source.kwargs)
    except TypeError as error:
        raise InputError(f"{source.model} refuses `{options.kwargs}`: {first_line(error)}.") from error
    except Exception as error:
        if "Invalid pretrained tag" in str(error):
            near = difflib.get_close_matches(source.model, timm.list_pretrained(f"{architecture}.*"), n=3, cutoff=0.0)
            raise InputError(f"timm has no weights {source.model!r}. The nearest: {', '.join(near)}.") from error
        if source.pretrained or ":" in source.model:
            raise InputError(
                f"The pretrained weights of {source.model} could not be had: no network and not in the cache, or "
                f"unknown ({type(error).__name__}). Fetch them elsewhere and give `{options.weights} FILE.safetensors`."
            ) from error
        given = f" with `{options.kwargs}` {dict(source.kwargs)}" if source.kwargs else ""
        raise InputError(
            f"{source.model} cannot be built{given}: {type(error).__name__}: {first_line(error)}."
        ) from error


def _factory_model(source: ModelSource, path: Path, function: str) -> nn.Module:
    """What the function of the user's file returns."""
    if source.pretrained:
        raise InputError(
            f"`{source.options.pretrained}` needs a timm name, got {source.model}. Use `{source.options.weights} "
            "FILE.safetensors`."
        )
    if not path.is_file():
        raise InputError(f"There is no file {path} (from the model {source.model!r}). Check the path.")
    with _importable_from(path.resolve().parent):
        module = _executed(path)
        factory = getattr(module, function, None) if function else None
        if not callable(factory):
            names = [n for n, f in vars(module).items() if _is_factory(f, module) and not n.startswith("_")]
            raise InputError(f"{path} has no function {function!r}. It has: {', '.join(names) or 'none'}.")
        _check_arguments(factory, source)
        try:
            model = factory(**source.kwargs)
        except (Exception, SystemExit) as error:
            raise InputError(f"{source.model} raised {type(error).__name__}: {first_line(error)}.") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{source.model} must return a torch.nn.Module, got {type(model).__name__}.")
    return model


def _executed(path: Path) -> ModuleType:
    """The user's file as a module, executed anew."""
    name = f"qvw_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"{path} raised {type(error).__name__}: {first_line(error)}.") from error
    return module


def _is_factory(value: object, module: ModuleType) -> bool:
    """Whether the user's file defines this function or class itself."""
    return (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == module.__name__


def _check_arguments(factory: Callable[..., object], source: ModelSource) -> None:
    """Raise InputError where the arguments do not fit the function's signature."""
    try:
        inspect.signature(factory).bind(**source.kwargs)
    except TypeError as error:
        raise InputError(f"{source.model} refuses `{source.options.kwargs}`: {first_line(error)}.") from error
    except ValueError:
        return  # a callable of C that has no signature


@contextmanager
def _importable_from(folder: Path) -> Iterator[None]:
    """Let the user's file import its neighbours, and change the working directory if it must."""
    sys.path.insert(0, str(folder))
    working = Path.cwd()
    try:
        yield
    finally:
        os.chdir(working)  # relative paths of the command stay what they were
        sys.path.remove(str(folder))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the remarks of timm and the hub from the user's screen: what matters comes as an exception."""
    loggers = [logging.getLogger(name) for name in ("timm", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
