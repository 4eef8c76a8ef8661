"""Several networks side by side: how much their tensors vary."""

from collections.abc import Mapping

from analysis.results import Comparison, Stats
from analysis.statistics import comparison
from analysis.statistics.variation_tests import differences
from analysis.variation import variation
from quant.errors import InputError


def compare(stats: Mapping[str, Stats]) -> Comparison:
    """The spread of weights and input activations of two or more networks, by name, with tests of its difference.

    `stats` are results of `measure_stats`. `table` has one row per tensor (weight, input) and measure, one column per
    network and a `reading` in words; magnitudes are in the unit of the tensors, SDAM and cv as in Huang et al., TMLR
    2024, arXiv:2307.00331. `tests` has one row per tensor and pair of networks (Brown and Forsythe, JASA 1974).

    Raises InputError for fewer than two networks and for what is no result of `measure_stats`.

    >>> import torch
    >>> from torch import nn
    >>> from analysis.measure import measure_stats
    >>> data = [torch.randn(4, 3, 8, 8)]
    >>> nets = {n: nn.Sequential(nn.Conv2d(3, n, 3), nn.Conv2d(n, 8, 3)) for n in (4, 16)}
    >>> both = compare({f"width {n}": measure_stats(net, data) for n, net in nets.items()})
    >>> both.table.query("tensor == 'weight' and measure == 'modules'")["width 16"].item()
    2.0
    """
    if not isinstance(stats, Mapping) or len(stats) < 2:
        raise InputError("`stats` must hold two or more results of measure_stats, by name.")
    wrong = [name for name, result in stats.items() if not isinstance(result, Stats)]
    if wrong:
        kind = type(stats[wrong[0]]).__name__
        raise InputError(f"`stats` has a {kind} under {wrong[0]!r}; expected what measure_stats returns.")
    reserved = [name for name in stats if name in comparison.COLUMNS]
    if reserved:
        raise InputError(f"{reserved[0]!r} is a column of the table; choose another name.")
    measured = [result.measured(str(name)) for name, result in stats.items()]
    table = comparison.compare([comparison.Compared(each, variation(each.stats)) for each in measured])
    tests = differences([(each.name, each.stats) for each in measured])
    return Comparison(table=table, tests=tests, stats=dict(stats))
