"""`qvw plan`: from the measured sensitivity of a run folder to its plan.json."""

import hashlib
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import TypeAdapter

from analysis.console import say
from analysis.cost import COST_COLUMNS
from analysis.files import write_bytes
from analysis.panels import bits_figure, figure_files, save_figure
from analysis.plan_options import apply_pins, isotonic, layout_pins, tied_sites
from analysis.planner import PlanSolution, plan_bits
from analysis.runs import Run
from analysis.sensitivity import SENSITIVITY_COLUMNS, preferred_rows
from quant.bit_plan import BitPlan, PlanBudget, PlanModel, PlanSolver
from quant.choices import Layout
from quant.errors import InputError
from quant.site import Site

OBJECTIVES = {"kl": ("kl", 1), "loss": ("delta_loss", 1), "logit_nmse": ("logit_nmse", 1), "top1": ("delta_top1", -1)}
"""Column of sensitivity.parquet, and the sign that makes it something to minimise."""


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What is asked of a plan: budgets, candidates, objective, exceptions."""

    weight_bits: float | None = None
    activation_bits: float | None = None
    size_mib: float | None = None
    gbitops: float | None = None
    candidates: tuple[int, ...] | None = None
    objective: str = "kl"
    pin: tuple[str, ...] = ()
    tie: tuple[str, ...] = ()
    layout: Layout = "paper"
    out: Path | None = None
    quiet: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "PlanRequest":
        """The options of a command line, checked."""
        return TypeAdapter(cls).validate_python(dict(options))

    @property
    def budget(self) -> PlanBudget:
        """The budgets in the units of the plan file; at least one must be set."""
        for option, value, largest in (("--size-mib", self.size_mib, 2**40), ("--gbitops", self.gbitops, 1e12)):
            if value is not None and not 0 < value <= largest:
                raise InputError(f"{option} {value:g} is no budget; give a number above 0, {largest:g} at most.")
        budget = PlanBudget(
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
            size_bytes=None if self.size_mib is None else max(1, int(self.size_mib * 2**20)),
            bitops=None if self.gbitops is None else max(1, int(self.gbitops * 1e9)),
        )
        if not budget.as_dict():
            raise InputError("no budget was given; set --weight-bits, --activation-bits, --size-mib or --gbitops.")
        return budget


def run_plan(path: Path, request: PlanRequest) -> None:
    """Plan bits for the sites of a run's sensitivity.parquet and write the plan file with its figure."""
    run, budget = Run(path), request.budget
    table, cost = run.read_table("sensitivity", SENSITIVITY_COLUMNS), run.read_table("cost", COST_COLUMNS)
    model = run.record.model
    if model is None:
        raise InputError(f"{path}/run.json names no model; make the run with `qvw sensitivity`.")
    rows = preferred_rows(table)
    options = plan_options(rows, cost, request)
    ties = tied_sites(request.tie, [Site(m, t) for m, t in options[["module", "tensor"]].drop_duplicates().to_numpy()])
    solution = plan_bits(options, cost, budget=budget, parameters=model.parameters, ties=ties)
    column, _ = OBJECTIVES[request.objective]
    plan = BitPlan(
        model=PlanModel(name=model.typed, kwargs=dict(model.kwargs), weights_sha256=model.weights_sha256),
        layout=request.layout,
        budget=budget,
        sites=solution.sites,
        totals=solution.totals,
        predicted_delta_loss=_predicted_loss(solution, rows),
        solver=PlanSolver(
            name="highs",
            status=solution.status,
            gap=solution.gap,
            lower_bound=solution.lower_bound,
            objective=column,
        ),
    )
    out = path / "plan.json" if request.out is None else request.out
    inputs = {
        "weights_sha256": model.weights_sha256,
        "sensitivity_sha256": hashlib.sha256((path / "sensitivity.parquet").read_bytes()).hexdigest(),
    }
    planned = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(request).items()}
    with run.start_step(
        "plan", command=shlex.join(["qvw", *sys.argv[1:]]), options=planned, inputs=inputs, seed=0, device="cpu",
        files=("plan.json", *figure_files("plan")), renew=True,
    ):  # fmt: skip
        write_bytes(out, plan.to_json().encode())
        frame = pd.DataFrame([{"module": s.module, "tensor": s.tensor, "bit_width": s.bit_width} for s in plan.sites])
        save_figure(bits_figure(bits_frame(frame, cost), model.name), out.with_suffix(""))
    say(_summary(plan, solution, request), quiet=request.quiet)
    say(f"plan of {len(plan.sites)} sites in {out}", quiet=request.quiet)


