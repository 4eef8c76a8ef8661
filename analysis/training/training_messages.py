"""What `qvw train` says in the terminal: how much it will do, the results, and how strong each term was."""

import math

import pandas as pd

from quant.bit_plan import BitPlan
from quant.config import QATConfig
from quant.loss_terms import TERMS

FEW_BITS = 3.5  # mean bits below which the default learning rate is low: reports/ablation
WEAK = 1e-3  # share of the strongest gradient below which a term hardly moves a weight


def extent(config: QATConfig, steps: int, images: int, val_images: int) -> str:
    """How many steps of how many images, and what each epoch leaves out."""
    views = f" crops, {config.crops_per_image} an image" if config.crops_per_image > 1 else " images"
    used = images // config.batch_size * config.batch_size
    left = f"; {images - used} of {images:,} images are left out of each epoch, others in each" if used < images else ""
    return f"{steps:,} steps of {config.batch_size}{views}, validated on {val_images:,} images{left}"


def low_rate(plan: BitPlan | None, config: QATConfig) -> str:
    """What to try where bits are few and the learning rate is the default, which suits 4 bits and more; or nothing."""
    means = () if plan is None else (plan.totals.weight_bits, plan.totals.activation_bits)
    fewest = min((bits for bits in means if bits is not None), default=math.inf)
    if fewest >= FEW_BITS or config.learning_rate != QATConfig().learning_rate:
        return ""
    return (
        f"{fewest:.2g} bits on average: learning_rate={config.learning_rate:g}, the default, is low for so few. Try "
        "--set learning_rate=0.001, or 0.002 on a CNN (docs/training.md)."
    )


def outcome(history: pd.DataFrame, *, loss_se: float, top1_se: float) -> tuple[str, bool]:
    """The first and the last validation in words, and whether the loss rose by more than two standard errors.

    The errors are those of the last validation; both are of the same images, so the difference has less.
    """
    validated = history[history["split"] == "val"]
    first, last = validated.iloc[0], validated.iloc[-1]
    words = (
        f"{last['step']:,} steps took top-1 from {100 * first['top1']:.2f} to {100 * last['top1']:.2f} % "
        f"(± {100 * top1_se:.2f}) and the loss from {first['loss']:.4g} to {last['loss']:.4g} (± {loss_se:.2g}), one "
        "standard error each"
    )
    return words, bool(last["loss"] - first["loss"] > 2 * loss_se)


def strengths(history: pd.DataFrame) -> str:
    """The gradient norm of each term over that of the strongest, mean over the steps at which they were measured."""
    names = [term for term in TERMS if history[f"grad_{term}"].notna().any()]
    norms = {term: float(history[f"grad_{term}"].mean()) for term in names}
    largest = max(norms.values(), default=0.0)
    if len(norms) < 2 or not largest > 0:
        return ""
    weak = [term for term in names if norms[term] < WEAK * largest]
    told = f"; {', '.join(weak)} hardly moved a weight" if weak else ""
    return f"pull of each term: {', '.join(f'{term} {norm / largest:.2g}' for term, norm in norms.items())}{told}"
