"""Quantizers, quantized layers and training terms: tensors in, tensors out.

In a training loop of one's own:

    prepare_qat_           calibrate a plan and quantize the model in place
    parameter_groups       groups for an optimizer: decay, rates of weights and scales
    attach_                keep scales within bounds after each step, count oscillation
    distillation_loss      KL to a teacher's logits
    regularization         oscillation, dampening and kurtosis terms
    oscillation_table      which modules' weights oscillate
    reestimate_batchnorm_  BatchNorm statistics of the quantized network
    restore_float_         undo prepare_qat_
    train_qat              an included loop, for those who have none
    save_packed, load_packed   the trained model as packed integer codes

`Network`, `BitPlan` and `InputError` are what these take and raise. `quant` knows nothing of measurements: those are in
`analysis`, which has these names too.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "BitPlan": "quant.bit_plan",
    "InputError": "quant.errors",
    "Network": "quant.network",
    "attach_": "quant.own_loop",
    "distillation_loss": "quant.distill",
    "load_packed": "quant.packed_file",
    "oscillation_table": "quant.own_loop",
    "parameter_groups": "quant.optimizer",
    "prepare_qat_": "quant.prepare",
    "reestimate_batchnorm_": "quant.batchnorm",
    "regularization": "quant.own_loop",
    "restore_float_": "quant.prepare",
    "save_packed": "quant.packed_file",
    "train_qat": "quant.live_training",
}
"""Where each public name is defined; it is imported when it is first used, so that `import quant` costs nothing."""

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """A public name, imported at its first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'quant' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)


if TYPE_CHECKING:
    from quant.batchnorm import reestimate_batchnorm_ as reestimate_batchnorm_
    from quant.bit_plan import BitPlan as BitPlan
    from quant.distill import distillation_loss as distillation_loss
    from quant.errors import InputError as InputError
    from quant.live_training import train_qat as train_qat
    from quant.network import Network as Network
    from quant.optimizer import parameter_groups as parameter_groups
    from quant.prepare import prepare_qat_ as prepare_qat_
    from quant.prepare import restore_float_ as restore_float_
