"""Tidy frames of oscillating weights, of one training: shares over steps by kind and module, places in the bins."""

from collections.abc import Sequence

import pandas as pd

from quant.oscillation import POSITIONS

ALL = "all"
"""The name that stands for all tracked weights beside the kinds."""
_SHARES = ["oscillating", "oscillating_ema"]


def shares(oscillation: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """The shares over all weights of each group, so that a large tensor counts more: `by`, weights, and the shares.

    `oscillation` has rows of oscillation.parquet, whose shares are of one tensor; groups come in their order there.
    """
    counts = oscillation[_SHARES].mul(oscillation["weights"], axis=0).assign(weights=oscillation["weights"])
    totals = counts.groupby([oscillation[name] for name in by], sort=False).sum(min_count=1)
    return totals[["weights"]].join(totals[_SHARES].div(totals["weights"], axis=0)).reset_index()


def kind_shares(oscillation: pd.DataFrame, bins: pd.DataFrame) -> pd.DataFrame:
    """Shares over steps of all weights (kind `ALL`) and of each kind: step, kind, weights, and the shares.

    `bins` has rows of bins.parquet, which know the kind of each site; sites that are not there count among all alone.
    """
    kinds = bins[["module", "tensor", "kind"]].drop_duplicates()
    by_kind = shares(oscillation.merge(kinds, on=["module", "tensor"]), ["step", "kind"])
    return pd.concat([shares(oscillation, ["step"]).assign(kind=ALL), by_kind], ignore_index=True)


def module_shares(oscillation: pd.DataFrame) -> pd.DataFrame:
    """Shares over steps of each module, the parts of a fused weight together: step, module, weights, and the shares.

    Modules in network order. At step 0 nothing has moved yet: that step is left out.
    """
    return shares(oscillation[oscillation["step"] > 0], ["module", "step"])


def edge_densities(bins: pd.DataFrame) -> pd.DataFrame:
    """How dense the weights of all sites lie around the edges of their bins: step, position, density.

    `position` is the distance from the nearest edge in steps of the quantizer; density 1 everywhere is an even spread.
    Steps at which no weight lay inside its range are left out.
    """
    counts = bins.groupby(["step", "position"])["weights"].sum()
    totals = counts.groupby("step").transform("sum")
    return (POSITIONS * counts / totals)[totals > 0].rename("density").reset_index()
