"""What a plan may choose from: scores made non-increasing, tied sites, pinned bit-widths, and uniform bit-widths.

`options` and `cost` are the frames of planner.plan_bits.
"""

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
import pandas as pd
from scipy.optimize import isotonic_regression

from analysis.cost import SAME
from analysis.planning import accounting
from analysis.storage.table_checks import LARGEST
from quant.choices import ALLOWED_BIT_WIDTHS
from quant.errors import InputError
from quant.site import Site

_PINNED_BITS = 8  # of the first convolution or patch embedding and the classifier, in layout `paper`


def check_scores(options: pd.DataFrame) -> None:
    """Raise InputError if a score is NaN, or so large that sums of such are infinite; it names the first."""
    bad = options[~(np.abs(options["score"].to_numpy(dtype=float)) <= LARGEST)]
    if len(bad):
        row = bad.iloc[0]
        raise InputError(
            f"The score of {row['module']}:{row['tensor']} at {row['bit_width']} bits is {row['score']}, "
            f"as are {len(bad) - 1} more. Choose another objective (without labels: kl), or measure the site again."
        )


def isotonic(options: pd.DataFrame) -> pd.DataFrame:
    """`options` with scores that never rise with the bit-width: the nearest such ones per site, in least squares.

    More bits cannot truly hurt; where a measured score says so it is noise. The measured ones go to `score_measured`.
    """
    check_scores(options)
    measured = options["score"].to_numpy(dtype=float)
    score = measured.copy()
    for rows in options.groupby(["module", "tensor"], sort=False).indices.values():
        rising = rows[np.argsort(options["bit_width"].to_numpy()[rows], kind="stable")]
        score[rising] = isotonic_regression(measured[rising], increasing=False).x
    return options.assign(score=score, score_measured=measured)


def matches(pattern: str, site: Site) -> bool:
    """Whether a pattern of a pin or bound, as in fnmatch, is the module's name or `module:tensor`."""
    return fnmatchcase(site.module, pattern) or fnmatchcase(str(site), pattern)


def tied_sites(patterns: Iterable[str], sites: Collection[Site]) -> list[tuple[Site, ...]]:
    """One group per text of patterns with commas between them (`matches`): its sites share their bit-width."""
    groups = []
    for text in patterns:
        parts = text.split(",")
        for pattern in parts:
            if not any(matches(pattern, site) for site in sites):
                raise _no_match("tie", pattern, [name for site in sites for name in (site.module, str(site))])
        groups.append(tuple(site for site in sites if any(matches(pattern, site) for pattern in parts)))
    return groups


def apply_pins(
    options: pd.DataFrame,
    pins: Iterable[tuple[str, int]],
    layout_pins: Mapping[Site, int],
    candidates: Collection[int] | None = None,
) -> pd.DataFrame:
    """`options` with one row left per pinned site, and of the others those at the `candidates`, if given.

    A pin is (pattern, bit_width), the pattern as in fnmatch over the module's name or `module:tensor`. A later pin
    wins over an earlier one, and any over the layout's. InputError: no match, or no score at the pinned bit-width.
    """
    sites = [Site(*key) for key in zip(options["module"], options["tensor"], strict=True)]
    pinned = {site: (bits, "the layout") for site, bits in layout_pins.items()}
    for pattern, bits in pins:
        found = [site for site in sites if matches(pattern, site)]
        if not found:
            raise _no_match("pin", pattern, [name for site in sites for name in (site.module, str(site))])
        pinned.update(dict.fromkeys(found, (bits, f"the pin {pattern}={bits}")))
    measured: dict[Site, list[int]] = {}
    kept: dict[Site, list[int]] = {}
    for site, bits in zip(sites, options["bit_width"], strict=True):
        measured.setdefault(site, []).append(int(bits))
    for site, offered in measured.items():
        bits, who = pinned.get(site, (0, ""))
        kept[site] = [b for b in offered if (b == bits if who else candidates is None or b in candidates)]
        if not kept[site]:
            wanted = f"{bits} bits by {who}" if who else f"one of {sorted(candidates or ())} bits"
            raise InputError(
                f"{site} is to have {wanted}, but was measured at {sorted(offered)}. " + _advice(who, bits)
            )
    keep = [int(bits) in kept[site] for site, bits in zip(sites, options["bit_width"], strict=True)]
    return options[keep]


