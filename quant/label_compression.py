"""A teacher's answer in a few bytes: what of the C probabilities is kept, and what the others are taken for.

    hard                 the likeliest class, with probability 1
    smoothing            its probability; the rest spread evenly over the other C - 1
    marginal_smoothing   the K likeliest; the rest spread evenly over the other C - K
    marginal_renorm      the K likeliest, divided by their sum; the others 0
    full                 all

The label compressions of Shen and Xing, ECCV 2022, arXiv:2112.01528.
"""

import torch
from torch import Tensor

from quant.choices import Compression


def kept_counts(compression: Compression, top_k: int, classes: int) -> tuple[int, int]:
    """How many probabilities and how many class indices are kept of one label."""
    if compression == "full":
        return classes, 0
    if compression in ("hard", "smoothing"):
        return int(compression == "smoothing"), 1
    return top_k, top_k


def compress(
    logits: Tensor, *, compression: Compression, top_k: int = 0, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The kept probabilities, float16, and their classes, int64, the likeliest first: (labels, kept) each.

    Logits: (labels, classes), computed in float32. `top_k` is K, of the two marginal compressions alone.
    """
    logits = logits.float()
    probabilities = (logits / temperature).softmax(dim=1)
    values, count = kept_counts(compression, top_k, logits.shape[1])
    if compression == "full":
        return probabilities.half(), torch.empty(len(logits), 0, dtype=torch.long, device=logits.device)
    indices = logits.topk(count, dim=1).indices  # of logits: where probabilities vanish in float32 they still differ
    kept = probabilities.gather(1, indices)
    if compression == "marginal_renorm":
        kept = kept / kept.sum(dim=1, keepdim=True)
    return kept[:, :values].half(), indices


def expand(probabilities: Tensor, indices: Tensor, *, compression: Compression, classes: int) -> Tensor:
    """The labels as distributions over all classes: (labels, classes) float32, each row with the sum 1."""
    kept = probabilities.float()
    if compression == "full":
        return kept / kept.sum(dim=1, keepdim=True)
    if compression == "hard":
        kept = torch.ones(indices.shape, device=indices.device)
    rest = torch.zeros(len(kept), 1, device=kept.device)
    if compression in ("smoothing", "marginal_smoothing"):
        rest = (1 - kept.sum(dim=1, keepdim=True)).clamp(min=0) / max(classes - kept.shape[1], 1)
    labels = rest.repeat(1, classes).scatter(1, indices, kept)
    return labels / labels.sum(dim=1, keepdim=True)  # float16 has rounded them
