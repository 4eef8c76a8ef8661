"""What measurements return: frozen results with a tidy table, a figure, and a view in a notebook."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd

from quant.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analysis.statistics.variation_frames import Measured
    from quant.network import Network

_HEAD = 8


class _Shown:
    """A result whose notebook view is the head of its table."""

    table: pd.DataFrame

    def _repr_html_(self) -> str:
        rows, columns = self.table.shape
        shown = self.table.dropna(axis=1, how="all").head(_HEAD)
        return f"<p>{type(self).__name__}: {rows:,} rows, {columns} columns</p>{shown.to_html(index=False, na_rep='')}"


@dataclass(frozen=True, kw_only=True, repr=False)
class Stats(_Shown):
    """Statistics of every tensor of a network.

    `table` has one row per tensor (columns of stats.parquet), `channels` one per channel or head, `histograms` one per
    bin; rows in network order. Units are those of the tensors.
    """

    name: str
    table: pd.DataFrame
    channels: pd.DataFrame
    histograms: pd.DataFrame

    def measured(self, name: str | None = None) -> "Measured":
        """The tables as comparisons read them, under another name where one is given."""
        from analysis.statistics.variation_frames import Measured

        channels, histograms = (None if frame.empty else frame for frame in (self.channels, self.histograms))
        return Measured(name=name or self.name, stats=self.table, channels=channels, histograms=histograms)

    def plot(self) -> "Figure":
        """Quantile bands of weights, inputs and attention tensors, in network order."""
        from analysis.figures.panels import distribution_figure

        return distribution_figure(self.table, self.name)

    def __repr__(self) -> str:
        return f"Stats({self.name}: {len(self.table)} tensors)"


@dataclass(frozen=True, kw_only=True, repr=False)
class Sensitivity(_Shown):
    """What the output loses when one site is quantized and all else stays in floating point.

    `table` has one row per site (or group), bit-width and treatment (columns of sensitivity.parquet); `per_sample` has
    the divergence and the change of the loss of each sample, as lists. `products`, of an estimate, are gradient times
    error of each sample, from which a plan counts how the errors of two sites act together.
    """

    name: str
    table: pd.DataFrame
    per_sample: pd.DataFrame
    products: pd.DataFrame | None = field(default=None, compare=False)
    network: "Network | None" = field(default=None, compare=False)

    def plot(self) -> "Figure":
        """Heatmap of the divergence, one row per site and one column per bit-width."""
        from analysis.figures.panels import sensitivity_figure
        from analysis.sensitivity import preferred_rows

        rows = preferred_rows(self.table)
        if rows.empty:
            raise InputError("the table has no rows of single sites; plot groups with plot_groups(table).")
        return sensitivity_figure(rows, self.name, value="divergence")

    def top(self, count: int = 10, *, bits: int | None = None) -> pd.DataFrame:
        """The `count` rows of single sites with the largest divergence, at one bit-width (default: the fewest)."""
        from analysis.sensitivity import preferred_rows

        rows = preferred_rows(self.table)
        measured = sorted(set(rows["bit_width"]))
        if not measured:
            raise InputError("the table has no rows of single sites; measure some without `groups`.")
        if bits is not None and bits not in measured:
            raise InputError(f"{bits} bits were not measured; choose from {measured}.")
        return rows[rows["bit_width"] == (bits or measured[0])].nlargest(count, "divergence")

    def __repr__(self) -> str:
        sites = len(self.table[["module", "tensor", "group"]].drop_duplicates())
        return f"Sensitivity({self.name}: {sites} sites or groups, {len(self.table)} rows)"


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(_Shown):
    """Several networks side by side.

    `table` has one row per measure and one column per network; `tests` one row per tensor role and pair of networks,
    with the p-values of tests for equal spread. `stats` are the results compared.
    """

    table: pd.DataFrame
    tests: pd.DataFrame
    stats: Mapping[str, Stats]

    def plot(self) -> "Figure":
        """Kurtosis and channel range of each layer over depth, one line per network."""
        from analysis.figures.panels import depth_figure
        from analysis.statistics.variation_frames import depth_frame

        measured = [stats.measured(name) for name, stats in self.stats.items()]
        tensor = "input" if not depth_frame(measured, tensor="input").empty else "weight"
        return depth_figure(depth_frame(measured, tensor=tensor), tensor, list(self.stats))

    def __repr__(self) -> str:
        return f"Comparison({', '.join(self.stats)})"


@dataclass(frozen=True, kw_only=True, repr=False)
class ParetoFront(_Shown):
    """The best plan for each budget.

    `table` has one row per budget (columns of pareto.parquet), `uniform` one per uniform bit-width.
    """

    name: str
    table: pd.DataFrame
    uniform: pd.DataFrame
    objective: str = "divergence"

    def plot(self) -> "Figure":
        """Predicted divergence over the budget, beside uniform bits."""
        from analysis.figures.pareto_plots import pareto_figure

        return pareto_figure(self.table, self.name, uniform=self.uniform, objective=self.objective)

    def __repr__(self) -> str:
        return f"ParetoFront({self.name}: {len(self.table)} plans)"
