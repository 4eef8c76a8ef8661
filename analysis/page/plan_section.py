"""What a report says of a plan's Pareto front and of its verification: sentences, tables, definitions."""

import math
import re
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.page.cells import DASH, Cell, Table, measured, number, text
from analysis.page.content import RunContent, belongs
from analysis.planning.budget_kinds import BUDGET_KINDS, amount
from analysis.planning.frontier import ON_REQUEST, TOTALS, knee
from analysis.planning.significance import listed, plan_names, prediction_bias, reading, verdict
from analysis.plots import LABELS

MOST_ROWS = 20  # of the table of a curve
FRONT = (
    ("Pareto front", "For each budget the plan with the least predicted change, all other budgets of the plan kept: no "
                     "plan of less cost predicts less. The prediction adds up what the sites cost alone."),
    ("knee", "The point farthest below the straight line between the ends of a curve, cost and change both on linear "
             "axes scaled to 0..1; before it the next unit of budget saves more than the average one of the curve, "
             "after it less. It belongs to the bit-widths that were offered."),
    ("shadow price", "What the next unit of a budget saves: the fall of the predicted change to the next row over the "
                     "difference of the two budgets. 0 at the last row, where more budget buys nothing."),
    ("uniform bits", "The crosses of the figure: one bit-width for all tensors that the budget counts, pinned ones "
                     "aside, the others planned within the other budgets."),
    ("gap", "How far a row's plan can be from the best one, relative to its predicted change."),
)  # fmt: skip
VERIFICATION = (
    ("planned", "The plan of the section above: the integer program's choice."),
    ("uniform", "The largest uniform bits within the budget; they may cost less than it allows. Where the sweep lacks "
                "them there is no prediction."),
    ("greedy, worst-first, random", "From the most bits everywhere one step down at a time until the budget is kept: "
                                    "that which costs least for what it saves, that which costs most, any."),
    ("planned ahead", "Top-1 of the plan minus that of the other, ± one standard error of the difference over the same "
                      "images; not significantly different is a plan within two of them. It can be sure where the "
                      "intervals of the two accuracies overlap, for both see the same images."),
    ("predicted KL, measured KL", "The sum of what each site's bits change alone, and what the whole plan changes, on "
                                  "the images of the sweep; a plan above the line of equality suffers from changes "
                                  "that add up to more than their sum."),
    ("KL above the plan's", "The measured KL minus that of the plan, ± one standard error of the difference."),
)  # fmt: skip


def other_plan(content: RunContent, table: pd.DataFrame | None, what: str, option: str) -> tuple[str, ...]:
    """A sentence where a table is of another plan than plan.json; `option` of `qvw plan` makes it."""
    if table is None or "plan_sha256" not in table or belongs(content, table):
        return ()
    now = "which was written elsewhere" if content.plan is None else "not of plan.json as it is now"
    return (f"The {what} is of another plan, {now}: repeat `qvw plan` with `{option}`.",)


def front_sentences(content: RunContent) -> tuple[str, ...]:
    """Where the knees are, and what more budget saves."""
    if content.front is None:
        return ()
    unit = _unit(objective(content))
    knees = knee(content.front).to_dict("records")
    places = [amount(row["budget_kind"], row["budget"]) for row in knees]
    sentences = [
        f"Knee of each curve, beyond which the next unit saves less than the average one: {listed(places)}."
        if places else "No curve has a knee: more budget saves at an even pace, or nothing."
    ]  # fmt: skip
    priced, where = _at_plan(content), "At the plan's budget"
    if not priced:
        priced, where = knees, "At the knee"
    prices = [f"{row['shadow_price'] * kind.unit:.3g} {unit} {kind.next_unit}".replace("  ", " ")
              for row in priced for kind in [BUDGET_KINDS[row["budget_kind"]]]]  # fmt: skip
    if prices:
        sentences.append(f"{where} the next unit saves (shadow price): {listed(prices)}.")
    return tuple(sentences)


def front_tables(content: RunContent) -> tuple[Table, ...]:
    """A table for each kind of budget, of at most `MOST_ROWS` rows, and those of the knee and the plan."""
    if content.front is None:
        return ()
    return tuple(
        _curve_table(content, str(kind), curve) for kind, curve in content.front.groupby("budget_kind", sort=False)
    )


def _curve_table(content: RunContent, kind: str, curve: pd.DataFrame) -> Table:
    marks: dict[Hashable, list[str]] = {index: ["knee"] for index in knee(curve).index}
    for row in _at_plan(content):
        if row["budget_kind"] == kind:
            marks.setdefault(row["index"], []).append("plan")
    even = curve.index[np.unique(np.linspace(0, len(curve) - 1, MOST_ROWS).round().astype(int))]
    rows = curve.loc[sorted({*even, *marks})]
    shown = BUDGET_KINDS[kind]
    label, unit = shown.label, shown.unit
    costs = {cost: BUDGET_KINDS[cost] for cost in (*TOTALS, *ON_REQUEST) if cost in rows and rows[cost].notna().any()}
    what = objective(content)
    price = f"shadow price ({_unit(what)} {shown.next_unit})".replace("( ", "(")
    cells = [
        {f"budget: {label}": number(row["budget"] / unit, _style(rows["budget"] / unit))}
        | {cost.label: number(row[c] / cost.unit, _style(rows[c] / cost.unit)) for c, cost in costs.items()}
        | {
            f"predicted {what}": number(row["objective"], "{:#.4g}"),
            price: number(row["shadow_price"] * unit, "{:#.3g}"),
            "gap": number(row["gap"], "{:.1g}"),
            "point": text(",\N{NO-BREAK SPACE}".join(marks.get(index, []))),
        }
        for index, row in rows.to_dict("index").items()
    ]
    some = f"{len(rows)} of {len(curve)}" if len(rows) < len(curve) else f"{len(rows)}"
    caption = f"{content.name}: the best plans for {some} budgets of {label}"
    return Table(caption=caption, columns=tuple(cells[0]), rows=tuple(tuple(row.values()) for row in cells))


