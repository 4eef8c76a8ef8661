"""One training step on a copy, before anything is written: whether network, loss and optimizer go together."""

import copy

import torch
from torch import Tensor, nn

from quant.config import QATConfig
from quant.errors import InputError, first_line
from quant.loss_terms import image_terms
from quant.optimizer import make_optimizer


def check_trainable(model: nn.Module, config: QATConfig, images: Tensor) -> None:
    """Raise InputError where a copy of the model cannot take one step on `images` (2, channels, height, width).

    Networks that return no logits, are frozen, or change tensors that their gradients need; optimizers that need what
    this machine lacks; a loss without terms.
    """
    if not (config.task_weight or config.kd_weight):
        raise InputError("`task_weight` and `kd_weight` are both 0: nothing is learned from the images. Raise one.")
    before = torch.get_rng_state()
    try:
        trial = copy.deepcopy(model).train()
        logits = trial(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(f"in training mode the model returned {what}; expected logits of shape (images, classes).")
        labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
        optimizer, _ = make_optimizer(trial, config, 2)
        terms = image_terms(logits.float(), labels, logits.detach().float(), config)
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
    except InputError:
        raise
    except Exception as error:  # the model and the optimizer are the user's choice: whatever they raise is told
        raise InputError(
            f"{type(model).__name__} cannot be trained with {config.optimizer}: one step on a copy raised "
            f"{type(error).__name__}: {first_line(error)}. Change the model, or `optimizer`."
        ) from error
    finally:
        torch.set_rng_state(before)
