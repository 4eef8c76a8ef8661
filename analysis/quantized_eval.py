"""`qvw eval`: accuracy of the floating-point model, of a plan, of uniform bits; calibrated, without training."""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from analysis import accounting
from analysis.cost import cost_table
from analysis.evaluation import logits_of, mean_and_error, scores
from analysis.plan_options import uniform_bits
from analysis.setup import Setup, Workbench, open_workbench
from quant.bit_plan import BitPlan, PlannedSite
from quant.calibrate import ActivationSample, batchnorm_reestimated, batchnorms, make_quantizer, observe_activations
from quant.errors import InputError
from quant.prepare import quantized
from quant.quantizer import Quantizer
from quant.range_estimators import Estimator
from quant.scheme import QuantScheme, default_granularity, default_range
from quant.site import ALLOWED_BIT_WIDTHS, Site, SiteInfo

VERIFY_COLUMNS = (
    "plan", "weight_bits", "activation_bits", "size_bytes", "bitops", "loss", "loss_se", "top1", "top1_se", "images",
)  # fmt: skip


def run_eval(
    setup: Setup,
    *,
    plan_file: Path | None,
    uniform: str | None,
    layout: str,
    calibration_images: int,
    estimator: Estimator,
    batchnorm: str,
) -> None:
    """Evaluate one of plan, uniform bits or the float model, and keep the result as a row of verify.parquet."""
    bench = open_workbench(setup, needs_data=True)
    uniform_widths = None if uniform is None else parse_uniform(uniform)
    given = None if plan_file is None else read_plan(plan_file, bench)
    data = bench.images(setup.split or "val", setup.images)
    with bench.step("eval", data, ("verify.parquet",)), ExitStack() as stack:
        sites: tuple[PlannedSite, ...] = ()
        if given is not None or uniform_widths is not None:
            calibration = bench.images("train", None, at_most=calibration_images)
            images = [x for x, _ in bench.stream(calibration, "calibration")]
            samples = _samples(bench, given, uniform_widths, images)
            sites = given.sites if given is not None else _uniform_sites(bench, uniform_widths, layout, samples)
            stack.enter_context(_quantized(bench, sites, samples, images, estimator, batchnorm))
        logits, labels = logits_of(bench.model, bench.stream(data, "evaluation"))
        kind = "float" if not sites else "planned" if given is not None else "uniform"
        row = _row(kind, bench, sites, logits, labels)
        _keep(bench, row)
    bench.say(pd.DataFrame([row]).to_string(index=False, float_format=lambda value: f"{value:.5g}"))
    bench.say(f"a row of {bench.run.path / 'verify.parquet'}")


def parse_uniform(text: str) -> tuple[int, int]:
    """Weight and activation bits of `w3a4`."""
    match = re.fullmatch(r"w(\d+)a(\d+)", text)
    if match is None or not {int(match[1]), int(match[2])} <= set(ALLOWED_BIT_WIDTHS):
        raise InputError(f"--uniform {text!r} is not understood; write w4a4, with bit-widths 1 to 8 or 16.")
    return int(match[1]), int(match[2])


