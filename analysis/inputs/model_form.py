"""What a user's factory may not return: modules whose layers cannot be seen or have no size yet."""

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from quant.errors import InputError


def check_form(model: nn.Module, name: str) -> None:
    """Raise InputError for a compiled or scripted module, and for lazy layers that have seen no image."""
    for where, module in model.named_modules():
        what = f"{where} of {name}" if where else name
        # torch.compile returns a wrapper of the module, and Module.compile notes its compiled call.
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise InputError(
                f"{what} is compiled by torch.compile: its layers cannot be reached. Return the plain module; "
                "`qvw train --set compile=true` compiles what it trains."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(f"{what} is a TorchScript module: its layers cannot be reached. Return the plain module.")
        for tensor, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if is_lazy(value):
                raise InputError(
                    f"{what} has a {tensor} without a size: a lazy layer ({type(module).__name__}) that has seen no "
                    "image. Let the factory call the model on one before it returns it."
                )
