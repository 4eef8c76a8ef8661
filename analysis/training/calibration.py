"""What a plan, or uniform bits, mean for an opened model: the sites, and quantizers calibrated on training images."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from analysis.cost import cost_table
from analysis.planning import accounting
from analysis.planning.budget_kinds import amount
from analysis.planning.options import uniform_bits
from analysis.planning.uniform import parse_uniform
from analysis.session.opened import Opened
from analysis.terminal.console import warn
from quant.batchnorm import batchnorm_reestimated, batchnorms
from quant.bit_plan import BitPlan, PlanBudget, PlanModel, PlannedSite, PlanSolver, check_known_sites
from quant.calibrate import ActivationSample, default_scheme, make_quantizer, observe_activations
from quant.choices import Estimator, Layout
from quant.errors import InputError, first_line
from quant.prepare import quantized
from quant.quantizer import Quantizer
from quant.scheme import QuantScheme, axis_and_groups
from quant.site import Site


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A plan with the quantizers of its sites, and the images (batches on the device) that set their scales."""

    plan: BitPlan
    quantizers: Mapping[Site, Quantizer]
    images: Sequence[Tensor]


def calibrated(
    opened: Opened, plan: BitPlan | str, *, layout: Layout, calibration_images: int, estimator: Estimator
) -> Calibrated:
    """The quantizers of a plan, or of uniform bits given as `w3a4`, calibrated on the first training images.

    `layout` is that of uniform bits; a plan brings its own.
    """
    widths = parse_uniform(plan) if isinstance(plan, str) else None  # wrong ones are told before images are read
    calibration = opened.images("train", None, at_most=calibration_images)
    images = [x for x, _ in opened.stream(calibration, "calibration")]
    samples = _samples(opened, None if isinstance(plan, str) else plan, images)
    if isinstance(plan, str):
        assert widths is not None
        plan = _uniform_plan(opened, widths, layout, samples)
    quantizers = {
        planned.site: make_quantizer(
            opened.model,
            opened.by_site[planned.site],
            _scheme(planned),
            sample=samples.get(planned.site),
            estimator=estimator,
        )
        for planned in plan.sites
    }
    return Calibrated(plan=plan, quantizers=quantizers, images=images)


@contextmanager
def running_quantized(opened: Opened, made: Calibrated, batchnorm: str) -> Iterator[None]:
    """A context in which the model runs with these quantizers."""
    anew = batchnorm == "re-estimate" and bool(batchnorms(opened.model))
    with (
        quantized(opened.model, opened.trace, opened.by_site, made.quantizers),
        batchnorm_reestimated(opened.model, made.images) if anew else nullcontext(),
    ):
        yield


def warn_of_fewer(made: Calibrated, asked: int, option: str) -> None:
    """Say that fewer images set the scales than `option` asked for, if so."""
    used = sum(len(x) for x in made.images)
    if used < asked:
        warn(f"{used} training images set the scales, all that can be read; {option} is {asked}.")


def uncalibrated(opened: Opened, plan: BitPlan) -> dict[Site, Quantizer]:
    """Quantizers of a plan whose scales (all 1) are still to be loaded."""
    quantizers = {}
    for planned in plan.sites:
        axis, groups = axis_and_groups(opened.by_site[planned.site], planned.granularity)
        offset = torch.zeros(groups) if planned.offset else None
        quantizers[planned.site] = Quantizer(
            scheme=_scheme(planned), scale=torch.ones(groups), offset=offset, axis=axis, groups=groups
        )
    return quantizers


def read_plan(path: Path, opened: Opened, *, other_weights: bool = False) -> BitPlan:
    """The plan in a file, checked against the model: its sites must exist and have the planned axes.

    Weights that it was not made for are told in a warning, unless `other_weights` are what is expected.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the plan {path} cannot be read: {first_line(error)}. Make one with `qvw plan`.") from error
    plan = BitPlan.from_json(text, source=str(path))
    if not plan.sites:
        raise InputError(f"{path} plans no site: nothing would be quantized. Use --float for the model as it is.")
    known = {info.site: info for info in opened.sites if info.quantizable}
    check_known_sites((planned.site for planned in plan.sites), known, what=str(path))
    for planned in plan.sites:
        info = known[planned.site]
        axes = {"per_tensor": 1, "per_channel": info.channels, "per_head": info.heads}
        if not axes[planned.granularity]:
            raise InputError(
                f"{path} plans {planned.site} {planned.granularity}, but {opened.name} has no such axis there. "
                f"Plan it per_tensor, or plan again for this model."
            )
    _check_shapes(plan, opened, path)
    theirs, ours = plan.model.weights_sha256, opened.record.weights_sha256
    if not other_weights and theirs not in (None, ours):
        warn(f"{path} was made for other weights of {plan.model.name} than these: its bits may not suit them.")
    return plan


def _check_shapes(plan: BitPlan, opened: Opened, path: Path) -> None:
    """InputError where what the plan says of its cost is not what it costs here; bytes of scales aside, its own choice.

    Heads show in the elements of the attention maps, all other shapes in the products.
    """
    here = accounting.totals(plan.sites, cost_table(opened.sites), opened.record.parameters)
    for name in ("bitops", "weight_bits", "activation_bits", "activation_bytes"):
        said, found = getattr(plan.totals, name), getattr(here, name)
        if said is not None and found is not None and not math.isclose(said, found, rel_tol=1e-9):
            raise InputError(
                f"{path} says that it takes {amount(name, said, 6)}, but of {opened.name} it takes "
                f"{amount(name, found, 6)}: it was made for other shapes or heads, or edited. Plan again for this "
                "model, or mend its totals."
            )


def _scheme(planned: PlannedSite) -> QuantScheme:
    return QuantScheme(
        bit_width=planned.bit_width, signed=planned.signed, offset=planned.offset, granularity=planned.granularity
    )


def _samples(opened: Opened, plan: BitPlan | None, images: Sequence[Tensor]) -> dict[Site, ActivationSample]:
    wanted = None if plan is None else {site.site: site.granularity for site in plan.sites}
    chosen = {
        info.site: info
        for info in opened.sites
        if info.quantizable and not info.site.is_weight and (wanted is None or info.site in wanted)
    }
    return observe_activations(
        opened.model, opened.trace, chosen, images, count=len(images), granularities=wanted or {}
    )


def _uniform_plan(
    opened: Opened, widths: tuple[int, int], layout: Layout, samples: Mapping[Site, ActivationSample]
) -> BitPlan:
    cost = cost_table(opened.sites)
    bits = uniform_bits(cost, *widths, layout)
    planned = []
    for info in opened.sites:
        if info.site in bits:
            scheme = default_scheme(opened.model, info, bits[info.site], sample=samples.get(info.site))
            planned.append(PlannedSite.of(info.site, scheme))
    record = opened.record
    return BitPlan(
        model=PlanModel(name=record.typed, kwargs=dict(record.kwargs), weights_sha256=record.weights_sha256),
        layout=layout, budget=PlanBudget(), sites=tuple(planned), predicted_delta_loss=None,
        totals=accounting.totals(planned, cost, record.parameters), solver=PlanSolver(name="uniform", status="given"),
    )  # fmt: skip
