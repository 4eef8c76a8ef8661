"""What a plan may choose from: scores that never rise, ties and pins by pattern, and uniform bit-widths."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.planning.bit_options import apply_pins, isotonic, layout_pins, shared_ties, tied_sites, uniform_bits
from quant.errors import InputError
from quant.site import Site
from tests.plan_frames import NETWORKS, chain, cost_frame, option_frame


def test_tie_patterns_are_resolved_over_sites():
    """One group per text; commas join patterns over modules or `module:tensor`; one without a match is refused."""
    sites = [Site("qkv", "weight.query"), Site("qkv", "weight.key"), Site("qkv", "input")]
    assert tied_sites(["qkv:weight.*", "*"], sites) == [tuple(sites[:2]), tuple(sites)]
    assert tied_sites(["qkv:input,qkv:weight.key", "qkv"], sites) == [(sites[1], sites[2]), tuple(sites)]
    for text in ("qk:*", "qkv:input,qk:*"):
        with pytest.raises(InputError, match=r"The tie 'qk:\*' matches no measured site\. The nearest is qkv"):
            tied_sites([text], sites)


@given(scores=st.lists(st.floats(-10, 10), min_size=2, max_size=6), random=st.randoms())
def test_isotonic_scores_never_rise(scores, random):
    """Smoothed scores never rise with the bit-width and keep their sum; falling ones stay, in any row order."""
    rows = option_frame({("a:weight", b + 2): score for b, score in enumerate(scores)})
    order = list(range(len(scores)))
    random.shuffle(order)
    smooth = isotonic(rows.iloc[order])
    assert smooth["score_measured"].tolist() == [scores[i] for i in order]
    by_bits = smooth.sort_values("bit_width")["score"].to_numpy()
    assert (np.diff(by_bits) <= 1e-12).all()
    assert by_bits.sum() == pytest.approx(sum(scores), abs=1e-9)
    falling = rows.assign(score=sorted(scores, reverse=True))
    assert isotonic(falling)["score"].tolist() == pytest.approx(falling["score"].tolist(), rel=1e-12)


def test_isotonic_scores_are_made_per_site():
    """A rise from one site to the next is no noise: only a site's own rise from 2 to 3 bits is averaged out."""
    scores = {("a:weight", 2): 1.0, ("a:weight", 3): 3.0, ("b:weight", 2): 9.0, ("b:weight", 3): 1.0}
    assert isotonic(option_frame(scores))["score"].tolist() == [2.0, 2.0, 9.0, 1.0]
    with pytest.raises(InputError, match="is nan"):
        isotonic(option_frame(scores).assign(score=math.nan))


def test_pins_leave_one_option():
    """A pin keeps one row per site; later pins win, and any over the layout's; candidates bind the other sites."""
    options, _, _ = chain(3)
    layout = {Site("fc0", "weight"): 8, Site("fc0", "input"): 8, Site("gone", "weight"): 8}
    kept = apply_pins(options, [("fc*:input", 4), ("fc2", 3)], layout, candidates=(2, 4))
    offered = kept.groupby(["module", "tensor"])["bit_width"].agg(list).to_dict()
    assert offered == {
        ("fc0", "weight"): [8],
        ("fc0", "input"): [4],
        ("fc1", "weight"): [2, 4],
        ("fc1", "input"): [4],
        ("fc2", "weight"): [3],
        ("fc2", "input"): [3],
    }


def test_pins_that_cannot_be_kept_are_refused():
    """A pattern without a match, or a bit-width that was not measured, is an InputError that names what there is."""
    options, _, _ = chain(2)
    with pytest.raises(InputError, match=r"The pin 'fcc0' matches no measured site\. The nearest is fc0\."):
        apply_pins(options, [("fcc0", 8)], {})
    with pytest.raises(
        InputError, match=r"fc0:weight is to have 5 bits by the pin fc0=5, but was measured at \[2, 3, 4, 8\]"
    ):
        apply_pins(options, [("fc0", 5)], {})
    with pytest.raises(InputError, match="fc1:input is to have 16 bits by the layout"):
        apply_pins(options, [], {Site("fc1", "input"): 16})
    with pytest.raises(InputError, match=r"is to have one of \[5, 6\] bits"):
        apply_pins(options, [], {}, candidates=(6, 5))


def test_uniform_bits_keep_the_layout():
    """Layout `paper` keeps pinned sites at 8 bits, `strict` none; a side without bits stays in floating point."""
    numel = dict.fromkeys(("a:weight", "a:input", "b:weight", "b:input"), 1)
    cost = cost_frame(NETWORKS[0], numel, [1, 1], pinned=("a:weight", "a:input"))
    a, b = Site("a", "weight"), Site("b", "weight")
    a_in, b_in = Site("a", "input"), Site("b", "input")
    assert uniform_bits(cost, 4, 3, "paper") == {a: 8, a_in: 8, b: 4, b_in: 3}
    assert uniform_bits(cost, 4, 3, "strict") == {a: 4, a_in: 3, b: 4, b_in: 3}
    assert uniform_bits(cost, 4, None, "paper") == {a: 8, b: 4}
    assert layout_pins(cost, "paper") == {a: 8, a_in: 8}
    with pytest.raises(InputError, match="layout 'Paper' is unknown"):
        uniform_bits(cost, 4, 3, "Paper")
    with pytest.raises(InputError, match="bit-width of 9 is not allowed"):
        uniform_bits(cost, 9, 3, "paper")


def test_inputs_of_one_tensor_are_tied():
    """Sites that `cost` says are the same tensor make one tie, those left out of the plan are not in it."""
    sites = [Site(name, "input") for name in "abcd"]
    cost = pd.DataFrame({"module": list("abcd"), "tensor": "input", "same_tensor": [None, "a:input", None, "a:input"]})
    assert shared_ties(cost, sites) == [(sites[0], sites[1], sites[3])]
    assert shared_ties(cost, sites[:2]) == [(sites[0], sites[1])]
    assert shared_ties(cost, sites[1:3]) == []
    with pytest.raises(InputError, match=r"cost.parquet does not say"):
        shared_ties(cost.drop(columns="same_tensor"), sites)
