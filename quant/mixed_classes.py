"""Modules that become dynamic subclasses of their own class, in a way that copies and pickles survive."""

import copyreg
from functools import cache, reduce
from typing import Any

from torch import nn


class Mixed(nn.Module):
    """What is mixed into a module's class by `mix_in_`; a subclass says what it adds, and names the new class.

    A class that exists in memory only cannot be found by its name: what is pickled are the mixins and the original
    class, from which the new one is made again.
    """

    prefix: str

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        rebuild, arguments, *state = reduced
        if rebuild is copyreg.__newobj__:  # type: ignore[attr-defined]  # missing in the stubs
            return _new, (*_parts(type(self)), *arguments[1:]), *state
        return reduced


def mix_in_(module: nn.Module, mixin: Any) -> None:
    """Let the module be of a subclass of its own class, with `mixin` before it, until `take_out_`."""
    changed: Any = module
    original: Any = type(module)
    changed.__class__ = _mixed_class(mixin, original)


def take_out_(module: nn.Module, mixin: Any) -> None:
    """Undo a `mix_in_` of the mixin, whatever was mixed in since."""
    changed: Any = module
    changed.__class__ = class_without(module, mixin)


def class_without(module: nn.Module, mixin: Any) -> Any:
    """The class that the module would have without the mixin; its own where it has none."""
    mixins, original = _parts(type(module))
    if mixin not in mixins:
        return type(module)
    return _mixed((*(m for m in mixins if m is not mixin),), original)


def _parts(mixed: Any) -> tuple[tuple[Any, ...], Any]:
    """The mixins of a class, the last mixed in first, and the original class."""
    mixins = []
    while issubclass(mixed, Mixed):
        mixin, mixed = mixed.__bases__
        mixins.append(mixin)
    return tuple(mixins), mixed


def _mixed(mixins: tuple[Any, ...], original: Any) -> Any:
    return reduce(lambda inner, mixin: _mixed_class(mixin, inner), reversed(mixins), original)


@cache
def _mixed_class(mixin: Any, original: Any) -> Any:
    return type(f"{mixin.prefix}{original.__name__}", (mixin, original), {"__module__": original.__module__})


def _new(mixins: tuple[Any, ...], original: Any, *arguments: Any) -> Any:
    """An empty module of the mixed class, for copy and pickle to fill."""
    mixed = _mixed(mixins, original)
    return mixed.__new__(mixed, *arguments)
