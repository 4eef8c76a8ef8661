"""The tables of a report about a plan: its costs and proof, the bits of each kind of layer, and those of each site."""

from dataclasses import asdict

import pandas as pd

from analysis.page.cells import DASH, Cell, Table, number, plain, text
from analysis.page.content import RunContent
from analysis.planning.budget_kinds import BUDGET_KINDS
from analysis.plots import TENSOR_CLASSES


def certificate(content: RunContent) -> Table | None:
    """What the plan costs against its budget, and what its solver proved."""
    plan = content.plan
    if plan is None:
        return None
    totals, budget = asdict(plan.totals), plan.budget.as_dict()
    rows = [
        (
            text(kind.label),
            number(None if totals[name] is None else totals[name] / kind.unit, "{:.4f}"),
            number(budget[name] / kind.unit if name in budget else None, "{:g}"),
        )
        for name, kind in BUDGET_KINDS.items()
        if totals[name] is not None or name in ("weight_bits", "activation_bits")
    ]
    solver = plan.solver
    for label, value in (
        ("sum of measured loss increases (nats)", plan.predicted_delta_loss),
        ("lower bound of the objective", solver.lower_bound),
        ("gap", solver.gap),
    ):
        rows.append((text(label), number(value, "{:.4g}"), number(None, "")))
    words = {"objective": plain(solver.objective), "solver, status": f"{solver.name}, {solver.status}"}
    for label, word in (words | {"layout": plan.layout}).items():
        rows.append((text(label), Cell(text=word, number=True), number(None, "")))
    caption = f"{content.name}: certificate of the plan"
    return Table(caption=caption, columns=("figure", "plan", "budget"), rows=tuple(rows), mixed=True)


def planned_sites(content: RunContent) -> Table | None:
    """One row per planned site."""
    if content.plan is None:
        return None
    rows = [
        (
            number(order, "{:.0f}"), text(s.module), text(s.tensor), number(s.bit_width, "{:.0f}"),
            text(s.granularity), text("signed" if s.signed else "unsigned"), text("yes" if s.offset else "no"),
        )
        for order, s in enumerate(content.plan.sites, start=1)
    ]  # fmt: skip
    columns = ("order", "module", "tensor", "bits", "granularity", "range", "offset")
    return Table(caption=f"{content.name}: {len(rows)} planned sites", columns=columns, rows=tuple(rows))


def bits_by_kind(content: RunContent) -> Table | None:
    """Mean bits of the sites of each kind of layer, a column a sort of tensor, with the least and the most of them.

    None where no table of the run tells of what kind a site is.
    """
    known = content.sensitivity if content.sensitivity is not None else content.stats
    if content.plan is None or known is None:
        return None
    sites = pd.DataFrame([{"module": s.module, "tensor": s.tensor, "bits": s.bit_width} for s in content.plan.sites])
    kinds = known[["module", "tensor", "kind"]].drop_duplicates(["module", "tensor"])
    sites = sites.merge(kinds, on=["module", "tensor"])
    sites["sort"] = sites["tensor"].map({tensor: sort for sort, all_of in TENSOR_CLASSES.items() for tensor in all_of})
    sorts = [sort for sort in TENSOR_CLASSES if (sites["sort"] == sort).any()]
    rows = [
        (
            text(kind),
            *(_mean_of(of_kind.loc[of_kind["sort"] == sort, "bits"]) for sort in sorts),
            number(len(of_kind), "{:.0f}"),
        )
        for kind, of_kind in sites.groupby("kind", sort=False)
    ]
    caption = f"{content.name}: bits of the plan by kind of layer, mean of the sites (least to most)"
    return Table(caption=caption, columns=("kind", *sorts, "sites"), rows=tuple(rows)) if rows else None


def _mean_of(bits: pd.Series) -> Cell:
    """The mean of several bit-widths, and between which they lie where they differ."""
    if bits.empty:
        return Cell(text=DASH, number=True)
    low, mean, high = bits.min(), float(bits.mean()), bits.max()
    return Cell(text=f"{mean:.2f} ({low} to {high})" if low < high else f"{low}", key=mean, number=True)
