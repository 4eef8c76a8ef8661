"""What a request lets the planner choose from: scored bit-widths of every site, and the sites that share theirs."""

from collections.abc import Callable, Sequence

import pandas as pd

from analysis.planning.bit_options import (
    apply_pins,
    attention_ties,
    isotonic,
    layout_pins,
    matches,
    restrict,
    shared_ties,
    tied_sites,
)
from analysis.planning.plan_request import PlanRequest, parse_bound, parse_kind, parse_pin
from analysis.terminal.console import warn
from quant.errors import InputError
from quant.site import Site


def offered(
    scored_rows: pd.DataFrame,
    rows: pd.DataFrame,
    cost: pd.DataFrame,
    request: PlanRequest,
    tell: Callable[[str], None] = warn,
) -> pd.DataFrame:
    """The options of the integer program: a score for each site and bit-width that the request allows.

    `scored_rows` are those of `rows` that have a score; `tell` hears what is worth a warning.
    Scores are made non-increasing in bits by isotonic regression: measured changes are noisy, and bits that seem to
    hurt must not look like a reason to give fewer.
    """
    options = isotonic(scored_rows)
    pins = [parse_pin(text) for text in request.pin]
    layout = layout_pins(cost, request.layout)
    options = apply_pins(options, pins, layout, candidates=request.candidates)
    moved = [
        site for site, bits in layout.items() for pattern, other in pins if matches(pattern, site) and other != bits
    ]
    if moved:
        tell(f"the pin takes {moved[0]} from the {layout[moved[0]]} bits of the layout ({len(set(moved))} such sites).")
    sites = {Site(m, t) for m, t in options[["module", "tensor"]].drop_duplicates().to_numpy()}
    unscored = [site for site in map(Site._make, rows[["module", "tensor"]].drop_duplicates().to_numpy())
                if site not in sites]  # fmt: skip
    if unscored:
        tell(f"{len(unscored)} measured sites have no score and stay in floating point, the first {unscored[0]}.")
    kept = {site for site in layout if not any(matches(pattern, site) for pattern, _ in pins)}
    bounds = [parse_bound(text) for text in request.bounds]
    outside = [site for site in layout if site in kept & sites for pattern, low, high in bounds
               if matches(pattern, site) and not low <= layout[site] <= high]  # fmt: skip
    if outside:
        tell(f"{outside[0]} keeps the {layout[outside[0]]} bits of the layout, outside its bounds ({len(outside)} such "
             "sites); a pin or the layout strict changes that.")  # fmt: skip
    return restrict(options, bounds, map(parse_kind, request.candidates_of), kept=kept)


def tied(patterns: Sequence[str], options: pd.DataFrame, cost: pd.DataFrame) -> list[tuple[Site, ...]]:
    """The groups of sites that share their bits; `qkv` stands for those of attention, `shared` for equal inputs."""
    sites = [Site(m, t) for m, t in options[["module", "tensor"]].drop_duplicates().to_numpy()]
    ties = tied_sites([pattern for pattern in patterns if pattern not in ("qkv", "shared")], sites)
    if "qkv" in patterns:
        found = attention_ties(sites)
        if not found:
            raise InputError("the tie qkv: no query, key and value were measured. Measure such sites, or leave it out.")
        ties += found
    if "shared" in patterns:
        ties += shared_ties(cost, set(sites))
    return ties
