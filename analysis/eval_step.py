"""`qvw eval`: accuracy of the floating-point model, of a plan, of uniform bits; calibrated, without training."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import TypeAdapter
from torch import Tensor

from analysis import accounting
from analysis.console import as_text, say, warn
from analysis.cost import cost_table
from analysis.evaluation import logits_of, mean_and_error, scores
from analysis.plan_options import uniform_bits
from analysis.setup import Opened, Setup, open_run
from quant.batchnorm import batchnorm_reestimated, batchnorms
from quant.bit_plan import BitPlan, PlannedSite
from quant.calibrate import ActivationSample, default_scheme, make_quantizer, observe_activations
from quant.choices import ALLOWED_BIT_WIDTHS, Estimator
from quant.errors import InputError
from quant.prepare import quantized
from quant.scheme import QuantScheme
from quant.site import Site

VERIFY_COLUMNS = (
    "plan", "weight_bits", "activation_bits", "size_bytes", "bitops", "loss", "loss_se", "top1", "top1_se", "images",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """What is evaluated, and how it is calibrated; exactly one of `plan_file`, `uniform` and `floating` is set."""

    plan_file: Path | None = None
    uniform: str | None = None
    floating: bool = False
    layout: Literal["paper", "strict"] = "paper"
    calibration_images: int = 256
    estimator: Estimator = "mse"
    batchnorm: Literal["stored", "re-estimate"] = "re-estimate"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "EvalRequest":
        """The options of a command line, checked."""
        request = TypeAdapter(cls).validate_python(dict(options))
        if sum((request.plan_file is not None, request.uniform is not None, request.floating)) != 1:
            raise InputError("give one of --plan FILE, --uniform wXaY and --float, to say what is evaluated.")
        return request


def run_eval(setup: Setup, request: EvalRequest) -> None:
    """Evaluate what is asked for, and keep the result as a row of verify.parquet."""
    opened = open_run(setup, needs_data=True)
    widths = None if request.uniform is None else parse_uniform(request.uniform)
    plan = None if request.plan_file is None else read_plan(request.plan_file, opened)
    data = opened.step_images("eval", "val")
    options = {name: None if value is None else str(value) for name, value in asdict(request).items()}
    options["plan_sha256"] = None if plan is None else hashlib.sha256(plan.to_json().encode()).hexdigest()
    with opened.step("eval", data, ("verify.parquet",), options):
        sites: Sequence[PlannedSite] = ()
        running: Any = nullcontext()
        if not request.floating:
            calibration = opened.images("train", None, at_most=request.calibration_images)
            images = [x for x, _ in opened.stream(calibration, "calibration")]
            samples = _samples(opened, plan, images)
            sites = plan.sites if plan is not None else _uniform(opened, widths, request.layout, samples)
            running = _quantized(opened, sites, samples, images, request)
        with running:
            logits, labels = logits_of(opened.model, opened.stream(data, "evaluation"))
        kind = "float" if request.floating else "uniform" if plan is None else "planned"
        row = _row(kind, opened, sites, logits, labels)
        _keep(opened, row)
    say(_shown(opened.run.read_table("verify")), quiet=setup.quiet)
    say(f"the last row is new in {opened.run.path / 'verify.parquet'}", quiet=setup.quiet)


def parse_uniform(text: str) -> tuple[int, int]:
    """Weight and activation bits of `w3a4`."""
    match = re.fullmatch(r"w(\d{1,2})a(\d{1,2})", text)
    if match is None or not {int(match[1]), int(match[2])} <= set(ALLOWED_BIT_WIDTHS):
        raise InputError(f"--uniform {text!r} is not understood; write w4a4, with bit-widths 1 to 8 or 16.")
    return int(match[1]), int(match[2])


def read_plan(path: Path, opened: Opened) -> BitPlan:
    """The plan in a file, checked against the model: its sites must exist and have the planned axes."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the plan {path} cannot be read: {error}. Make one with `qvw plan`.") from error
    plan = BitPlan.from_json(text, source=str(path))
    if not plan.sites:
        raise InputError(f"{path} plans no site: nothing would be quantized. Use --float for the model as it is.")
    known = {info.site: info for info in opened.sites if info.quantizable}
    plan.check_sites(known)
    for planned in plan.sites:
        info = known[planned.site]
        axes = {"per_tensor": 1, "per_channel": info.channels, "per_head": info.heads}
        if not axes[planned.granularity]:
            raise InputError(
                f"{path} plans {planned.site} {planned.granularity}, but {opened.name} has no such axis there. "
                f"Plan it per_tensor, or plan again for this model."
            )
    theirs, ours = plan.model.weights_sha256, opened.record.weights_sha256
    if theirs not in (None, ours):
        warn(f"{path} was made for weights {str(theirs)[:12]}, these are {ours[:12]}: its bits may not suit them.")
    return plan


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


