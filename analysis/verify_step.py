"""`qvw plan --verify`: the plan beside others at the same budget, calibrated, not trained, on validation images."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from analysis import accounting
from analysis.baselines import greedy, largest_uniform, lowered, random_choice, worst_first
from analysis.calibration import Calibrated, calibrated
from analysis.console import as_text
from analysis.data import ImageData
from analysis.eval_step import keep_row, running_quantized, verify_row
from analysis.evaluation import compare_logits, logits_of, mean_and_error, scores
from analysis.files import RowLog
from analysis.open_run import open_run
from analysis.opened import Opened
from analysis.setup import Setup
from quant.batchnorm import batchnorm_reestimated, batchnorms
from quant.bit_plan import BitPlan, PlannedSite, PlanSolver
from quant.errors import InputError
from quant.site import Site

RANDOM_PLANS = 3
CALIBRATION_IMAGES = 256
_PARTIAL = "verification.partial.jsonl"
VERIFICATION_COLUMNS = (
    "plan", "weight_bits", "activation_bits", "size_bytes", "bitops", "predicted_kl", "measured_kl", "measured_kl_se",
    "kl_excess", "kl_excess_se", "predicted_delta_loss", "measured_delta_loss", "measured_delta_loss_se",
    "top1", "top1_se", "planned_ahead", "planned_ahead_se", "plan_sha256",
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
    images of the sweep, accuracy is that of the validation split. Plans of the same bits are measured once, and those
    that were measured before an interrupt are not measured again.
    """
    opened = _opened(setup)
    data = opened.images("val" if setup.split is None else setup.split, setup.images)
    sweep_images = _sweep_images(opened)
    batches, sweep_batches = _Batches(opened, data, "validation"), _Batches(opened, sweep_images, "images of the sweep")
    plans = {"planned": [plan]} | {name: [o for o in others if o.solver.name == name] for name in _names(others)}
    inputs = {"plan": _digest(plan), "sweep_images": sweep_images.images, "calibration_images": CALIBRATION_IMAGES}
    log = RowLog(opened.run.path / _PARTIAL)
    fixed = hashlib.sha256(json.dumps(opened.inputs(data) | inputs, sort_keys=True).encode()).hexdigest()
    with opened.step("verify", data, ("verification.parquet",), {"plans": _names(others)}, inputs,
                     temporary=(_PARTIAL,), renew=True):  # fmt: skip
        known = {row["bits"]: row for row in log.read(damaged=True) if row and row["inputs"] == fixed}
        clean: Tensor | None = None
        rows = []
        for kind, each in ((kind, each) for kind, some in plans.items() for each in some):
            if _bits(each) not in known:
                made = calibrated(
                    opened, each, layout=each.layout, calibration_images=CALIBRATION_IMAGES, estimator="mse"
                )
                if clean is None:
                    logits, labels = logits_of(opened.model, batches.get())
                    keep_row(opened, verify_row("float", opened, (), logits, labels), tell=False)
                    clean = _reference(opened, made.images, sweep_batches.get())
                figures = _measure(opened, made, kind, batches.get(), sweep_batches.get(), clean)
                known[_bits(each)] = figures | {"inputs": fixed, "bits": _bits(each)}
                log.append([known[_bits(each)]])
            own = known[_bits(each)]
            keep_row(opened, own["verify"] | {"plan": kind}, tell=False)
            row = _row(own, known[_bits(plan)], each.sites, measured)
            rows.append({"plan": kind, **row, "plan_sha256": _digest(each)})
        table = pd.DataFrame(rows, columns=list(VERIFICATION_COLUMNS))
        opened.run.write_table("verification", table)
    return _summary(table)


class _Batches:
    """Batches of images, read when they are first asked for and kept."""

    def __init__(self, opened: Opened, data: ImageData, what: str) -> None:
        self._opened, self._data, self._what = opened, data, what
        self._read: list[tuple[Tensor, Tensor]] = []

    def get(self) -> list[tuple[Tensor, Tensor]]:
        if not self._read:
            self._read = list(self._opened.stream(self._data, self._what))
        return self._read


def _opened(setup: Setup) -> Opened:
    try:
        return open_run(setup, needs_data=True)
    except InputError as error:
        raise InputError(
            f"{error} The plan itself is written. Where model or images have moved, `qvw eval MODEL --weights FILE "
            f"--data DATA --float --run {setup.run}` tells the run where they are."
        ) from error


