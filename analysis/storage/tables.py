"""What each table of a run folder holds, for the check when it is read back: sorts, bounds, keys and laws.

The columns are those that the writers name (SENSITIVITY_COLUMNS, COST_COLUMNS, ...); a test keeps the two in step.
Bounds are wide: what was measured is never refused, only what no measurement can give.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import fields, replace

import pandas as pd

from analysis.storage.columns import HISTORY_COLUMNS
from analysis.storage.cost_rules import COST_RULES
from analysis.storage.table_checks import COUNTABLE, Column, Rule, Table
from quant.bit_plan import PlanBudget
from quant.choices import ALLOWED_BIT_WIDTHS, ESTIMATORS, GRANULARITIES, GROUPINGS, PROTOCOLS, PROXIES
from quant.loss_terms import TERMS
from quant.site import ATTENTION_TENSORS, PRODUCT, WEIGHT_TENSORS
from quant.sites import KINDS

QUANTIZABLE = (*WEIGHT_TENSORS, "input", *ATTENTION_TENSORS)
_CLASSES = "weight|input|query|key|value|attention"

_TEXT = Column(sort="text")
_FLAG = Column(sort="flag")
_COUNT = Column(sort="whole", least=0, most=COUNTABLE)
_NUMBER = Column(sort="number", missing="anywhere")
_SIZE = Column(sort="number", least=0, missing="anywhere")  # what cannot be negative
_SHARE = Column(sort="number", least=0, most=1, missing="anywhere")
_DIFFERENCE = Column(sort="number", least=-1, most=1, missing="anywhere")  # of two shares
_CORRELATION = Column(sort="number", least=-1, most=1, missing="anywhere")
_BITS = Column(sort="whole", allowed=ALLOWED_BIT_WIDTHS)
_MEAN_BITS = Column(sort="number", least=0, most=32)  # 32: floating point
_MODULE, _KIND = _TEXT, Column(sort="text", allowed=KINDS)
_SITE = {"module": _MODULE, "tensor": Column(sort="text", allowed=QUANTIZABLE)}
_GRANULARITY, _ESTIMATOR = Column(sort="text", allowed=GRANULARITIES), Column(sort="text", allowed=ESTIMATORS)
_BATCHNORM = Column(sort="text", allowed=("stored", "re_estimated", "none"))
_GROUP_GRANULARITY = Column(sort="text", allowed=(*GRANULARITIES, "default"))
_DIVERGENCE = Column(sort="number", least=-1e-6, missing="anywhere")  # 0, but for rounding of large logits

_SWEEP_ROW = {
    "module": _MODULE, "tensor": _TEXT, "group": _TEXT, "bit_width": _BITS,
    "protocol": Column(sort="text", allowed=PROTOCOLS), "granularity": _GROUP_GRANULARITY, "estimator": _ESTIMATOR,
    "batchnorm": _BATCHNORM,
}  # fmt: skip


def _of_one_site(table: pd.DataFrame) -> pd.Series:
    return table["group"] == ""


def _wrong_tensor(table: pd.DataFrame) -> pd.Series:
    classes = table["tensor"].str.fullmatch(rf"({_CLASSES})(\+({_CLASSES}))*")
    return ~table["tensor"].isin(QUANTIZABLE).where(_of_one_site(table), classes)


def _wrong_group(table: pd.DataFrame) -> pd.Series:
    named = table["group"].str.fullmatch(rf"all|({'|'.join(GROUPINGS)}):.*", flags=re.DOTALL)
    return ~_of_one_site(table) & (~named | (table["module"] != ""))


def _without_scheme(name: str) -> Rule:
    return Rule(
        column=name, needs=("group", name), expected="True or False for a row of one site",
        broken=lambda table: _of_one_site(table) & table[name].isna(),
    )  # fmt: skip


_SWEEP_RULES = (
    Rule(column="group", needs=("module", "group"), broken=_wrong_group,
         expected=f"nothing in a row of one site, and in one without module all, or {', '.join(GROUPINGS)}:NAME"),
    Rule(column="tensor", needs=("group", "tensor"), broken=_wrong_tensor,
         expected=f"one of {', '.join(QUANTIZABLE)}, of a group its classes with + between them"),
    Rule(column="granularity", needs=("group", "granularity"), expected=f"one of {', '.join(GRANULARITIES)}",
         broken=lambda table: _of_one_site(table) & (table["granularity"] == "default")),
)  # fmt: skip


def _measured(table: pd.DataFrame) -> pd.Series:
    """The rows of which a figure was measured: not those that a limit of time left out, and no estimates."""
    return (table["source"] == "measured") & (table["images"] > 0)


def _classified(table: pd.DataFrame) -> pd.Series:
    """Measured rows of classification, whose figures are all of the same labels; other tasks define their own."""
    return _measured(table) & (table["task"] == "classification")


def _together(name: str) -> Rule:
    """What these images cannot tell, without labels or an error of one image, is missing in all rows."""

    def broken(table: pd.DataFrame) -> pd.Series:
        rows = _classified(table)
        return rows & table[name].isna() & table.loc[rows, name].notna().any()

    return Rule(
        column=name, needs=("source", "images", "task", name), broken=broken,
        expected="a number, or none in any row of classification",
    )  # fmt: skip


_SWEEP_FIGURES = (
    Rule(column="divergence", needs=("source", "images", "divergence"), expected="a number in every row measured",
         broken=lambda table: _measured(table) & table["divergence"].isna()),
    Rule(column="kl", needs=("source", "images", "task", "kl"), expected="a number in every row of classification",
         broken=lambda table: _classified(table) & table["kl"].isna()),
    *map(_together, ("divergence_se", "loss", "delta_loss", "delta_loss_se", "score", "delta_score", "score_se",
                     "top1", "delta_top1", "top1_se", "kl_se")),
)  # fmt: skip


def _unequal_lengths(name: str) -> Rule:
    return Rule(
        column=name, needs=(name,), expected="as many values as in row 0, one an image",
        broken=lambda table: table[name].map(len) != table[name].map(len).head(1).max(),
    )  # fmt: skip


_COST = Table(
    columns={
        "module": _MODULE, "tensor": Column(sort="text", allowed=(*QUANTIZABLE, PRODUCT)), "numel": _COUNT,
        "elements_per_image": _SIZE, "macs": _COUNT, "edges": Column(sort="texts"),
        "channels": _COUNT, "heads": _COUNT, "kind": _KIND, "order": _COUNT, "quantizable": _FLAG, "pinned": _FLAG,
        "same_tensor": Column(sort="text", missing="anywhere", optional=True),
    },
    key=("module", "tensor"),
    rules=COST_RULES,
    filled=True,
)  # fmt: skip

_SENSITIVITY = Table(
    columns={
        **_SWEEP_ROW, "model": _TEXT, "kind": Column(sort="text", allowed=(*KINDS, "")), "order": _COUNT,
        "signed": Column(sort="flag", missing="anywhere"), "offset": Column(sort="flag", missing="anywhere"),
        "source": _TEXT, "task": _TEXT, "images": _COUNT, "divergence": _DIVERGENCE, "divergence_se": _SIZE,
        "loss": _NUMBER, "delta_loss": _NUMBER, "delta_loss_se": _SIZE,
        **dict.fromkeys(("score", "delta_score", "metric", "delta_metric"), _NUMBER),
        **dict.fromkeys(("score_se", "metric_se", "top1_se", "kl_se"), _SIZE), "top1": _SHARE,
        "delta_top1": _DIFFERENCE, "kl": _DIVERGENCE,
        "logit_nmse": Column(sort="number", least=0, most=math.inf, missing="anywhere"),
        # Infinite where nothing is lost: a tensor that lies on the grid.
        "sqnr_db": Column(sort="number", most=math.inf, missing="anywhere"),
        "sqnr_output_db": Column(sort="number", most=math.inf, missing="anywhere"),
        "rank_low": Column(sort="number", least=1, missing="anywhere"),
        "rank_high": Column(sort="number", least=1, missing="anywhere"), "note": _TEXT,
    },
    key=tuple(_SWEEP_ROW),
    rules=(
        *_SWEEP_RULES, _without_scheme("signed"), _without_scheme("offset"), *_SWEEP_FIGURES,
        Rule(column="rank_high", needs=("rank_low", "rank_high"), expected="rank_low or more",
             broken=lambda table: table["rank_high"] < table["rank_low"]),
    ),
    filled=True,
)  # fmt: skip

_STATS_FIGURES = ("mean", "min", "max", "q0001", "q001", "q01", "q50", "q99", "q999", "q9999")
_STATS_SIZES = ("std", "abs_mean", "abs_max_over_std", "channel_range_ratio", "channel_std_cv", "head_std_cv")
_STATS_SITE = {"module": _MODULE, "tensor": Column(sort="text", allowed=(*QUANTIZABLE, "output"))}
_SHAPELESS = Column(sort="number", most=math.inf, missing="anywhere")  # of a variance that float64 squares to 0
_STATS = Table(
    columns={
        "model": _TEXT, **_STATS_SITE, "kind": _KIND, "order": _COUNT,
        "shape": Column(sort="wholes", least=0, most=COUNTABLE), "numel": _COUNT, "count": _COUNT,
        **dict.fromkeys(_STATS_FIGURES, _NUMBER), **dict.fromkeys(_STATS_SIZES, _SIZE), "skewness": _SHAPELESS,
        "excess_kurtosis": _SHAPELESS, "outlier_fraction_3": _SHARE, "outlier_fraction": _SHARE, "note": _TEXT,
    },
    key=("module", "tensor"),
)  # fmt: skip

_PROXY_ROW = {**_SITE, "bit_width": _BITS, "granularity": _GRANULARITY, "estimator": _ESTIMATOR}
_COSTS = {"weight_bits": _MEAN_BITS, "activation_bits": _MEAN_BITS, "size_bytes": _COUNT,
          "bitops": Column(sort="whole", least=0, most=2**63)}  # fmt: skip
_SUM = Column(sort="number", least=-1e200, most=1e200, missing="anywhere")  # of figures, each at most LARGEST
_BUDGET_KIND = Column(sort="text", allowed=tuple(field.name for field in fields(PlanBudget)))
_FRONT_COSTS = {  # as numbers: NaN where the plan names no tensor of the sort
    **dict.fromkeys(("weight_bits", "activation_bits", "size_bytes", "bitops"), _SIZE),
    **dict.fromkeys(("activation_bytes", "latency_ms"), replace(_SIZE, optional=True)),
}

TABLES: Mapping[str, Table] = {
    "cost": _COST,
    "sensitivity": _SENSITIVITY,
    "sensitivity_images": Table(
        columns={
            **_SWEEP_ROW, "image_divergence": Column(sort="numbers", least=-1e-6),
            "image_delta_loss": Column(sort="numbers", missing="anywhere"),
        },
        key=tuple(_SWEEP_ROW),
        rules=(*_SWEEP_RULES, _unequal_lengths("image_divergence"), _unequal_lengths("image_delta_loss")),
    ),
    "proxies": Table(
        columns={**_PROXY_ROW, "proxy": Column(sort="text", allowed=tuple(PROXIES)), "score": _NUMBER, "note": _TEXT},
        key=(*_PROXY_ROW, "proxy"),
    ),
    "proxy_images": Table(
        columns={**_PROXY_ROW,
                 "products": Column(sort="numbers", least=-math.inf, most=math.inf, missing="anywhere")},
        key=tuple(_PROXY_ROW),
        rules=(_unequal_lengths("products"),),
    ),
    "proxy_correlation": Table(
        columns={
            "tensors": Column(sort="text", allowed=("all", "weight", "input", "attention")), "bit_width": _BITS,
            "proxy": Column(sort="text", allowed=tuple(PROXIES)), "sites": _COUNT, "spearman": _CORRELATION,
            "spearman_low": _CORRELATION, "spearman_high": _CORRELATION, "kendall": _CORRELATION, "ceiling": _SHARE,
        },
        key=("tensors", "bit_width", "proxy"),
    ),
    "stats": _STATS,
    "channels": Table(
        columns={
            **_STATS_SITE, "axis": Column(sort="text", allowed=("channel", "head")), "index": _COUNT,
            **dict.fromkeys(("mean", "min", "max"), _NUMBER), "std": _SIZE, "abs_mean": _SIZE,
            "excess_kurtosis": _SHAPELESS,
        },
        key=("module", "tensor", "index"),
    ),
    "histograms": Table(
        columns={
            **_STATS_SITE, "left": Column(sort="number"), "right": Column(sort="number"),
            "count": Column(sort="whole", least=1, most=COUNTABLE),
        },
        # No key: edges close to a far centre are the same number.
        rules=(Rule(column="right", needs=("left", "right"), expected="left or more",
                    broken=lambda table: table["right"] < table["left"]),),
    ),
    "verify": Table(
        columns={
            "plan": _TEXT, **_COSTS, "loss": _NUMBER, "loss_se": _SIZE, "score": _NUMBER, "score_se": _SIZE,
            "divergence": _DIVERGENCE, "divergence_se": _SIZE, "metric": _NUMBER, "metric_se": _SIZE,
            "top1": _SHARE, "top1_se": _SIZE,
            "images": Column(sort="whole", least=1, most=COUNTABLE),
            "estimator": Column(sort="text", allowed=(*ESTIMATORS, "learned", "none")), "batchnorm": _BATCHNORM,
        },
        key=("plan", *_COSTS, "estimator", "batchnorm"),
    ),
    "verification": Table(
        columns={
            "plan": _TEXT, **_COSTS, **dict.fromkeys(("predicted_kl", "predicted_delta_loss"), _SUM),
            **dict.fromkeys(("measured_kl", "measured_delta_loss", "planned_ahead"), _NUMBER),
            **dict.fromkeys(("measured_kl_se", "measured_delta_loss_se", "top1_se", "planned_ahead_se"), _SIZE),
            "top1": _SHARE, "plan_sha256": _TEXT,
            **dict.fromkeys(("kl_excess", "kl_excess_se"), replace(_NUMBER, optional=True)),
            **dict.fromkeys(("heldout_kl", "heldout_kl_se", "prediction_ratio", "prediction_ratio_se"),
                            replace(_SIZE, optional=True)),
            "predicted_kl_pairs": replace(_SUM, optional=True),
        },
    ),
    "pareto": Table(
        columns={
            "budget_kind": _BUDGET_KIND, "budget": Column(sort="number", least=0), **_FRONT_COSTS,
            "objective": _SUM, "lower_bound": _SUM, "gap": Column(sort="number", least=0, most=math.inf),
            "status": Column(sort="text", allowed=("optimal", "time_limit", "feasible")), "shadow_price": _SUM,
            "predicted_delta_loss": _SUM,
        },
        key=("budget_kind", "budget"),
    ),
    "pareto_uniform": Table(
        columns={"budget_kind": _BUDGET_KIND, "bit_width": _BITS, **_FRONT_COSTS, "objective": _SUM,
                 "predicted_delta_loss": _SUM},
        key=("budget_kind", "bit_width"),
    ),
    "history": Table(
        columns={
            **dict.fromkeys(HISTORY_COLUMNS, _NUMBER), "step": _COUNT, "epoch": _COUNT, "images": _COUNT,
            "split": Column(sort="text", allowed=("train", "val")), "lr": _SIZE, "top1": _SHARE, "seconds": _SIZE,
            **{f"grad_{term}": _SIZE for term in TERMS},
        },
        key=("step", "split"),
    ),
    "oscillation": Table(
        columns={
            "step": _COUNT, "module": _MODULE, "tensor": Column(sort="text", allowed=WEIGHT_TENSORS),
            "weights": Column(sort="whole", least=1, most=COUNTABLE), "oscillating": _SHARE, "oscillating_ema": _SHARE,
        },
        key=("step", "module", "tensor"),
    ),
    "bins": Table(
        columns={
            "step": _COUNT, "module": _MODULE, "tensor": Column(sort="text", allowed=WEIGHT_TENSORS), "kind": _KIND,
            "position": Column(sort="number", least=-0.5, most=0.5), "weights": _COUNT,
        },
        key=("step", "module", "tensor", "position"),
    ),
}  # fmt: skip
"""By the name of the file, without its folder and `.parquet`; those of which nothing is read back are not here."""
