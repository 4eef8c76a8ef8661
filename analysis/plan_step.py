"""`qvw plan`: from the measured sensitivity of a run folder to its plan.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import matplotlib.pyplot as plt
import pandas as pd
from pydantic import TypeAdapter

from analysis.comparison import bits_frame
from analysis.figures import save_figure
from analysis.files import write_bytes
from analysis.panels import bits_figure
from analysis.plan_options import apply_pins, isotonic, layout_pins, tied_sites
from analysis.planner import PlanSolution, plan_bits
from analysis.runs import Run
from analysis.steps import preferred_rows
from quant.bit_plan import BitPlan, PlanBudget, PlanModel, PlanSolver
from quant.errors import InputError
from quant.site import Site

OBJECTIVES = {"loss": "delta_loss"}


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
    layout: Literal["paper", "strict"] = "paper"
    out: Path | None = None
    quiet: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "PlanRequest":
        """The options of a command line, checked."""
        return TypeAdapter(cls).validate_python(dict(options))

    @property
    def budget(self) -> PlanBudget:
        """The budgets in the units of the plan file; at least one must be set."""
        budget = PlanBudget(
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
            size_bytes=None if self.size_mib is None else int(self.size_mib * 2**20),
            bitops=None if self.gbitops is None else int(self.gbitops * 1e9),
        )
        if not budget.as_dict():
            raise InputError("no budget was given; set --weight-bits, --activation-bits, --size-mib or --gbitops.")
        return budget


def run_plan(path: Path, request: PlanRequest) -> None:
    """Plan bits for the sites of a run's sensitivity.parquet and write the plan file with its figure."""
    run = Run(path)
    table, cost, model = run.read_table("sensitivity"), run.read_table("cost"), run.record.model
    if model is None:
        raise InputError(f"{path}/run.json names no model; make the run with `qvw sensitivity`.")
    options = plan_options(table, cost, request)
    ties = tied_sites(request.tie, [Site(m, t) for m, t in options[["module", "tensor"]].drop_duplicates().to_numpy()])
    solution = plan_bits(options, cost, budget=request.budget, parameters=model.parameters, ties=ties)
    plan = BitPlan(
        model=PlanModel(name=model.typed, kwargs=dict(model.kwargs), weights_sha256=model.weights_sha256),
        layout=request.layout,
        budget=request.budget,
        sites=solution.sites,
        totals=solution.totals,
        predicted_delta_loss=_predicted_loss(solution, table),
        solver=PlanSolver(
            name="highs",
            status=solution.status,
            gap=solution.gap,
            lower_bound=solution.lower_bound,
            objective=OBJECTIVES.get(request.objective, request.objective),
        ),
    )
    out = path / "plan.json" if request.out is None else request.out
    write_bytes(out, plan.to_json().encode())
    frame = pd.DataFrame([{"module": s.module, "tensor": s.tensor, "bit_width": s.bit_width} for s in plan.sites])
    figure = bits_figure(bits_frame(frame, cost), model.name)
    save_figure(figure, out.with_suffix(""), write_bytes)
    plt.close(figure)
    if not request.quiet:
        click.echo(_summary(plan, solution, request))
        click.echo(f"plan of {len(plan.sites)} sites in {out}")


def plan_options(table: pd.DataFrame, cost: pd.DataFrame, request: PlanRequest) -> pd.DataFrame:
    """The options of the integer program: a score for each site and bit-width that the request allows.

    Scores are made non-increasing in bits by isotonic regression: measured changes are noisy, and bits that seem to
    hurt must not look like a reason to give fewer.
    """
    column = OBJECTIVES.get(request.objective, request.objective)
    if column not in table or not pd.api.types.is_numeric_dtype(table[column]):
        numeric = [name for name in ("kl", "logit_nmse", "delta_top1") if name in table]
        raise InputError(f"--objective {request.objective!r} is no column of figures; try loss, {', '.join(numeric)}.")
    rows = preferred_rows(table)
    if rows[column].isna().all():
        raise InputError(f"{column} was not measured (images without labels?); use --objective kl.")
    options = isotonic(rows.assign(score=-rows[column] if column.startswith("delta_top1") else rows[column]))
    pins = [_parse_pin(text) for text in request.pin]
    return apply_pins(options, pins, layout_pins(cost, request.layout), candidates=request.candidates)


def _parse_pin(text: str) -> tuple[str, int]:
    pattern, _, bits = text.rpartition("=")
    if not pattern or not bits.isdigit():
        raise InputError(f"--pin {text!r} is not understood; write PATTERN=BITS, such as --pin 'head*=8'.")
    return pattern, int(bits)


def _predicted_loss(solution: PlanSolution, table: pd.DataFrame) -> float | None:
    """Sum of the measured loss changes of the chosen bits; None where one of them was not measured."""
    measured = preferred_rows(table).set_index(["module", "tensor", "bit_width"])["delta_loss"]
    total = sum(float(measured.get((s.module, s.tensor, s.bit_width), float("nan"))) for s in solution.sites)
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
    bound = f"{solution.status}, gap {solution.gap:.2g}"
    return "\n".join([f"predicted {request.objective} increase {solution.objective:.4g} ({bound})", *lines])
