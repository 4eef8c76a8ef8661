"""Load the network to be measured: a timm name, or a factory in the user's own file."""

import difflib
import importlib.util
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from torch import nn

from analysis.inputs.model_source import ModelSource, check_source, no_function, unknown_name
from analysis.inputs.weights import load_weights_
from quant.errors import InputError, first_line
from quant.network import check_form


def load_model(source: ModelSource, tell: Callable[[str], None] = lambda _: None) -> nn.Module:
    """The model in eval mode on the CPU; the global random state is left as it was.

    `tell` gets a sentence on where in a checkpoint the weights were, if there was anything to choose.
    Raises InputError for a name, a factory, arguments or weights that cannot be used.
    """
    check_source(source)
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.default_generator.manual_seed(source.seed)
        model = _timm_model(source) if source.factory is None else _factory_model(source, *source.factory)
    check_form(model, source.model)
    model = model.cpu()
    if source.weights is not None:
        found = load_weights_(model, Path(source.weights), source.options, source.weights_entry)
        if found:
            tell(f"weights of {source.weights}: {found}")
    return model.eval()


def _timm_model(source: ModelSource) -> nn.Module:
    """A model of timm's; names such as `hf-hub:user/model` go to timm unchecked."""
    architecture, options = source.model.partition(".")[0], source.options
    if ":" not in source.model and not timm.is_model(architecture):
        raise unknown_name(source.model)
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
                f"The pretrained weights of {source.model} could not be downloaded ({type(error).__name__}): no "
                f"network, not in the cache, or unknown. Download them elsewhere and give `{options.weights} "
                "FILE.safetensors`."
            ) from error
        given = f" with `{options.kwargs}` {dict(source.kwargs)}" if source.kwargs else ""
        raise InputError(
            f"{source.model} cannot be built{given}: {type(error).__name__}: {first_line(error)}."
        ) from error


def _factory_model(source: ModelSource, path: Path, function: str) -> nn.Module:
    """What the function of the user's file returns."""
    with users_function(path, function) as factory:
        _check_arguments(factory, source)
        try:
            model = factory(**source.kwargs)
        except (Exception, SystemExit) as error:
            raise InputError(f"{source.model} raised {type(error).__name__}: {first_line(error)}.") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{source.model} must return a torch.nn.Module, got {type(model).__name__}.")
    return model


@contextmanager
def users_function(path: Path, function: str) -> Iterator[Callable[..., Any]]:
    """The function of the user's file, which is executed; within the context it may import the file's neighbours.

    Raises InputError where the file raises, or has no such function.
    """
    with _importable_from(path.resolve().parent):
        module = _executed(path)
        found = getattr(module, function, None) if function else None
        if not callable(found):
            names = [n for n, f in vars(module).items() if _is_factory(f, module) and not n.startswith("_")]
            raise no_function(path, function, names)
        yield found


def _executed(path: Path) -> ModuleType:
    """The user's file as a module, executed each time."""
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
