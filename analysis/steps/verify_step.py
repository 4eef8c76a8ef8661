"""`qvw plan --verify`: the plan beside others at the same budget, calibrated, not trained, on validation images."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch
from pydantic import TypeAdapter
from torch import Tensor

from analysis.data import ImageData
from analysis.figures.panels import figure_files, save_figure
from analysis.figures.verification_plots import verification_figure
from analysis.planner import plan_bits
from analysis.planning import accounting
from analysis.planning.baselines import greedy, largest_uniform, random_choice, within_budget, worst_first
from analysis.planning.interactions import Products
from analysis.planning.interactions import predicted as with_interactions
from analysis.planning.objectives import summed
from analysis.scoring import Reference, compare, divergences, jackknife, outputs_of, reference_of, scores
from analysis.session.loaded_run import LoadedRun
from analysis.session.open_run import open_run
from analysis.session.setup import Setup
from analysis.steps.plan_files import PlanFiles
from analysis.steps.verification_messages import verification_words
from analysis.steps.verify_rows import keep_row, verify_row
from analysis.storage.columns import VERIFICATION_COLUMNS, VERIFY_COLUMNS
from analysis.storage.keyed_log import OwnRows
from analysis.task import Task, mean_and_error
from analysis.terminal.console import progress, resumable
from analysis.training.calibration import Calibrated, calibrated, running_quantized
from quant.batchnorm import batchnorm_reestimated, batchnorms
from quant.bit_plan import BitPlan, PlannedSite, PlanSolver
from quant.choices import Estimator
from quant.errors import InputError
from quant.site import Site

RANDOM_PLANS = 3
CALIBRATION_IMAGES = 256


def other_plans(
    plan: BitPlan,
    options: pd.DataFrame,
    cost: pd.DataFrame,
    *,
    stored: accounting.Stored,
    ties: Sequence[Sequence[Site]],
    latency: pd.DataFrame | None = None,
    interactions: bool = False,
    any_width: bool = True,
) -> list[BitPlan]:
    """Plans to compare with, from the same options: uniform, greedy, worst-first and random ones within the budget.

    The uniform one is the largest that fits, and may cost less than the budget; where none fits it is left out. With
    `any_width` its bits need not have been measured: a plan that beats what happens to be offered has beaten nothing.
    Where `plan` counts interactions the optimum of the sum alone (`additive`) is there too.
    """
    found: list[tuple[str, Sequence[PlannedSite] | None]] = []
    if interactions:
        alone = plan_bits(options, cost, budget=plan.budget, stored=stored, ties=ties, latency=latency)
        found.append(("additive", alone.sites))
    uniform = largest_uniform(options, cost, budget=plan.budget, stored=stored, latency=latency, any_width=any_width)
    found.append(("uniform", uniform))
    ways = [("greedy", greedy), ("reverse", worst_first), *(("random", random_choice(i)) for i in range(RANDOM_PLANS))]
    for name, choose in ways:
        sites = within_budget(options, cost, choose, budget=plan.budget, stored=stored, ties=ties, latency=latency)
        found.append((name, sites))
    return [
        replace(
            plan, sites=tuple(sites), totals=accounting.totals(sites, cost, stored, latency),
            predicted_delta_loss=None, solver=PlanSolver(name=name, status="given"),
        )
        for name, sites in found if sites is not None
    ]  # fmt: skip


def run_verify(
    setup: Setup,
    plan: BitPlan,
    others: Sequence[BitPlan],
    measured: pd.DataFrame,
    products: Products | None = None,
    *,
    files: PlanFiles,
) -> str:
    """Measure each plan, add its row to verify.parquet and to verification.parquet; returns the comparison in words.

    `measured` are the rows of sensitivity.parquet whose sums are the predictions, `products` those of the interactions
    that the plan counts. Predictions are compared on the images of the sweep, accuracy is that of the validation split.
    Plans of the same bits are measured once, and those that were measured before an interrupt are not measured again.
    """
    opened = _opened(setup)
    data = opened.images("val" if setup.split is None else setup.split, setup.images)
    sweep_images = _sweep_images(opened)
    batches, sweep_batches = _Batches(opened, data, "validation"), _Batches(opened, sweep_images, "images of the sweep")
    calibration = _Batches(opened, opened.images("train", None, at_most=CALIBRATION_IMAGES), "calibration")
    held_out = not set(data.dataset.names) & set(sweep_images.dataset.names)
    plans = {"planned": [plan]} | {name: [o for o in others if o.solver.name == name] for name in _names(others)}
    estimator, treatment = _treatment(measured)
    inputs = {"plan": plan.sha256, "sweep_images": sweep_images.images, "calibration_images": CALIBRATION_IMAGES,
              "estimator": estimator, "batchnorm": treatment}  # fmt: skip
    partial, verification = files.in_run("verification.partial.jsonl"), files.in_run("verification")
    step = "verify" if files.is_own else f"verify-{files.name.removeprefix('plan-')}"
    log = OwnRows(opened.run.path / partial, opened.identity(data) | inputs)
    made_files = (f"{verification}.parquet", *figure_files(verification))
    with (
        opened.step(step, data, made_files, {"plans": _names(others)}, inputs, temporary=(partial,), renew=True),
        progress(len(others) + 1, "verify", "plan", quiet=setup.quiet) as bar,
        resumable(lambda: _kept(log)),
    ):
        known = {row["bits"]: row for row in log.read()[0]}
        clean: _Floating | None = None
        rows = []
        for kind, each in ((kind, each) for kind, some in plans.items() for each in some):
            if _bits(each) not in known:
                made = calibrated(
                    opened.network, each, calibration.get(), layout=each.layout, estimator=estimator,
                    model=opened.plan_model, stored=opened.stored,
                )  # fmt: skip
                if clean is None:
                    clean = _floating(opened, made.data, batches.get(), sweep_batches.get(), treatment)
                    keep_row(opened, clean.row)
                with running_quantized(opened.network, made, treatment):
                    figures = _measured(
                        opened, made, kind, batches.get(), sweep_batches.get(), clean, estimator, treatment
                    )
                known[_bits(each)] = figures | {"bits": _bits(each)}
                log.append(known[_bits(each)])
            own = known[_bits(each)]
            keep_row(opened, own["verify"] | {"plan": kind})
            row = _row(own, known[_bits(plan)], each, measured, products, held_out=held_out)
            rows.append({"plan": kind, **row, "plan_sha256": each.sha256})
            bar.update()
        table = pd.DataFrame(rows, columns=list(VERIFICATION_COLUMNS))
        opened.run.write_table(verification, table)
        verify = opened.run.read_table("verify", VERIFY_COLUMNS)
        floating = verify.loc[verify["plan"] == "float", "top1"].tolist()
        figure = verification_figure(table, opened.name, floating=floating[0] if floating else None)
        save_figure(figure, opened.run.path / verification)
    return verification_words(table, plan, others)


def interactions_help(setup: Setup, alone: BitPlan, pairs: BitPlan, measured: pd.DataFrame) -> tuple[bool, str]:
    """Whether a plan that counts interactions costs less than that of the sum, by more than two standard errors.

    Both are measured on the images of the sweep, paired; the second value says how they compare.
    """
    opened = _opened(setup)
    images = opened.images("train", None, at_most=CALIBRATION_IMAGES)
    batches = _Batches(opened, _sweep_images(opened), "interactions").get()
    calibration = _Batches(opened, images, "calibration").get()
    estimator, treatment = _treatment(measured)
    outputs = _outputs(opened, batches)
    task = opened.task.prepared(outputs)
    found = []
    for plan in (alone, pairs):
        made = calibrated(
            opened.network, plan, calibration, layout=plan.layout, estimator=estimator, model=opened.plan_model,
            stored=opened.stored,
        )  # fmt: skip
        with running_quantized(opened.network, made, treatment):
            found.append(divergences(task, _outputs(opened, batches), outputs, batches))
    gain, error = mean_and_error(found[0] - found[1])
    helps = gain > 2 * error
    return helps, (
        f"interactions {'are counted' if helps else 'are left out'}: with them the measured divergence is "
        f"{found[1].mean().item():.4g}, without {found[0].mean().item():.4g} (difference {gain:.2g} ± {error:.1g})"
    )


def _kept(log: OwnRows) -> str:
    """What an interrupted verification leaves for the next start, in words."""
    count = len(log.read()[0])
    return f"the plan, and what was measured of {count} plans" if count else ""


class _Batches:
    """Batches of images, read when they are first asked for and kept."""

    def __init__(self, opened: LoadedRun, data: ImageData, what: str) -> None:
        self._opened, self._data, self._what = opened, data, what
        self._read: list[tuple[Tensor, Tensor | None]] = []

    def get(self) -> list[tuple[Tensor, Tensor | None]]:
        if not self._read:
            self._read = list(self._opened.stream(self._data, self._what))
        return self._read


def _opened(setup: Setup) -> LoadedRun:
    try:
        return open_run(setup, needs_data=True)
    except InputError as error:
        raise InputError(
            f"{error} The plan itself is written. Where model or images have moved, `qvw eval MODEL --weights FILE "
            f"--data DATA --float --run {setup.run}` tells the run where they are."
        ) from error


def _sweep_images(opened: LoadedRun) -> ImageData:
    """The images on which the sensitivities were measured; InputError where they are not those any more."""
    swept = opened.run.record.steps["sensitivity"].inputs
    if "split" not in swept:
        raise InputError(
            "the sensitivities were measured by a program on data of its own: predictions cannot be compared on the "
            "same images. The plan itself is written; `evaluate` measures it."
        )
    data = opened.images(str(swept["split"]), None, at_most=int(swept["images"]))
    if data.sha256 != swept["images_sha256"]:
        raise InputError(
            f"{data.spec} does not hold the images of the sweep any more (sha256 {data.sha256[:12]}, expected "
            f"{str(swept['images_sha256'])[:12]}): predicted and measured changes would be of different images. Put "
            "them back, or measure again: `qvw sensitivity --overwrite`."
        )
    return data


def _names(plans: Sequence[BitPlan]) -> list[str]:
    return list(dict.fromkeys(plan.solver.name for plan in plans))


def _bits(plan: BitPlan) -> str:
    """What distinguishes plans that quantize differently, whatever made them."""
    return hashlib.sha256(repr(plan.sites).encode()).hexdigest()


def _treatment(measured: pd.DataFrame) -> tuple[Estimator, str]:
    """Estimator of scales and treatment of BatchNorm in the sweep, so that prediction and measurement are of one."""
    estimator: Estimator = TypeAdapter(Estimator).validate_python(measured["estimator"].iloc[0])
    return estimator, "stored" if (measured["batchnorm"] == "stored").all() else "re-estimate"


def _outputs(opened: LoadedRun, batches: Sequence[Any]) -> list[Any]:
    return outputs_of(partial(opened.task.forward, opened.model), batches, opened.task)


class _Floating(NamedTuple):
    """The network in floating point: its row of verify.parquet, its outputs, and what the sweep compared with."""

    row: dict[str, Any]
    outputs: list[Any]
    task: Task  # with what it takes from the outputs
    swept: Reference
    swept_task: Task


def _floating(
    opened: LoadedRun, calibration: Sequence[Any], batches: Sequence[Any], sweep_batches: Sequence[Any], treatment: str
) -> _Floating:
    """The network as it is on the validation images; on those of the sweep with BatchNorm as the plans have it."""
    outputs = _outputs(opened, batches)
    task = opened.task.prepared(outputs)
    row = verify_row(
        "float", opened, (), scores(task, outputs, batches), estimator="none", metric=jackknife(task, outputs, batches),
        divergence=torch.zeros(sum(map(task.samples, batches)), dtype=torch.float64),
    )  # fmt: skip
    again = treatment == "re-estimate" and bool(batchnorms(opened.model))
    with batchnorm_reestimated(opened.model, calibration) if again else nullcontext():
        swept = _outputs(opened, sweep_batches)
    swept_task = opened.task.prepared(swept)
    return _Floating(row, outputs, task, reference_of(swept_task, swept, sweep_batches), swept_task)


def _measured(
    opened: LoadedRun,
    made: Calibrated,
    kind: str,
    batches: Sequence[Any],
    sweep_batches: Sequence[Any],
    clean: _Floating,
    estimator: Estimator,
    treatment: str,
) -> dict[str, Any]:
    """Figures of one plan, in which the model runs: its row of verify.parquet, the changes, and those of images."""
    outputs = _outputs(opened, batches)
    per_image = scores(clean.task, outputs, batches)
    figures, images = compare(clean.swept_task, _outputs(opened, sweep_batches), clean.swept, sweep_batches)
    return {
        "verify": verify_row(
            kind, opened, made.plan.sites, per_image, estimator=estimator, batchnorm=treatment,
            divergence=divergences(clean.task, outputs, clean.outputs, batches),
            metric=jackknife(clean.task, outputs, batches),
        ),
        "figures": figures,
        "hit": per_image.score.tolist(), "kl": images.divergence.tolist(),
    }  # fmt: skip


def _row(
    own: Mapping[str, Any],
    planned: Mapping[str, Any],
    plan: BitPlan,
    measured: pd.DataFrame,
    products: Products | None,
    *,
    held_out: bool,
) -> dict[str, object]:
    """A row of verification.parquet; differences from what was measured of the `planned` one are paired over images.

    `held_out`: no validation image is one of the sweep, so that their KL over the predicted one is the prediction's
    bias.
    """
    pairs = float("nan")
    if products is not None:
        swept = measured[["module", "tensor", "bit_width", "divergence"]].itertuples(index=False)
        scores = {(Site(module, tensor), bits): kl for module, tensor, bits, kl in swept}
        pairs = with_interactions(plan.bits, scores, products)
    figures = own["figures"]
    ahead, ahead_se = mean_and_error(torch.tensor(planned["hit"]).double() - torch.tensor(own["hit"]).double())
    excess, excess_se = mean_and_error(torch.tensor(own["kl"]).double() - torch.tensor(planned["kl"]).double())
    row = {name: own["verify"][name] for name in VERIFICATION_COLUMNS if name in own["verify"] and name != "plan"}
    predicted = summed(plan.sites, measured, "divergence")
    believed = predicted if math.isnan(pairs) else pairs
    heldout, heldout_se = (own["verify"][name] if held_out else math.nan for name in ("divergence", "divergence_se"))
    return row | {
        "predicted_kl": predicted, "predicted_kl_pairs": pairs,
        "heldout_kl": heldout, "heldout_kl_se": heldout_se,
        "prediction_ratio": heldout / believed if believed > 0 else math.nan,
        "prediction_ratio_se": heldout_se / believed if believed > 0 else math.nan,
        "measured_kl": figures["divergence"], "measured_kl_se": figures["divergence_se"],
        "kl_excess": excess, "kl_excess_se": excess_se,
        "predicted_delta_loss": summed(plan.sites, measured, "delta_loss"),
        "measured_delta_loss": figures["delta_loss"], "measured_delta_loss_se": figures["delta_loss_se"],
        "planned_ahead": ahead, "planned_ahead_se": ahead_se,
    }  # fmt: skip
