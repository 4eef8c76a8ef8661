"""The columns of the tables that evaluation and training write, in their order."""

from quant.loss_terms import TERMS

VERIFY_COLUMNS = (
    "plan", "weight_bits", "activation_bits", "size_bytes", "bitops", "loss", "loss_se", "top1", "top1_se", "images",
    "estimator", "batchnorm",
)  # fmt: skip
HISTORY_COLUMNS = (
    "step", "epoch", "images", "lr", "split", "loss", *TERMS, *(f"grad_{term}" for term in TERMS), "top1", "seconds",
)  # fmt: skip
OSCILLATION_COLUMNS = ("step", "module", "tensor", "weights", "oscillating", "oscillating_ema")
BINS_COLUMNS = ("step", "module", "tensor", "kind", "position", "weights")
