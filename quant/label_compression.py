"""A teacher's answer in a few bytes: what of the C probabilities is kept, and what the others are taken for.

    hard                 the likeliest class, with probability 1
    smoothing            its probability; the rest spread evenly over the other C - 1
    marginal_smoothing   the K likeliest; the rest spread evenly over the other C - K
    marginal_renorm      the K likeliest, divided by their sum; the others 0
    full                 all

The label compressions of Shen and Xing, ECCV 2022, arXiv:2112.01528.

What is kept is float16, times 2^15: a number from 2^-29 to 1 is then off by at most u = 2^-11 of itself, a smaller one
by at most 2^-40. Where there is a rest, K + 1 numbers make 1, and one of them follows from the others: the rest, or the
probability p_1 of the likeliest class. The smaller of these two is kept, in the first place, the rest with a minus sign
(-0 where there is none). The larger is what the others leave, and is off by what they are off together, at most u times
their sum; being the largest of all it is at least 1 / (K + 1), so this is at most K u of itself. So exact are all but
those below 2^-29, be the teacher sure or not: to 0.24 % at K = 5. (The rest that float16 probabilities leave, of which
one is close to 1, is off by up to 2^-12: a quarter of itself where it is a thousandth.) Where there is no rest each is
divided by the sum of all, which is off by u at most: 2 u.
"""

import torch
from torch import Tensor

from quant.choices import Compression

_UNIT = 2.0**15
"""What is kept is multiplied by it: float16 reaches 2^16, and what is far below 1 is rounded as finely as the rest."""
_WITH_REST = ("smoothing", "marginal_smoothing")


def kept_counts(compression: Compression, top_k: int, classes: int) -> tuple[int, int]:
    """How many numbers and how many class indices are kept of one label."""
    if compression == "full":
        return classes, 0
    if compression in ("hard", "smoothing"):
        return int(compression == "smoothing"), 1
    return top_k, top_k


def compress(
    logits: Tensor, *, compression: Compression, top_k: int = 0, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The kept numbers, float16, and their classes, int64, the likeliest first: (labels, kept) each, on the CPU.

    Logits: (labels, classes), computed in float64. `top_k` is K, of the two marginal compressions alone.
    """
    logits = logits.cpu().double()
    probabilities = (logits / temperature).softmax(dim=1)
    values, count = kept_counts(compression, top_k, logits.shape[1])
    if compression == "full":
        return (_UNIT * probabilities).half(), torch.empty(len(logits), 0, dtype=torch.long)
    indices = logits.topk(count, dim=1).indices  # of logits: where probabilities vanish they still differ
    kept = probabilities.gather(1, indices)
    if compression == "marginal_renorm":
        kept = kept / kept.sum(dim=1, keepdim=True)
    if compression in _WITH_REST:
        rest = probabilities.scatter(1, indices, 0.0).sum(dim=1)  # not 1 - sum of kept, which may be all digits lost
        first = kept[:, 0]
        kept[:, 0] = torch.where(rest > first, first, -rest)
    return (_UNIT * kept[:, :values]).half(), indices


def expand(kept: Tensor, indices: Tensor, *, compression: Compression, classes: int) -> Tensor:
    """The labels as distributions over all classes: (labels, classes) float32, each row with the sum 1."""
    kept = kept.double() / _UNIT
    if compression == "full":
        return (kept / kept.sum(dim=1, keepdim=True)).float()
    if compression == "hard":
        kept = torch.ones(indices.shape)
    rest = torch.zeros(len(kept), 1)
    if compression in _WITH_REST:
        left = (1 - kept.abs().sum(dim=1, keepdim=True)).clamp(min=0)
        first, others = kept[:, :1], kept[:, 1:]
        has_rest = first.signbit()  # of -0 too
        rest = torch.where(has_rest, -first, left) / max(classes - kept.shape[1], 1)
        kept = torch.cat((torch.where(has_rest, left, first), others), dim=1)
    labels = rest.float().repeat(1, classes).scatter(1, indices, kept.float())
    return labels / labels.sum(dim=1, keepdim=True)  # float16 has rounded them
