"""What a plan, or uniform bits, mean for an opened model: the sites, and quantizers calibrated on training images."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from analysis.cost import cost_table
from analysis.planning import accounting
from analysis.planning.bit_options import uniform_bits
from analysis.planning.edited import recounted
from analysis.planning.uniform import parse_uniform
from analysis.session.loaded_run import LoadedRun
from analysis.storage.plan_file import read_used_plan
from analysis.terminal.console import warn
from quant.batches import samples
from quant.batchnorm import batchnorm_reestimated, batchnorms
from quant.bit_plan import BitPlan, PlanBudget, PlanModel, PlanSolver
from quant.calibrate import calibrate, check_planned, planned_sites, scheme_of
from quant.choices import Estimator, Layout
from quant.insertion import quantized
from quant.network import Forward, Network
from quant.quantizer import Quantizer
from quant.scheme import axis_and_groups
from quant.site import Site


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A plan with the quantizers of its sites, and the batches (on the device) that set their scales."""

    plan: BitPlan
    quantizers: Mapping[Site, Quantizer]
    data: Sequence[Any]


def calibrated(
    net: Network,
    plan: BitPlan | str,
    data: Sequence[Any],
    *,
    model: PlanModel,
    stored: accounting.Stored,
    layout: Layout,
    estimator: Estimator,
    forward: Forward | None = None,
) -> Calibrated:
    """The quantizers of a plan, or of uniform bits given as `w3a4`, calibrated on the batches `data`.

    `layout` is that of uniform bits; a plan brings its own. `model` and `stored` are what its plan says of the network.
    """
    if isinstance(plan, str):
        cost = cost_table(net.infos, net.trace.unplanned)
        sites = planned_sites(net, uniform_bits(cost, *parse_uniform(plan), layout), data, forward=forward)
        plan = BitPlan(
            model=model, layout=layout, budget=PlanBudget(), sites=tuple(sites), predicted_delta_loss=None,
            totals=accounting.totals(sites, cost, stored), solver=PlanSolver(name="uniform", status="given"),
        )  # fmt: skip
    quantizers = calibrate(net, plan.sites, data, estimator=estimator, forward=forward)
    return Calibrated(plan=plan, quantizers=quantizers, data=data)


@contextmanager
def running_quantized(net: Network, made: Calibrated, batchnorm: str, forward: Forward | None = None) -> Iterator[None]:
    """A context in which the model runs with these quantizers; `batchnorm` is `stored` or `re_estimate`."""
    re_estimated = batchnorm.replace("-", "_") == "re_estimate" and bool(batchnorms(net.model))
    run = partial(forward or net.forward, net.model)
    with (
        quantized(net, made.quantizers),
        batchnorm_reestimated(net.model, made.data, run) if re_estimated else nullcontext(),
    ):
        yield


def calibration_batches(opened: LoadedRun, images: int) -> list[Any]:
    """The first training images of a run, at most so many, as batches on the device."""
    return list(opened.stream(opened.images("train", None, at_most=images), "calibration"))


def warn_of_fewer(made: Calibrated, asked: int, option: str) -> None:
    """Say that fewer images set the scales than `option` asked for, if so."""
    used = sum(map(samples, made.data))
    if used < asked:
        warn(f"{used} training images set the scales, all that can be read; {option} is {asked}.")


def uncalibrated(opened: LoadedRun, plan: BitPlan) -> dict[Site, Quantizer]:
    """Quantizers of a plan whose scales (all 1) are still to be loaded."""
    quantizers = {}
    for planned in plan.sites:
        axis, groups = axis_and_groups(opened.by_site[planned.site], planned.granularity)
        offset = torch.zeros(groups) if planned.offset else None
        quantizers[planned.site] = Quantizer(
            scheme=scheme_of(planned), scale=torch.ones(groups), offset=offset, axis=axis, groups=groups
        )
    return quantizers


def read_plan(path: Path, opened: LoadedRun, *, other_weights: bool = False) -> BitPlan:
    """The plan in a file, checked against the model: its sites must exist and have the planned axes.

    A plan is made to be edited: totals that are stale or left out are counted here, which a warning tells, and the
    predicted loss of other bits no longer holds. Where they are stale and the plan was made for other weights, it may
    be of other shapes or heads: InputError. Other weights alone are told in a warning, unless `other_weights` are
    expected; then stale totals are an error too.
    """
    plan = read_used_plan(path)
    check_planned(opened.network, plan.sites, what=str(path))
    here = accounting.totals(plan.sites, cost_table(opened.sites, opened.trace.unplanned), opened.stored)
    theirs, ours = plan.model.weights_sha256, opened.record.weights_sha256
    same = theirs in (None, ours)
    plan = recounted(plan, here, path, same_weights=same and not other_weights, tell=warn)
    if not (same or other_weights):
        warn(f"{path} was made for other weights of {plan.model.name} than these: its bits may not suit them.")
    return plan