def objective(content: RunContent) -> str:
    """What the front adds up, as `KL of the logits (nats)`; `change` where nothing tells."""
    if content.plan is None or not belongs(content, content.front):
        return "change"
    given = content.plan.solver.objective or "change"
    return LABELS.get(given, given)


def verification_sentences(content: RunContent) -> tuple[str, ...]:
    """The verdict by accuracy and by KL, how well the sum predicted, and on which images."""
    table = content.verification
    if table is None:
        return ()
    sentences = []
    others = table.assign(name=plan_names(table)).iloc[1:]
    for what, difference in (("top-1", "planned_ahead"), ("KL", "kl_excess")):
        if difference in others:
            sentences.append(verdict(what, others, difference))
    planned = table.iloc[0]
    ratio = planned["measured_kl"] / planned["predicted_kl"] if planned["predicted_kl"] > 0 else float("nan")
    if np.isfinite(ratio):
        sentences.append(
            f"The whole plan changes the answers {ratio:.2f} times as much as the sum over its sites predicts (KL "
            f"{planned['measured_kl']:.3g} ± {planned['measured_kl_se']:.2g} nats, predicted "
            f"{planned['predicted_kl']:.3g})."
        )
    sentences.append(prediction_bias(table))
    return (*filter(None, sentences), *_images(content))


def verification_table(content: RunContent) -> Table | None:
    """A row a plan: accuracy, paired difference and reading, changes predicted and measured, costs."""
    table = content.verification
    if table is None:
        return None
    cells: list[dict[str, Cell]] = []
    for name, row in zip(plan_names(table), table.to_dict("records"), strict=True):
        differences = {
            "planned ahead (points)": _difference(row["planned_ahead"], row["planned_ahead_se"], scale=100, digits=2),
            "the plan is": text(reading(row["planned_ahead"], row["planned_ahead_se"]) or DASH),
            "KL above the plan's (nats)": _difference(row.get("kl_excess"), row.get("kl_excess_se"), scale=1, digits=4),
        }
        if not cells:  # the plan itself
            differences = {column: replace(cell, text=DASH, key=None) for column, cell in differences.items()}
        cells.append(
            {
                "plan": text(name),
                "top-1 (%)": measured(row["top1"], row["top1_se"], scale=100, digits=2),
                **differences,
                "measured KL (nats)": measured(row["measured_kl"], row["measured_kl_se"], digits=4),
                "predicted KL (nats)": number(row["predicted_kl"], "{:.4f}"),
                "weight bits": number(row["weight_bits"], "{:.3f}"),
                "activation bits": number(row["activation_bits"], "{:.3f}"),
                "size (MiB)": number(row["size_bytes"] / 2**20, "{:.3f}"),
                "GBitOps": number(row["bitops"] / 1e9, "{:.3f}"),
                "measured loss increase (nats)": measured(
                    row["measured_delta_loss"], row["measured_delta_loss_se"], digits=4
                ),
                "predicted loss increase (nats)": number(row["predicted_delta_loss"], "{:.4f}"),
            }
        )
    caption = f"{content.name}: accuracy, change and cost of each plan"
    return Table(caption=caption, columns=tuple(cells[0]), rows=tuple(tuple(row.values()) for row in cells))


def _at_plan(content: RunContent) -> list[dict[Hashable, Any]]:
    """The rows of the front at the plan's own budgets, with `index`; none where the front is of another plan."""
    if content.front is None or content.plan is None or not belongs(content, content.front):
        return []
    front, rows = content.front.reset_index(), []
    for kind, limit in content.plan.budget.as_dict().items():
        within = front[(front["budget_kind"] == kind) & (front["budget"] <= limit)]
        rows += within.tail(1).to_dict("records")
    return rows


def _style(values: pd.Series) -> str:
    """A style of str.format with four digits of the largest value, so that the points stand below each other."""
    return f"{{:,.{max(0, 3 - math.floor(math.log10(max(values.max(), 1e-9))))}f}}"


def _unit(label: str) -> str:
    """What stands in brackets at the end of a label."""
    found = re.search(r"\((\w+)\)$", label)
    return found[1] if found else ""


def _difference(value: float | None, error: float | None, *, scale: float, digits: int) -> Cell:
    """A signed difference with its standard error."""
    cell = measured(value, error, scale=scale, digits=digits)
    sign = "+" if cell.key is not None and cell.key >= 0 else ""
    return replace(cell, text=(sign + cell.text).replace("-", "\N{MINUS SIGN}"))


def _images(content: RunContent) -> tuple[str, ...]:
    """On which images the verification was measured, where the run's record tells."""
    steps, data = content.record.steps, content.record.data.get("data", "the data")
    if "verify" not in steps or "sensitivity" not in steps:
        return ()
    seen, swept = steps["verify"].inputs, steps["sensitivity"].inputs
    return (
        f"Accuracy: {seen.get('images'):,} images, {seen.get('split')} of {data}. KL and loss increase: the "
        f"{swept.get('images'):,} images of the sweep ({swept.get('split')}). Quantized and calibrated, not trained.",
    )
