"""The closed lists that a plan, a table or a command line chooses from; importing this costs nothing."""

from typing import Literal, get_args

Granularity = Literal["per_tensor", "per_channel", "per_head"]
Estimator = Literal["mse", "minmax", "percentile"]
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
ALLOWED_BIT_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