def _sweep_images(opened: Opened) -> ImageData:
    """The images on which the sensitivities were measured; InputError where they are not those any more."""
    swept = opened.run.record.steps["sensitivity"].inputs
    data = opened.images(str(swept["split"]), int(swept["images"]))
    if data.sha256 != swept["images_sha256"]:
        raise InputError(
            f"{data.spec} does not hold the images of the sweep any more (sha256 {data.sha256[:12]}, expected "
            f"{str(swept['images_sha256'])[:12]}): predicted and measured changes would be of different images. Put "
            "them back, or measure anew: `qvw sensitivity --overwrite`."
        )
    return data


def _names(plans: Sequence[BitPlan]) -> list[str]:
    return list(dict.fromkeys(plan.solver.name for plan in plans))


def _digest(plan: BitPlan) -> str:
    return hashlib.sha256(plan.to_json().encode()).hexdigest()


def _bits(plan: BitPlan) -> str:
    """What tells apart plans that quantize differently, whatever made them."""
    return hashlib.sha256(repr(plan.sites).encode()).hexdigest()


def _reference(opened: Opened, calibration: Sequence[Tensor], batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Logits of the network in floating point; BatchNorm re-estimated on the same images as that of the plans."""
    anew = bool(batchnorms(opened.model))
    with batchnorm_reestimated(opened.model, calibration) if anew else nullcontext():
        return logits_of(opened.model, batches)[0]


def _measure(
    opened: Opened,
    made: Calibrated,
    kind: str,
    batches: Sequence[tuple[Tensor, Tensor]],
    sweep_batches: Sequence[tuple[Tensor, Tensor]],
    clean: Tensor,
) -> dict[str, Any]:
    """Figures of one plan: its row of verify.parquet, those against `clean`, and hits and KL of single images."""
    with running_quantized(opened, made, "re-estimate"):
        logits, labels = logits_of(opened.model, batches)
        noisy, sweep_labels = logits_of(opened.model, sweep_batches)
    figures, images = compare_logits(noisy, clean, sweep_labels)
    return {
        "verify": verify_row(kind, opened, made.plan.sites, logits, labels), "figures": figures,
        "hit": scores(logits, labels).hit.tolist(), "kl": images.kl.tolist(),
    }  # fmt: skip


def _row(
    own: Mapping[str, Any], planned: Mapping[str, Any], sites: Sequence[PlannedSite], measured: pd.DataFrame
) -> dict[str, object]:
    """A row of verification.parquet; differences from what was measured of the `planned` one are paired over images."""
    known = measured.set_index(["module", "tensor", "bit_width"])[["kl", "delta_loss"]]
    predicted = known.reindex([(s.module, s.tensor, s.bit_width) for s in sites]).sum(min_count=len(sites))
    figures = own["figures"]
    ahead, ahead_se = mean_and_error(torch.tensor(planned["hit"]).double() - torch.tensor(own["hit"]).double())
    excess, excess_se = mean_and_error(torch.tensor(own["kl"]).double() - torch.tensor(planned["kl"]).double())
    row = {name: own["verify"][name] for name in VERIFICATION_COLUMNS if name in own["verify"] and name != "plan"}
    return row | {
        "predicted_kl": predicted["kl"], "measured_kl": figures["kl"], "measured_kl_se": figures["kl_se"],
        "kl_excess": excess, "kl_excess_se": excess_se, "predicted_delta_loss": predicted["delta_loss"],
        "measured_delta_loss": figures["delta_loss"], "measured_delta_loss_se": figures["delta_loss_se"],
        "planned_ahead": ahead, "planned_ahead_se": ahead_se,
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
            "kl_excess": table["kl_excess"],
            "excess_se": table["kl_excess_se"],
        }
    )
    others = table.iloc[1:]
    lines = [
        "Accuracy on validation images without training (points; the difference is paired over images), and the KL on",
        "the images of the sweep: predicted as a sum over sites, measured of the whole plan, and its excess over that",
        "of the plan (paired too).",
        as_text(shown),
    ]
    for what, difference, error in (
        ("accuracy", others["planned_ahead"], others["planned_ahead_se"]),
        ("KL", others["kl_excess"], others["kl_excess_se"]),
    ):
        better, equal = others[difference + 2 * error < 0], others[difference.abs() <= 2 * error]
        if len(better):
            lines.append(f"By {what} the plan is WORSE than {', '.join(better['plan'])} by over two standard errors.")
        if len(equal):
            lines.append(f"By {what} within two standard errors of the plan: {', '.join(equal['plan'])}.")
        if len(others) and not len(better) and not len(equal):
            lines.append(f"By {what} the plan is better than every other by more than two standard errors.")
    return "\n".join(lines)
