"""Modules that become dynamic subclasses of their own class, in a way that copies and pickles survive."""

import copyreg
from functools import cache
from typing import Any

from torch import nn


class Mixed(nn.Module):
    """What is mixed into a module's class by `mix_in_`; a subclass says what it adds, and names the new class.

    A class that exists in memory only cannot be found by its name: what is pickled are the mixin and the original
    class, from which the new one is made again.
    """

    prefix: str

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        rebuild, arguments, *state = reduced
        if rebuild is copyreg.__newobj__:  # type: ignore[attr-defined]  # missing in the stubs
            mixin, original = type(self).__bases__
            return _new, (mixin, original, *arguments[1:]), *state
        return (rebuild, arguments, *state)


def mix_in_(module: nn.Module, mixin: Any) -> None:
    """Let the module be of a subclass of its own class, with `mixin` before it, until `take_out_`."""
    changed: Any = module
    original: Any = type(module)
    changed.__class__ = _mixed_class(mixin, original)


def take_out_(module: nn.Module) -> None:
    """Undo the last `mix_in_`: the module is of its original class again."""
    changed: Any = module
    changed.__class__ = original_class(module)


def original_class(module: nn.Module) -> Any:
    """The class that a module had before the last `mix_in_`; its own where there was none."""
    return type(module).__bases__[1] if isinstance(module, Mixed) else type(module)


@cache
def _mixed_class(mixin: Any, original: Any) -> Any:
    return type(f"{mixin.prefix}{original.__name__}", (mixin, original), {"__module__": original.__module__})


def _new(mixin: Any, original: Any, *arguments: Any) -> Any:
    """An empty module of the mixed class, for copy and pickle to fill."""
    mixed = _mixed_class(mixin, original)
    return mixed.__new__(mixed, *arguments)
