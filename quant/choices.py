"""The closed lists that a plan, a table or a command line chooses from; importing this costs nothing."""

from typing import Literal, get_args

Granularity = Literal["per_tensor", "per_channel", "per_head"]
Estimator = Literal["mse", "percentile", "minmax"]  # where a site has rows of several, the first is used
Layout = Literal["paper", "strict"]
GradientScale = Literal["lsq", "module"]
Protocol = Literal["single", "leave_one_out"]
Grouping = Literal["kind", "block", "stage", "module"]
Tensors = Literal["weight", "input", "attention", "query", "key", "value", "softmax"]
Compression = Literal["hard", "smoothing", "marginal_smoothing", "marginal_renorm", "full"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
PROTOCOLS: tuple[str, ...] = get_args(Protocol)
GROUPINGS: tuple[str, ...] = get_args(Grouping)
TENSORS: tuple[str, ...] = get_args(Tensors)
COMPRESSIONS: tuple[str, ...] = get_args(Compression)
TASKS = ("classification", "multilabel", "segmentation", "regression", "embedding", "detection", "language_modeling")
"""The ready-made tasks, functions of `analysis.tasks`."""
PROXIES = {
    "fisher": "the KL to second order: 1/2 of the mean square of (gradient . error)",
    "fit": "FIT: 1/2 trace of Fisher's matrix x mean squared error",
    "output_gradient": "sum of squares of (gradient x error) at the module's output",
    "hessian_trace": "HAWQ-V2: 1/2 mean Hessian trace x squared error",
    "noise": "squared error over signal of the tensor, 1/SQNR",
    "stats_range": "noise of a grid from min to max, from abs_max_over_std",
    "stats_kurtosis": "excess kurtosis",
    "stats_outliers": "share of values beyond 6 standard deviations",
}
"""Scores that predict a sensitivity, and what each is."""
ALLOWED_BIT_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
