"""Tables of earlier versions, brought to the columns of today when they are read."""

import pandas as pd


def upgraded(sort: str, table: pd.DataFrame) -> pd.DataFrame:
    """The table of the sort (`sensitivity`, `sensitivity_images`, `verify`) as it would be written now; others stay.

    Before tasks other than classification there was no divergence, score or metric: KL and top-1 are the first two.
    """
    if sort == "sensitivity" and {"kl", "kl_se"} <= set(table) and "divergence" not in table:
        missing = float("nan")
        return table.assign(
            source="measured", task="classification", divergence=table["kl"], divergence_se=table["kl_se"],
            score=table.get("top1", missing), delta_score=table.get("delta_top1", missing),
            score_se=table.get("top1_se", missing), metric=missing, delta_metric=missing, metric_se=missing,
        )  # fmt: skip
    if sort == "verify" and "top1" in table and "score" not in table:
        missing = float("nan")
        return table.assign(
            score=table["top1"], score_se=table.get("top1_se", missing), divergence=missing, divergence_se=missing,
            metric=missing, metric_se=missing,
        )  # fmt: skip
    if sort == "sensitivity_images":
        return table.rename(columns={"image_kl": "image_divergence"})
    return table
