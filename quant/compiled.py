"""Formulas through torch.compile: each is compiled once, in one canonical form, whatever the plan.

Only functions are compiled, never modules: the keys of a compiled module's state dict are others.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

_STATES = {"GLOBAL_STATE", "TORCH_FUNCTION_STATE", "GRAD_MODE", "AUTOGRAD_SAVED_TENSORS_HOOKS"}


@cache
def compiled_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled for tensors of any size at its first call, which takes seconds.

    It must depend on its arguments alone, tensors without gradient. A size of 1 is compiled apart from larger ones, and
    so is another dtype or device; more forms than torch's recompile limit (8) raise an error, where without
    `fullgraph` they would run uncompiled without a word.
    """
    return torch.compile(function, dynamic=True, fullgraph=True, options={"guard_filter_fn": _of_arguments})


def _of_arguments(guards: Sequence[Any]) -> list[bool]:
    """Which guards to keep: those of the arguments, none of the state around the call.

    Attention's inputs are quantized under one torch function mode more than others: the mode changes nothing in a
    function of plain tensors, but would have it compiled again.
    """
    return [guard.guard_type not in _STATES for guard in guards]
