"""`qvw plan`: from the measured sensitivity of a run folder to its plan.json."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from analysis.cost import COST_COLUMNS
from analysis.figures.panels import bits_figure, save_figure
from analysis.figures.pareto_plots import pareto_figure
from analysis.planner import read_options
from analysis.planning import accounting
from analysis.planning.budget_kinds import budget_words
from analysis.planning.frontier import ON_REQUEST, pareto_front, uniform_points
from analysis.planning.interactions import FEW_IMAGES
from analysis.planning.objectives import Products, read_csv, scored, site_products
from analysis.planning.plan_assembly import Planned, planned
from analysis.planning.plan_csv import plan_frame
from analysis.planning.plan_request import PlanRequest
from analysis.planning.user_tables import LATENCY_COLUMNS
from analysis.proxies import PROXY_IMAGE_COLUMNS
from analysis.runs import Run
from analysis.sensitivity import SENSITIVITY_COLUMNS, preferred_rows
from analysis.session.setup import Setup
from analysis.steps.plan_files import PlanFiles, checked_files
from analysis.steps.plan_messages import knee_words, loose_budgets, plan_words, rising_scores, unspent_budgets
from analysis.steps.verify_step import interactions_help, other_plans, run_verify
from analysis.storage.files import write_bytes
from analysis.storage.run_record import typed_command
from analysis.storage.stored_file import read_stored
from analysis.terminal.console import progress, say, warn
from quant.bit_plan import BitPlan, PlanModel
from quant.errors import InputError
from quant.site import Site

CURVES, POINTS = 4, 17  # of the Pareto front: kinds of budget (and those of ON_REQUEST that are set), budgets of each
FRONT_SECONDS = 10.0  # for each plan of it; where that is not enough its status says so


def run_plan(path: Path, request: PlanRequest) -> None:
    """Plan bits for the sites of a run's sensitivity.parquet and write the plan file with its figure."""
    files = checked_files(path, request)
    run = files.run
    table, cost = run.read_table("sensitivity", SENSITIVITY_COLUMNS), run.read_table("cost", COST_COLUMNS)
    model = run.record.model
    assert model is not None
    stored = read_stored(run.path, model.parameters)
    rows = preferred_rows(table)
    scores = scored(run, rows, request.minimised, robust=request.robust, scores=request.scores)
    latency = None if request.latency is None else read_csv(request.latency, LATENCY_COLUMNS)
    products: Products | None = None

    def of_run(options: pd.DataFrame) -> Products:
        nonlocal products
        products = site_products(run, options)
        if products and len(next(iter(products.values()))) < FEW_IMAGES:
            warn(
                f"interactions from fewer than {FEW_IMAGES} images are mostly noise: `qvw sensitivity --proxies "
                "--images`."
            )
        return products

    def make(request: PlanRequest) -> Planned:
        return planned(
            scores, rows, cost, request, stored=stored, latency=latency,
            model=PlanModel(name=model.typed, kwargs=dict(model.kwargs), weights_sha256=model.weights_sha256),
            products=of_run if request.interactions else None,
        )  # fmt: skip

    made = make(request)
    swept = run.record.steps.get("sensitivity")
    setup = Setup(
        run=path, images=request.images, batch_size=request.batch_size, num_workers=request.num_workers,
        device=request.device, task=request.task, overwrite=True, quiet=request.quiet,
        skip_broken=swept is not None and bool(swept.inputs.get("skip_broken")),
    )  # fmt: skip
    if request.interactions is None and request.verify and _may_interact(run, rows, request):
        made, request = _with_or_without(setup, made, make, rows, request)
        products = products if request.interactions else None
    plan, solution, options, ties = made.plan, made.solution, made.options, made.ties
    budget = plan.budget
    inputs = {
        "weights_sha256": model.weights_sha256,
        "sensitivity_sha256": hashlib.sha256((path / "sensitivity.parquet").read_bytes()).hexdigest(),
    }
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(request).items()}
    with run.start_step(
        files.name, command=typed_command(), options=asked, inputs=inputs, seed=0, device="cpu",
        files=files.files, renew=True,
    ):  # fmt: skip
        json_file, csv_file, *_ = files.beside
        write_bytes(json_file, plan.to_json().encode())
        write_bytes(csv_file, plan_frame(plan, cost).to_csv(index=False).encode())
        frame = pd.DataFrame([{"module": s.module, "tensor": s.tensor, "bit_width": s.bit_width} for s in plan.sites])
        chart = bits_figure(bits_frame(frame, cost), model.name, budget=budget_words(budget))
        save_figure(chart, files.out.with_suffix(""))
        front = _front(files, plan, options, cost, stored, ties, latency, request.quiet) if request.pareto else ""
    rising = rising_scores(options, str(plan.solver.objective))
    if rising:
        warn(rising)
    say(plan_words(plan, solution, options, search=bool(request.interactions)), quiet=request.quiet)
    if front:
        say(front, quiet=request.quiet)
    _tell_loose_budgets(plan, options, cost, latency, request, stored)
    say(f"plan of {len(plan.sites)} sites in {files.out}, as a table and a chart in {files.out.stem}.csv and .png",
        quiet=request.quiet)  # fmt: skip
    verification = files.in_run("verification.parquet")
    if not request.verify and (run.path / verification).exists():
        verified = run.read_table(verification.removesuffix(".parquet"), ("plan_sha256",))["plan_sha256"]
        if plan.sha256 not in set(verified):
            warn(f"{run.path / verification} is of an earlier plan; --verify makes it again.")
    if request.verify:  # afterwards, for the plan is to be there whatever becomes of the images
        others = other_plans(
            plan, options, cost, stored=stored, ties=ties, latency=latency,
            interactions=bool(request.interactions), any_width=request.offers_any_width,
        )  # fmt: skip
        say(run_verify(setup, plan, others, rows, products, files=files), quiet=request.quiet)


