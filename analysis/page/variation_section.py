"""The tables of a report about variation: how much the modules of a network differ, and whether one's differ more."""

from collections.abc import Sequence

from analysis.page.cells import Table, number, text
from analysis.page.content import RunContent
from analysis.statistics import comparison
from analysis.statistics.variation_frames import Measured
from analysis.statistics.variation_tests import differences
from analysis.variation import variation


def variation_table(contents: Sequence[RunContent]) -> Table | None:
    """A row a measure of how a network's modules differ, a column a run; from two runs on with a reading."""
    tables = [Measured(name=c.name, stats=c.stats) for c in contents if c.stats is not None]
    runs = [comparison.Compared(each, variation(each.stats)) for each in tables]
    if not runs:
        return None
    names = tuple(each.name for each in tables)
    rows = []
    for row in comparison.compare(runs).to_dict("records"):
        what = "weights" if row["tensor"] == "weight" else "input activations"
        label = comparison.MEASURES[str(row["measure"])].format(tensor=what).rstrip(",")
        values = tuple(number(row[name], "{:.4g}") for name in names)
        rows.append((text(label), *values, *([text(row["reading"])] if len(runs) > 1 else [])))
    columns = ("measure", *names, *(["reading"] if len(runs) > 1 else []))
    return Table(caption="How much the modules of a network differ", columns=columns, rows=tuple(rows), mixed=True)


def differences_table(contents: Sequence[RunContent]) -> Table | None:
    """A row for weights and one for inputs of each pair of runs: whether the modules of one vary more."""
    runs = [(c.name, c.stats) for c in contents if c.stats is not None]
    if len(runs) < 2:
        return None
    rows = []
    for row in differences(runs).to_dict("records"):
        low, high = (number(row[f"cv_difference_{end}"], "{:.3g}").text for end in ("low", "high"))
        rows.append(
            (text("weights" if row["tensor"] == "weight" else "inputs"), text(f"{row['run_a']} - {row['run_b']}"),
             number(row["cv_difference"], "{:.3g}"), text(f"{low} to {high}"), number(row["p_value"], "{:.2g}"),
             text(row["reading"]))
        )  # fmt: skip
    columns = ("tensor", "runs", "difference of cv", "95 % interval", "Brown-Forsythe p", "reading")
    return Table(caption="Do the modules of one network vary more?", columns=columns, rows=tuple(rows))
