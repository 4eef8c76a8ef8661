"""How a plan compares with the others of its verification, in words: for the terminal and for the page."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

NAMES = {  # of the column `plan`
    "planned": "planned",
    "additive": "sum alone",
    "uniform": "uniform",
    "greedy": "greedy",
    "reverse": "worst-first",
    "random": "random",
}
ONLY_COMPARED = ("additive", "greedy", "reverse", "random")  # plans of a verification that nobody would deploy


def only_compared(plan: str) -> bool:
    """Whether a row of verify.parquet is of such a plan; several are numbered, `random-2`."""
    return plan.partition("-")[0] in ONLY_COMPARED


ERRORS = 2  # standard errors within which two plans are told as equal
WORDS = {"worse": "worse than", "not significantly different": "within two standard errors of", "better": "better than"}


def plan_names(table: pd.DataFrame) -> list[str]:
    """What a reader calls each row; several plans of one sort are numbered."""
    words = table["plan"].map(lambda kind: NAMES.get(kind, kind))
    many = words.map(words.value_counts()) > 1
    return [f"{word} {i + 1}" if of_many else word
            for word, i, of_many in zip(words, words.groupby(words).cumcount(), many, strict=True)]  # fmt: skip


def reading(ahead: float, error: float) -> str:
    """How the plan compares with one that it is `ahead` of: a key of `WORDS`; empty without an error."""
    if not np.isfinite([ahead, error]).all():
        return ""
    return "not significantly different" if abs(ahead) <= ERRORS * error else "better" if ahead > 0 else "worse"


def verdict(what: str, others: pd.DataFrame, difference: str) -> str:
    """The plans that the plan is worse than, close to and better than, in a sentence; empty where none was measured.

    `others` has `name`, `difference` and its standard error, `difference`_se, positive where the plan is the better.
    """
    told: dict[str, list[str]] = {"worse": [], "not significantly different": [], "better": []}
    for row in others.to_dict("records"):
        found = reading(row[difference], row[f"{difference}_se"])
        if found:
            told[found].append(row["name"])
    parts = [f"{WORDS[kind]} {listed(names)}" for kind, names in told.items() if names]
    return f"By {what} the plan is {'; '.join(parts)}." if parts else ""


def listed(words: Sequence[str]) -> str:
    """Words as `a, b and c`."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def prediction_bias(table: pd.DataFrame, what: str = "KL") -> str:
    """How far held-out images are from the prediction, of the plan and of all plans; empty without such images."""
    if "prediction_ratio" not in table:  # of an earlier version
        return ""
    ratios = table["prediction_ratio"].dropna()
    first = table.iloc[0]
    if ratios.empty or pd.isna(first["prediction_ratio"]):
        return ""
    pairs = first.get("predicted_kl_pairs", np.nan)
    predicted = first["predicted_kl"] if pd.isna(pairs) else pairs
    others = ""
    if len(ratios) > 1:
        low, middle, high = ratios.min(), ratios.median(), ratios.max()
        others = f"; of all {len(ratios)} plans {low:.2f} to {high:.2f} times, median {middle:.2f}"
    return (
        f"Prediction: the plan's {what} is predicted as {predicted:.4g}; on images that the sweep has not seen it is "
        f"{first['heldout_kl']:.4g} (± {first['heldout_kl_se']:.2g}), {first['prediction_ratio']:.2f} "
        f"(± {first['prediction_ratio_se']:.2f}) times that{others}."
    )