def plan_options(rows: pd.DataFrame, cost: pd.DataFrame, request: PlanRequest) -> pd.DataFrame:
    """The options of the integer program: a score for each site and bit-width that the request allows.

    Scores are made non-increasing in bits by isotonic regression: measured changes are noisy, and bits that seem to
    hurt must not look like a reason to give fewer.
    """
    if request.objective not in OBJECTIVES:
        raise InputError(f"--objective {request.objective!r} is unknown; choose from {', '.join(OBJECTIVES)}.")
    column, sign = OBJECTIVES[request.objective]
    if rows[column].isna().all():
        raise InputError(f"{column} was not measured (images without labels?); use --objective kl.")
    options = isotonic(rows.assign(score=sign * rows[column]))
    pins = [_parse_pin(text) for text in request.pin]
    return apply_pins(options, pins, layout_pins(cost, request.layout), candidates=request.candidates)


def bits_frame(plan_sites: pd.DataFrame, stats: pd.DataFrame) -> pd.DataFrame:
    """The sites of a plan in network order: module, tensor, bit_width, kind, order.

    `plan_sites` has module, tensor and bit_width; kind and order come from `stats`.
    """
    known = stats[["module", "tensor", "kind", "order"]]
    joined = plan_sites[["module", "tensor", "bit_width"]].merge(known, on=["module", "tensor"], how="left")
    return joined.sort_values("order", kind="stable", ignore_index=True)


def _parse_pin(text: str) -> tuple[str, int]:
    pattern, _, bits = text.rpartition("=")
    if not pattern or not re.fullmatch(r"[0-9]{1,2}", bits):
        raise InputError(f"--pin {text!r} is not understood; write PATTERN=BITS, such as --pin 'head*=8'.")
    return pattern, int(bits)


def _predicted_loss(solution: PlanSolution, rows: pd.DataFrame) -> float | None:
    """Sum of the measured loss changes of the chosen bits; None where one of them was not measured."""
    measured = rows.set_index(["module", "tensor", "bit_width"])["delta_loss"]
    total = sum(float(measured[s.module, s.tensor, s.bit_width]) for s in solution.sites)
    return total if total == total else None


def _summary(plan: BitPlan, solution: PlanSolution, request: PlanRequest) -> str:
    totals = plan.totals
    figures = {
        "mean weight bits": (totals.weight_bits, plan.budget.weight_bits),
        "mean activation bits": (totals.activation_bits, plan.budget.activation_bits),
        "size (MiB)": (totals.size_bytes / 2**20, request.size_mib),
        "GBitOps": (totals.bitops / 1e9, request.gbitops),
    }
    lines = [
        f"  {name:22}{value:10.4f}" + ("" if limit is None else f"   budget {limit:g}")
        for name, (value, limit) in figures.items()
        if value is not None
    ]
    certificate = f"{solution.status}, gap {solution.gap:.2g}"
    title = f"sum of predicted changes of {request.objective}: {solution.objective:.4g} ({certificate})"
    if plan.predicted_delta_loss is not None and request.objective != "loss":
        title += f"; measured loss changes of these bits add up to {plan.predicted_delta_loss:.4g}"
    return "\n".join([title, *lines])