def _may_interact(run: Run, rows: pd.DataFrame, request: PlanRequest) -> bool:
    """Whether interactions could count: products of enough images, a divergence to add to, BatchNorm as stored."""
    if not (run.path / "proxy_images.parquet").exists() or request.pareto or request.scores is not None:
        return False
    if request.minimised not in ("divergence", "kl") or (rows["batchnorm"] == "re_estimated").any():
        return False
    products = run.read_table("proxy_images", PROXY_IMAGE_COLUMNS)["products"]
    return bool(len(products)) and min(map(len, products)) >= FEW_IMAGES


def _with_or_without(
    setup: Setup, alone: Planned, make: Callable[[PlanRequest], Planned], rows: pd.DataFrame, request: PlanRequest
) -> tuple[Planned, PlanRequest]:
    """The plan with interactions where it measurably costs less than that of the sum, and the request that made it."""
    asked = replace(request, interactions=True)
    try:
        pairs = make(asked)
    except InputError as error:  # products of some option are missing, or there are too many options
        say(f"interactions are left out: {error}", quiet=request.quiet)
        return alone, replace(request, interactions=False)
    if pairs.plan.bits == alone.plan.bits:
        return alone, replace(request, interactions=False)
    helps, words = interactions_help(setup, alone.plan, pairs.plan, rows)
    say(words, quiet=request.quiet)
    return (pairs, asked) if helps else (alone, replace(request, interactions=False))


def _front(
    files: PlanFiles,
    plan: BitPlan,
    options: pd.DataFrame,
    cost: pd.DataFrame,
    stored: accounting.Stored,
    ties: Sequence[Sequence[Site]],
    latency: pd.DataFrame | None,
    quiet: bool,
) -> str:
    """Write the Pareto front and its figure; returns the knee of each curve in words."""
    run = files.run
    assert run.record.model is not None
    name = run.record.model.name
    curves = CURVES + sum(getattr(plan.budget, kind) is not None for kind in ON_REQUEST)
    with progress(curves * POINTS, "pareto", "plan", quiet=quiet) as bar:
        front = pareto_front(
            options, cost, stored=stored, budget=plan.budget, ties=ties, latency=latency, points=POINTS,
            time_limit=FRONT_SECONDS, solved=bar.update,
        )  # fmt: skip
    crosses = uniform_points(options, cost, stored=stored, budget=plan.budget, ties=ties, latency=latency)
    run.write_table(files.in_run("pareto"), front.assign(plan_sha256=plan.sha256))
    run.write_table(files.in_run("pareto_uniform"), crosses)
    objective = plan.solver.objective or ""
    figure = pareto_figure(front, name, uniform=crosses, objective=objective, budget=plan.budget)
    save_figure(figure, run.path / files.in_run("pareto"))
    return knee_words(front, objective)


def _tell_loose_budgets(
    plan: BitPlan,
    options: pd.DataFrame,
    cost: pd.DataFrame,
    latency: pd.DataFrame | None,
    request: PlanRequest,
    stored: accounting.Stored,
) -> None:
    """Warn of a budget that even the most bits keep: a slip of the unit, or a wish that nothing fulfils."""
    if request.like is not None:  # its means are those of uniform bits, which may well be the most
        for line in unspent_budgets(plan):
            say(line, quiet=request.quiet)
        return
    most_expensive = [by_bits[max(by_bits)] for by_bits in read_options(options, cost)[0].values()]
    loose = loose_budgets(plan, most_expensive, accounting.totals(most_expensive, cost, stored, latency))
    for line in loose:
        warn(line)
    for line in () if loose else unspent_budgets(plan):
        say(line, quiet=request.quiet)


def bits_frame(plan_sites: pd.DataFrame, stats: pd.DataFrame) -> pd.DataFrame:
    """The sites of a plan in network order: module, tensor, bit_width, kind, order.

    `plan_sites` has module, tensor and bit_width; kind and order come from `stats`.
    """
    known = stats[["module", "tensor", "kind", "order"]]
    joined = plan_sites[["module", "tensor", "bit_width"]].merge(known, on=["module", "tensor"], how="left")
    return joined.sort_values("order", kind="stable", ignore_index=True)