def _uniform(
    opened: Opened, widths: tuple[int, int] | None, layout: str, samples: Mapping[Site, ActivationSample]
) -> list[PlannedSite]:
    assert widths is not None
    bits = uniform_bits(cost_table(opened.sites), *widths, layout)
    planned = []
    for info in opened.sites:
        if info.site in bits:
            scheme = default_scheme(opened.model, info, bits[info.site], sample=samples.get(info.site))
            planned.append(PlannedSite.of(info.site, scheme))
    return planned


@contextmanager
def _quantized(
    opened: Opened,
    sites: Sequence[PlannedSite],
    samples: Mapping[Site, ActivationSample],
    images: Sequence[Tensor],
    request: EvalRequest,
) -> Iterator[None]:
    """A context in which the model runs with these sites quantized."""
    model = opened.model
    infos = {info.site: info for info in opened.sites}
    quantizers = {}
    for planned in sites:
        scheme = QuantScheme(
            bit_width=planned.bit_width, signed=planned.signed, offset=planned.offset, granularity=planned.granularity
        )
        quantizers[planned.site] = make_quantizer(
            model, infos[planned.site], scheme, sample=samples.get(planned.site), estimator=request.estimator
        )
    anew = request.batchnorm == "re-estimate" and bool(batchnorms(model))
    with (
        quantized(model, opened.trace, infos, quantizers),
        batchnorm_reestimated(model, images) if anew else nullcontext(),
    ):
        yield


def _row(kind: str, opened: Opened, sites: Sequence[PlannedSite], logits: Tensor, labels: Tensor) -> dict[str, Any]:
    per_image = scores(logits, labels)
    loss, loss_se = mean_and_error(per_image.loss)
    top1, top1_se = mean_and_error(per_image.hit)
    totals = accounting.totals(sites, cost_table(opened.sites), opened.record.parameters)
    floating = float(accounting.FLOAT_BITS)
    return {
        "plan": kind,
        "weight_bits": floating if totals.weight_bits is None else totals.weight_bits,
        "activation_bits": floating if totals.activation_bits is None else totals.activation_bits,
        "size_bytes": totals.size_bytes,
        "bitops": totals.bitops,
        "loss": loss,
        "loss_se": loss_se,
        "top1": top1,
        "top1_se": top1_se,
        "images": len(labels),
    }


def _shown(rows: pd.DataFrame) -> str:
    """The rows in the units of a reader: MiB, GBitOps, percent."""
    shown = rows[["plan", "weight_bits", "activation_bits"]].assign(
        size_mib=rows["size_bytes"] / 2**20,
        gbitops=rows["bitops"] / 1e9,
        loss=rows["loss"],
        loss_se=rows["loss_se"],
        top1_percent=100 * rows["top1"],
        top1_se=100 * rows["top1_se"],
        images=rows["images"],
    )
    return as_text(shown)


def _keep(opened: Opened, row: Mapping[str, Any]) -> None:
    """Add a row to verify.parquet; a row of the same plan and cost takes the place of the older one."""
    path = opened.run.path / "verify.parquet"
    rows = opened.run.read_table("verify", VERIFY_COLUMNS).to_dict("records") if path.exists() else []
    same = ("plan", "weight_bits", "activation_bits", "size_bytes", "bitops")
    kept = [old for old in rows if any(old[name] != row[name] for name in same)]
    if len(kept) < len(rows):
        warn(f"the row takes the place of an earlier one of the same plan in {path}.")
    opened.run.write_table("verify", pd.DataFrame([*kept, row], columns=list(VERIFY_COLUMNS)))
