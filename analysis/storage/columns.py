"""The columns of the tables that evaluation, verification and training write, in their order."""

from quant.loss_terms import TERMS

VERIFY_COLUMNS = (
    "plan", "weight_bits", "activation_bits", "size_bytes", "bitops", "loss", "loss_se", "score", "score_se",
    "divergence", "divergence_se", "metric", "metric_se", "top1", "top1_se", "images", "estimator", "batchnorm",
)  # fmt: skip
VERIFICATION_COLUMNS = (
    "plan", "weight_bits", "activation_bits", "size_bytes", "bitops", "predicted_kl", "predicted_kl_pairs",
    "measured_kl", "measured_kl_se", "kl_excess", "kl_excess_se", "heldout_kl", "heldout_kl_se", "prediction_ratio",
    "prediction_ratio_se", "predicted_delta_loss", "measured_delta_loss",
    "measured_delta_loss_se", "top1", "top1_se", "planned_ahead", "planned_ahead_se", "plan_sha256",
)  # fmt: skip
HISTORY_COLUMNS = (
    "step", "epoch", "images", "lr", "split", "loss", *TERMS, *(f"grad_{term}" for term in TERMS), "top1", "seconds",
)  # fmt: skip
OSCILLATION_COLUMNS = ("step", "module", "tensor", "weights", "oscillating", "oscillating_ema")
BINS_COLUMNS = ("step", "module", "tensor", "kind", "position", "weights")