def restrict(
    options: pd.DataFrame,
    bounds: Iterable[tuple[str, int, int]],
    of_kind: Iterable[tuple[str, Collection[int]]],
    *,
    kept: Collection[Site] = (),
) -> pd.DataFrame:
    """`options` (with a column kind) within bounds per site and candidates per kind; pins are applied before.

    A bound is (pattern, lowest, highest), the pattern as of a pin; candidates are (pattern over kinds, bit-widths). The
    sites `kept` keep what they have, as those that the layout pins. InputError: no match, or nothing left of a site.
    """
    sites = [Site(*key) for key in zip(options["module"], options["tensor"], strict=True)]
    single = np.array([site in kept for site in sites], dtype=bool)
    keep = np.ones(len(options), dtype=bool)
    bits, kinds = options["bit_width"].to_numpy(), options["kind"].tolist()
    for pattern, lowest, highest in bounds:
        found = np.array([matches(pattern, site) for site in sites])
        if not found.any():
            raise _no_match("bound", pattern, [name for site in sites for name in (site.module, str(site))])
        keep &= ~found | single | ((bits >= lowest) & (bits <= highest))
    for pattern, widths in of_kind:
        found = np.array([fnmatchcase(kind, pattern) for kind in kinds])
        if not found.any():
            known = ", ".join(dict.fromkeys(kinds))
            raise InputError(
                f"The kind {pattern!r} matches no measured site. The kinds are {known}. Patterns: * and ?."
            )
        keep &= ~found | single | np.isin(bits, list(widths))
    left = {site for site, stays in zip(sites, keep, strict=True) if stays}
    empty = next((site for site in sites if site not in left), None)
    if empty is not None:
        offered = sorted(int(b) for b, site in zip(bits, sites, strict=True) if site == empty)
        raise InputError(
            f"no bit-width of {empty} is left by bounds and candidates; candidates and pins leave it {offered}. Widen "
            "them, or measure more bit-widths with measure_sensitivity."
        )
    return options[keep]


def attention_ties(sites: Collection[Site]) -> list[tuple[Site, ...]]:
    """Query, key and value of each module share their bits: rows of a fused weight, and the tensors themselves.

    Separate layers whose names end in q, k, v (also `query_proj`, `k_proj`, ...) are tied by patterns.
    """
    ties: dict[tuple[str, bool], list[Site]] = {}
    for site in sites:
        if site.tensor.removeprefix("weight.") in ("query", "key", "value"):
            ties.setdefault((site.module, site.is_weight), []).append(site)
    return [tuple(tie) for tie in ties.values() if len(tie) > 1]


def shared_ties(cost: pd.DataFrame, sites: Collection[Site]) -> list[tuple[Site, ...]]:
    """Inputs that are the very same tensor share their bits, as where a residual block branches.

    `cost` is the frame of cost.parquet. InputError for a table of an earlier sweep, which does not say which are.
    """
    if SAME not in cost:
        raise InputError(
            "--tie shared: this run's cost.parquet does not say which inputs are the same tensor. Make it again: "
            "`qvw sensitivity` with --overwrite."
        )
    readers: dict[str, list[Site]] = {}
    for module, tensor, same in cost[["module", "tensor", SAME]].itertuples(index=False, name=None):
        site = Site(module, tensor)
        readers.setdefault(same if isinstance(same, str) else str(site), []).append(site)
    ties = [tuple(site for site in tie if site in sites) for tie in readers.values()]
    return [tie for tie in ties if len(tie) > 1]


def layout_pins(cost: pd.DataFrame, layout: str) -> dict[Site, int]:
    """The bit-widths that the layout fixes: 8 for the first and last layer under `paper`, none under `strict`."""
    if layout not in ("paper", "strict"):
        raise InputError(f"The layout {layout!r} is unknown. Choose paper or strict.")
    return {site: _PINNED_BITS for site, row in accounting.cost_rows(cost).items() if row.pinned and layout == "paper"}


def uniform_bits(
    cost: pd.DataFrame, weight_bits: int | None, activation_bits: int | None, layout: str
) -> dict[Site, int]:
    """One bit-width for all weights and one for all activations, save the layout's pins; None leaves them in float."""
    for bits in (weight_bits, activation_bits):
        if bits is not None and bits not in ALLOWED_BIT_WIDTHS:
            raise InputError(f"A uniform bit-width of {bits} is not allowed. Choose from {ALLOWED_BIT_WIDTHS}.")
    pins = layout_pins(cost, layout)
    open_to = [site for site, row in accounting.cost_rows(cost).items() if row.quantizable]
    wanted = {site: weight_bits if site.is_weight else activation_bits for site in open_to}
    return {site: pins.get(site, bits) for site, bits in wanted.items() if bits is not None}


def _advice(who: str, bits: int) -> str:
    """What to do about bits that were not measured, by who asks for them."""
    if who == "the layout":
        return (
            f"Measure these with measure_sensitivity at {bits} bits, or plan without this exception: layout='strict'."
        )
    return "Measure it with measure_sensitivity, or choose a bit-width that was measured."


def _no_match(what: str, pattern: str, names: Sequence[str]) -> InputError:
    close = difflib.get_close_matches(pattern, list(dict.fromkeys(names)), n=1, cutoff=0.0)
    nearest = f" The nearest is {close[0]}." if close else ""
    return InputError(f"The {what} {pattern!r} matches no measured site.{nearest} Patterns are as in a shell: * and ?.")
