"""`qvw plan --verify`: the plan beside others at the same budget, calibrated, not trained, on validation images."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import pandas as pd
from torch import Tensor

from analysis import accounting
from analysis.baselines import greedy, largest_uniform, lowered, random_choice, worst_first
from analysis.calibration import calibrated
from analysis.console import as_text
from analysis.eval_step import keep_row, running_quantized, verify_row
from analysis.evaluation import compare_logits, logits_of, mean_and_error, scores
from analysis.open_run import open_run
from analysis.opened import Opened
from analysis.setup import Setup
from quant.batchnorm import batchnorm_reestimated, batchnorms
from quant.bit_plan import BitPlan, PlannedSite, PlanSolver
from quant.site import Site

RANDOM_PLANS = 3
CALIBRATION_IMAGES = 256
VERIFICATION_COLUMNS = (
    "plan", "weight_bits", "activation_bits", "size_bytes", "bitops", "predicted_kl", "measured_kl", "measured_kl_se",
    "predicted_delta_loss", "measured_delta_loss", "measured_delta_loss_se", "top1", "top1_se", "planned_ahead",
    "planned_ahead_se", "plan_sha256",
)  # fmt: skip


def other_plans(
    plan: BitPlan,
    options: pd.DataFrame,
    cost: pd.DataFrame,
    *,
    parameters: int,
    ties: Sequence[Sequence[Site]],
    latency: pd.DataFrame | None = None,
) -> list[BitPlan]:
    """Plans to compare with, from the same options: uniform, greedy, worst-first and random ones within the budget.

    The uniform one is the largest that fits, and may cost less than the budget; where none fits it is left out.
    """
    found: list[tuple[str, Sequence[PlannedSite] | None]] = [
        ("uniform", largest_uniform(options, cost, budget=plan.budget, parameters=parameters, latency=latency))
    ]
    ways = [("greedy", greedy), ("reverse", worst_first), *(("random", random_choice(i)) for i in range(RANDOM_PLANS))]
    for name, choose in ways:
        sites = lowered(options, cost, choose, budget=plan.budget, parameters=parameters, ties=ties, latency=latency)
        found.append((name, sites))
    return [
        replace(
            plan, sites=tuple(sites), totals=accounting.totals(sites, cost, parameters, latency),
            predicted_delta_loss=None, solver=PlanSolver(name=name, status="given"),
        )
        for name, sites in found if sites is not None
    ]  # fmt: skip


def run_verify(setup: Setup, plan: BitPlan, others: Sequence[BitPlan], measured: pd.DataFrame) -> str:
    """Measure each plan, add its row to verify.parquet and to verification.parquet; returns the comparison in words.

    `measured` are the rows of sensitivity.parquet whose sums are the predictions. Predictions are compared on the
    images of the sweep, accuracy is that of the validation split.
    """
    opened = open_run(setup, needs_data=True)
    data = opened.images("val" if setup.split is None else setup.split, setup.images)
    swept = opened.run.record.steps["sensitivity"].inputs
    sweep_images = opened.images(str(swept["split"]), int(swept["images"]))
    reference_batches = list(opened.stream(sweep_images, "images of the sweep"))
    batches = list(opened.stream(data, "validation"))
    rows, hits = [], []
    options = {"plans": [other.solver.name for other in others], "calibration_images": CALIBRATION_IMAGES}
    with opened.step("verify", data, ("verification.parquet",), options, {"plan": plan.to_json()}):
        clean: Tensor | None = None
        logits, labels = logits_of(opened.model, batches)
        keep_row(opened, verify_row("float", opened, (), logits, labels), tell=False)
        for kind, each in (("planned", plan), *((other.solver.name, other) for other in others)):
            made = calibrated(opened, each, layout=each.layout, calibration_images=CALIBRATION_IMAGES, estimator="mse")
            if clean is None:
                clean = _reference(opened, made.images, reference_batches)
            with running_quantized(opened, made, "re-estimate"):
                logits, labels = logits_of(opened.model, batches)
                noisy, sweep_labels = logits_of(opened.model, reference_batches)
            row = verify_row(kind, opened, each.sites, logits, labels)
            keep_row(opened, row, tell=False)
            hits.append(scores(logits, labels).hit)
            digest = hashlib.sha256(each.to_json().encode()).hexdigest()
            rows.append(_row(row, each.sites, measured, noisy, clean, sweep_labels, hits) | {"plan_sha256": digest})
        table = pd.DataFrame(rows, columns=list(VERIFICATION_COLUMNS))
        opened.run.write_table("verification", table)
    return _summary(table)


def _reference(opened: Opened, calibration: Sequence[Tensor], batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Logits of the network in floating point; BatchNorm re-estimated on the same images as that of the plans."""
    anew = bool(batchnorms(opened.model))
    with batchnorm_reestimated(opened.model, calibration) if anew else nullcontext():
        return logits_of(opened.model, batches)[0]


def _row(
    row: Mapping[str, object],
    sites: Sequence[PlannedSite],
    measured: pd.DataFrame,
    noisy: Tensor,
    clean: Tensor,
    labels: Tensor,
    hits: Sequence[Tensor],
) -> dict[str, object]:
    figures, _ = compare_logits(noisy, clean, labels)
    known = measured.set_index(["module", "tensor", "bit_width"])[["kl", "delta_loss"]]
    predicted = known.reindex([(s.module, s.tensor, s.bit_width) for s in sites]).sum(min_count=len(sites))
    ahead, ahead_se = mean_and_error(hits[0] - hits[-1])
    return {name: row[name] for name in VERIFICATION_COLUMNS if name in row} | {
        "predicted_kl": predicted["kl"], "measured_kl": figures["kl"], "measured_kl_se": figures["kl_se"],
        "predicted_delta_loss": predicted["delta_loss"], "measured_delta_loss": figures["delta_loss"],
        "measured_delta_loss_se": figures["delta_loss_se"], "planned_ahead": ahead, "planned_ahead_se": ahead_se,
    }  # fmt: skip


def _summary(table: pd.DataFrame) -> str:
    shown = pd.DataFrame(
        {
            "plan": table["plan"],
            "weight_bits": table["weight_bits"].round(3),
            "activation_bits": table["activation_bits"].round(3),
            "top1_percent": (100 * table["top1"]).round(2),
            "se": (100 * table["top1_se"]).round(2),
            "planned_ahead": (100 * table["planned_ahead"]).round(2),
            "ahead_se": (100 * table["planned_ahead_se"]).round(2),
            "predicted_kl": table["predicted_kl"],
            "measured_kl": table["measured_kl"],
        }
    )
    others = table.iloc[1:]
    lines = [
        "Accuracy on validation images without training (points; the difference is paired over images), and the KL on",
        "the images of the sweep: predicted as a sum over sites, measured of the whole plan.",
        as_text(shown),
    ]
    better = others[others["planned_ahead"] + 2 * others["planned_ahead_se"] < 0]
    equal = others[others["planned_ahead"].abs() <= 2 * others["planned_ahead_se"]]
    if len(better):
        lines.append(f"The plan is WORSE than {', '.join(better['plan'])} by more than two standard errors.")
    if len(equal):
        lines.append(f"Within two standard errors of the plan: {', '.join(equal['plan'])}.")
    if len(others) and not len(better) and not len(equal):
        lines.append("The plan is better than every other by more than two standard errors.")
    return "\n".join(lines)