def read_plan(path: Path, bench: Workbench) -> BitPlan:
    """The plan in a file, checked against the model: its sites must exist and have the planned axes."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the plan {path} cannot be read: {error}. Make one with `qvw plan`.") from error
    plan = BitPlan.from_json(text, source=str(path))
    if not plan.sites:
        raise InputError(f"{path} plans no site: nothing would be quantized. Use --float for the model as it is.")
    known = {info.site: info for info in bench.sites if info.quantizable}
    plan.check_sites(known)
    for planned in plan.sites:
        info = known[planned.site]
        axis_count = {"per_tensor": 1, "per_channel": info.channels, "per_head": info.heads}[planned.granularity]
        if not axis_count:
            raise InputError(
                f"{path} plans {planned.site} {planned.granularity}, an axis that {bench.name} lacks there."
            )
    if plan.model.weights_sha256 not in (None, bench.weights_sha256):
        theirs, ours = str(plan.model.weights_sha256)[:12], bench.weights_sha256[:12]
        bench.warn(f"{path} was made for weights {theirs}, these are {ours}: its bits may not suit them.")
    return plan


def _samples(
    bench: Workbench, plan: BitPlan | None, uniform: tuple[int, int] | None, images: Sequence[Tensor]
) -> dict[Site, ActivationSample]:
    wanted = None if plan is None else set(plan.bits)
    chosen = {
        info.site: info
        for info in bench.sites
        if info.quantizable and not info.site.is_weight and (wanted is None or info.site in wanted)
    }
    return observe_activations(bench.model, bench.trace, chosen, images, count=len(images))


def _uniform_sites(
    bench: Workbench, widths: tuple[int, int] | None, layout: str, samples: Mapping[Site, ActivationSample]
) -> tuple[PlannedSite, ...]:
    assert widths is not None
    bits = uniform_bits(cost_table(bench.sites), *widths, layout)
    planned = []
    for info in bench.sites:
        if info.site not in bits:
            continue
        signed, offset = True, False
        if not info.site.is_weight:
            values = samples[info.site].values
            signed, offset = default_range(info, values.min().item(), values.max().item())
        module = bench.model.get_submodule(info.site.module)
        planned.append(
            PlannedSite(
                module=info.site.module, tensor=info.site.tensor,  # type: ignore[arg-type]
                bit_width=bits[info.site],
                granularity=default_granularity(info, module), signed=signed, offset=offset,
            )
        )  # fmt: skip
    return tuple(planned)


def _quantized(
    bench: Workbench,
    sites: Sequence[PlannedSite],
    samples: Mapping[Site, ActivationSample],
    images: Sequence[Tensor],
    estimator: Estimator,
    batchnorm: str,
) -> ExitStack:
    """A context in which the model runs with these sites quantized."""
    infos: dict[Site, SiteInfo] = {info.site: info for info in bench.sites}
    quantizers: dict[Site, Quantizer] = {}
    for planned in sites:
        scheme = QuantScheme(
            bit_width=planned.bit_width, signed=planned.signed, offset=planned.offset, granularity=planned.granularity
        )
        quantizers[planned.site] = make_quantizer(
            bench.model, infos[planned.site], planned.bit_width, sample=samples.get(planned.site), estimator=estimator,
            scheme=scheme,
        )  # fmt: skip
    stack = ExitStack()
    stack.enter_context(quantized(bench.model, bench.trace, infos, quantizers))
    if batchnorm == "re-estimate" and batchnorms(bench.model):
        stack.enter_context(batchnorm_reestimated(bench.model, images))
    return stack


def _row(kind: str, bench: Workbench, sites: Sequence[PlannedSite], logits: Tensor, labels: Tensor) -> dict[str, Any]:
    per_image = scores(logits, labels)
    loss, loss_se = mean_and_error(per_image.loss)
    top1, top1_se = mean_and_error(per_image.hit)
    totals = accounting.totals(sites, cost_table(bench.sites), bench.parameters)
    return {
        "plan": kind,
        "weight_bits": _or_float(totals.weight_bits),
        "activation_bits": _or_float(totals.activation_bits),
        "size_bytes": totals.size_bytes,
        "bitops": totals.bitops,
        "loss": loss,
        "loss_se": loss_se,
        "top1": top1,
        "top1_se": top1_se,
        "images": len(labels),
    }


def _or_float(bits: float | None) -> float:
    return float(accounting.FLOAT_BITS) if bits is None else bits


def _keep(bench: Workbench, row: Mapping[str, Any]) -> None:
    """Add a row to verify.parquet; a row of the same plan and bits takes the place of the older one."""
    rows = bench.run.read_table("verify").to_dict("records") if (bench.run.path / "verify.parquet").exists() else []
    same = ("plan", "weight_bits", "activation_bits", "size_bytes")
    rows = [old for old in rows if any(old[name] != row[name] for name in same)]
    bench.run.write_table("verify", pd.DataFrame([*rows, row], columns=list(VERIFY_COLUMNS)))
