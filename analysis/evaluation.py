"""Logits of a model over a fixed list of batches, and figures that compare two sets of logits image by image."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.errors import InputError


def logits_of(model: Callable[[Tensor], Any], batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits (images, classes), float32 on the CPU, and labels of the batches of (images, labels).

    `model` is the network, or what runs it in another way.
    """
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    seen = 0
    with torch.inference_mode():
        for images, batch_labels in batches:
            rows.append(batch_logits(model, images, batch_labels, seen=seen))
            labels.append(batch_labels)
            seen += len(batch_labels)
    return torch.cat(rows), torch.cat(labels)


def batch_logits(model: Callable[[Tensor], Any], images: Tensor, labels: Tensor, *, seen: int) -> Tensor:
    """Logits (images, classes) of one batch, float32 on the CPU; InputError where they are none, or not finite.

    `seen` images came before the batch, for the message. To be called in inference mode.
    """
    output = model(images)
    if not isinstance(output, Tensor) or output.ndim != 2:
        what = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"the model returned {what}; expected logits of shape (images, classes).")
    if not torch.isfinite(output).all():
        image = seen + int((~torch.isfinite(output)).any(dim=1).nonzero()[0])
        raise InputError(f"the logits of image {image} hold NaN or Inf. `qvw stats` says where they arise.")
    if len(output) != len(labels):
        raise InputError(f"the model returned {len(output)} rows for {len(labels)} images.")
    return output.float().cpu()


class Scores(NamedTuple):
    """Figures of single images: (images,) float64 each; loss and hit are NaN where there is no label."""

    loss: Tensor
    hit: Tensor


def scores(logits: Tensor, labels: Tensor) -> Scores:
    """Cross-entropy in nats and top-1 hit (0 or 1) of each image; `labels` are -1 where unknown."""
    known = labels >= 0
    safe = labels.clamp(min=0)
    if known.any() and int(safe.max()) >= logits.shape[1]:
        raise InputError(f"label {int(safe.max())} is beyond the model's {logits.shape[1]} classes.")
    loss = F.cross_entropy(logits.double(), safe, reduction="none")
    hit = (logits.argmax(dim=1) == safe).double()
    unknown = torch.full_like(loss, float("nan"))
    return Scores(torch.where(known, loss, unknown), torch.where(known, hit, unknown))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error over images (sample standard deviation over sqrt(n)); NaN error for one image."""
    error = values.std(correction=1).item() / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return values.mean().item(), error


class ImageDifferences(NamedTuple):
    """Of single images: KL of the logits and growth of the loss, (images,) float64 each; the loss NaN without label."""

    kl: Tensor
    delta_loss: Tensor


def compare_logits(logits: Tensor, reference: Tensor, labels: Tensor) -> tuple[dict[str, Any], ImageDifferences]:
    """What changed against the reference logits, with standard errors of the paired differences of the images.

    `delta_loss` and `delta_top1` keep their sign; `top1_se` is the error of `delta_top1`. `kl` is
    KL(reference || logits) in nats, mean over images; `logit_nmse` the squared error over the reference's power.
    """
    now, before = scores(logits, labels), scores(reference, labels)
    delta_loss, delta_loss_se = mean_and_error(now.loss - before.loss)
    delta_top1, top1_se = mean_and_error(now.hit - before.hit)
    log_p, log_q = reference.double().log_softmax(dim=1), logits.double().log_softmax(dim=1)
    image_kl = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    kl, kl_se = mean_and_error(image_kl)
    error = (logits.double() - reference.double()).square().sum()
    return {
        "images": len(labels), "loss": now.loss.mean().item(), "delta_loss": delta_loss,
        "delta_loss_se": delta_loss_se, "top1": now.hit.mean().item(), "delta_top1": delta_top1, "top1_se": top1_se,
        "kl": kl, "kl_se": kl_se, "logit_nmse": (error / reference.double().square().sum()).item(),
    }, ImageDifferences(kl=image_kl, delta_loss=now.loss - before.loss)  # fmt: skip
