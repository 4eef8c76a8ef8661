"""What `qvw plan --verify` says in the terminal."""

import textwrap
from collections.abc import Sequence
from statistics import mode

import pandas as pd

from analysis.planning.budget_kinds import amount
from analysis.planning.significance import listed, plan_names, prediction_bias, verdict
from analysis.terminal.console import as_text
from quant.bit_plan import BitPlan


def verification_words(table: pd.DataFrame, plan: BitPlan, others: Sequence[BitPlan]) -> str:
    """The table of a verification, the verdicts, and what the uniform plan is; `others` are the plans beside `plan`."""
    shown = pd.DataFrame(
        {
            "plan": plan_names(table),
            "weight_bits": table["weight_bits"].round(3),
            "activation_bits": table["activation_bits"].round(3),
            "top1_percent": (100 * table["top1"]).round(2),
            "se": (100 * table["top1_se"]).round(2),
            "planned_ahead": (100 * table["planned_ahead"]).round(2),
            "ahead_se": (100 * table["planned_ahead_se"]).round(2),
            "predicted_kl": table["predicted_kl"],
            "with_pairs": table["predicted_kl_pairs"],
            "measured_kl": table["measured_kl"],
            "kl_excess": table["kl_excess"],
            "excess_se": table["kl_excess_se"],
        }
    )
    shown = shown.dropna(axis=1, how="all")  # no labels, or no interactions
    beside = table.assign(name=plan_names(table)).iloc[1:]
    accuracy, what = table["top1"].notna().any(), "KL"
    if not accuracy:  # no labels, or another task than classification
        what = "divergence"
        shown = shown.rename(columns=lambda name: name.replace("kl", what))
    told = (verdict(figure, beside, column) for figure, column in (("accuracy", "planned_ahead"), (what, "kl_excess")))
    before = "Accuracy on validation images without training (points; the difference is paired over images), and the "
    return "\n".join(
        [
            *textwrap.wrap(
                f"{before if accuracy else 'The '}{what} on the images of the sweep: predicted as a sum over sites, "
                "measured of the whole plan, and its excess over that of the plan (paired too).",
                104,
            ),
            as_text(shown),
            *filter(None, told),
            *textwrap.wrap(prediction_bias(table, what), 104),
            *_uniform_words(plan, others),
        ]
    )


def _uniform_words(plan: BitPlan, others: Sequence[BitPlan]) -> list[str]:
    """What the uniform plan is, and how much of each budget it takes: it cannot take what lies between two widths."""
    uniform = next((other for other in others if other.solver.name == "uniform"), None)
    if uniform is None:
        return ["No uniform bits are within the budget."]
    shares = [
        f"{100 * getattr(uniform.totals, name) / limit:.0f} % of the budget of {amount(name, limit)}"
        for name, limit in plan.budget.as_dict().items()
    ]
    return [f"uniform is {_widths(uniform)} and takes {listed(shares)}."]


def _widths(plan: BitPlan) -> str:
    """Uniform bits as `w3a4`: the bits that most weights and most activations have."""
    sorts = (("w", [s.bit_width for s in plan.sites if s.site.is_weight]),
             ("a", [s.bit_width for s in plan.sites if not s.site.is_weight]))  # fmt: skip
    return "".join(f"{letter}{mode(bits)}" for letter, bits in sorts if bits)
