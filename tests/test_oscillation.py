"""The tracker of oscillating weights against a window of reversals kept in full."""

import io
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.config import QATConfig
from quant.functional import fake_quantize, quantize
from quant.oscillation import OscillationTracker
from quant.site import Site
from tests.test_train import dropping_vit, prepared, reports

FIRST, SECOND = Site("layer1.conv", "weight"), Site("blocks.0.attn.qkv", "weight.query")
SIZES = {FIRST: 7, SECOND: 5}


def walk(seed: int, steps: int, restless: float) -> list[dict[Site, torch.Tensor]]:
    """Codes of both sites over time: each weight moves by one code with probability `restless`, often back again."""
    draw = random.Random(seed)
    codes = {site: [draw.randint(-8, 7) for _ in range(size)] for site, size in SIZES.items()}
    history = []
    for _ in range(steps):
        for values in codes.values():
            for place, code in enumerate(values):
                if draw.random() < restless:
                    values[place] = max(-8, min(7, code + draw.choice([-3, -1, 1, 1])))
        history.append({site: torch.tensor(values, dtype=torch.float32) for site, values in codes.items()})
    return history


def brute_force(history, site, *, window, momentum, threshold):
    """Both shares of `site` after each step, from every change of every weight, in plain Python."""
    weights = SIZES[site]
    last_move, f = [0] * weights, [0.0] * weights
    reversals: list[list[bool]] = [[] for _ in range(weights)]
    shares, before = [], None
    for codes in history:
        now = codes[site].tolist()
        for place in range(weights):
            move = 0 if before is None else now[place] - before[place]
            reversed_ = move * last_move[place] < 0
            last_move[place] = move or last_move[place]
            reversals[place].append(reversed_)
            f[place] = momentum * reversed_ + (1 - momentum) * f[place]
        before = now
        twice = sum(sum(marks[-window:]) >= 2 for marks in reversals)
        shares.append((twice / weights, sum(value > threshold for value in f) / weights))
    return shares


def shares_of(tracker: OscillationTracker, step: int) -> dict[Site, tuple[float, float]]:
    """Both shares of each site."""
    rows = tracker.rows(step)
    return {Site(row["module"], row["tensor"]): (row["oscillating"], row["oscillating_ema"]) for row in rows}


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    restless=st.sampled_from([0.02, 0.2, 0.9]),
    window=st.sampled_from([1, 2, 5, 30]),
    momentum=st.sampled_from([0.001, 0.01, 0.3, 1.0]),
    threshold=st.sampled_from([0.0051, 0.05, 0.31]),
    first_step=st.integers(0, 1_000_000),
)
def test_shares_are_those_of_a_full_history(seed, restless, window, momentum, threshold, first_step):
    """After every step both shares equal those counted from all changes so far."""
    history = walk(seed, 60, restless)
    options = {"window": window, "momentum": momentum, "threshold": threshold}
    tracker = OscillationTracker(SIZES, **options)
    expected = {site: brute_force(history, site, **options) for site in SIZES}
    for index, codes in enumerate(history):
        tracker.update(codes, first_step + index)
        shares = shares_of(tracker, first_step + index)
        assert shares == {site: pytest.approx(expected[site][index]) for site in SIZES}


def test_rows_describe_each_site_in_order():
    """A row a site, in the order of the sizes, with the keys of the table; weights that swing are counted."""
    tracker = OscillationTracker(SIZES)
    for step in range(4):  # at steps 2 and 3 the first two weights turn round
        swing = torch.zeros(7)
        swing[:2] = step % 2
        tracker.update({SECOND: torch.full((5,), step), FIRST: swing}, step)
    assert tracker.rows(3) == [
        {"step": 3, "module": "layer1.conv", "tensor": "weight", "weights": 7,
         "oscillating": 2 / 7, "oscillating_ema": 2 / 7},
        {"step": 3, "module": "blocks.0.attn.qkv", "tensor": "weight.query", "weights": 5,
         "oscillating": 0.0, "oscillating_ema": 0.0},
    ]  # fmt: skip


def test_a_pause_between_two_moves_does_not_hide_a_reversal():
    """Up, a long rest, down: the last change counts, however long ago. Up, rest, up is no reversal."""
    tracker = OscillationTracker({FIRST: 2}, window=5)
    for step, codes in enumerate([[0, 0], [1, 1], *[[1, 1]] * 20, [0, 2], [1, 3]]):
        tracker.update({FIRST: torch.tensor(codes)}, step)
    assert shares_of(tracker, 23)[FIRST] == (0.5, 0.5)


def test_a_code_that_is_seen_first_has_not_changed():
    """From an extreme code no direction is inferred: one change after the first step cannot be a reversal."""
    for first, second in ((7, -8), (-8, 7), (0, 15), (15, 0)):
        tracker = OscillationTracker({FIRST: 1}, window=10, threshold=0.0)
        tracker.update({FIRST: torch.tensor([first])}, 0)
        tracker.update({FIRST: torch.tensor([second])}, 1)
        assert shares_of(tracker, 1)[FIRST] == (0, 0)
        tracker.update({FIRST: torch.tensor([first])}, 2)
        assert shares_of(tracker, 2)[FIRST] == (0, 1)


def test_one_reversal_counts_for_69_steps_at_the_default_momentum():
    """0.01 * 0.99^k exceeds 0.005 for k = 0 to 68: why shares of different momentum cannot be compared."""
    tracker = OscillationTracker({FIRST: 1})
    counted = 0
    for step in range(200):
        tracker.update({FIRST: torch.tensor([int(step == 10)])}, step)
        counted += shares_of(tracker, step)[FIRST][1] == 1
    assert counted == 69


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.int64])
def test_codes_of_any_type_count_the_same(dtype):
    """Codes of up to 4 bits are small integers in every type."""
    tracker, reference = OscillationTracker(SIZES), OscillationTracker(SIZES)
    for step, codes in enumerate(walk(3, 40, 0.3)):
        reference.update(codes, step)
        tracker.update({site: values.to(dtype) for site, values in codes.items()}, step)
    assert tracker.rows(39) == reference.rows(39)
    assert tracker.rows(39)[0]["oscillating"] > 0


@given(seed=st.integers(0, 1000), stop=st.integers(0, 50))
def test_a_resumed_tracker_equals_one_that_was_not_interrupted(seed, stop):
    """The state_dict, written and read, is all that a fresh tracker of the same sizes needs to resume."""
    history = walk(seed, 50, 0.3)
    whole, first = (OscillationTracker(SIZES, window=20) for _ in range(2))
    for step, codes in enumerate(history):
        whole.update(codes, step)
        if step < stop:
            first.update(codes, step)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = OscillationTracker(SIZES, window=20)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(stop, 50):
        resumed.update(history[step], step)
    for name, buffer in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], buffer), name
    assert resumed.rows(49) == whole.rows(49)


def test_the_state_is_in_buffers_with_plain_names():
    """No parameter that an optimizer could move, and no dot in a name: module paths have dots of their own."""
    tracker = OscillationTracker(SIZES)
    assert not list(tracker.parameters())
    assert not [name for name in tracker.state_dict() if "." in name]
    assert sum(buffer.numel() * buffer.element_size() for buffer in tracker.buffers()) == 14 * sum(SIZES.values())


def test_what_is_tracked_stays_as_it_is():
    """Codes, also those of a graph, are not changed, and no random number is drawn."""
    history = [{site: codes.requires_grad_() for site, codes in step.items()} for step in walk(1, 30, 0.5)]
    copies = [{site: codes.detach().clone() for site, codes in step.items()} for step in history]
    state = torch.get_rng_state()
    tracker = OscillationTracker(SIZES)
    for step, codes in enumerate(history):
        tracker.update(codes, step)
        tracker.rows(step)
    assert torch.equal(torch.get_rng_state(), state)
    assert not [name for name, buffer in tracker.named_buffers() if buffer.requires_grad]
    for codes, copy in zip(history, copies, strict=True):
        for site in SIZES:
            assert torch.equal(codes[site], copy[site])
            assert codes[site].requires_grad


def test_tracking_does_not_change_training():
    """A quantized regression ends with the same weights to the bit whether it is tracked or not, and does oscillate."""
    site, shares = Site("linear", "weight"), []

    def train(tracked: bool) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        inputs, target = torch.randn(256, 24, generator=generator), torch.randn(24, generator=generator)
        latent = torch.zeros(1, 1, 24, requires_grad=True)
        scale, optimizer = torch.tensor([0.4]), torch.optim.SGD([latent], lr=0.05)
        tracker = OscillationTracker({site: 24})
        for step in range(150):
            optimizer.zero_grad()
            quantized = fake_quantize(latent, scale, None, 3, True).flatten()
            (inputs @ quantized - inputs @ target).square().mean().backward()
            optimizer.step()
            if tracked:
                tracker.update({site: quantize(latent, scale, None, 3, True).flatten()}, step)
                shares.append(tracker.rows(step)[0]["oscillating"])
        return latent.detach()

    assert torch.equal(train(tracked=True), train(tracked=False))
    assert shares[-1] > 0.2


def test_the_training_loop_ends_with_the_same_bits_untracked(tmp_path, monkeypatch):
    """With dropout and all terms of the loss, weights and scales are those of a loop whose tracker looks at nothing."""
    config = QATConfig(epochs=2, batch_size=16, log_every=1, learning_rate=1e-3, obr_weight=0.1)
    tracked, teacher = prepared(dropping_vit())
    done = list(reports(tracked, teacher, config, tmp_path / "tracked"))
    assert any(row["oscillating_ema"] > 0 for report in done for row in report.oscillation)
    monkeypatch.setattr(OscillationTracker, "update", lambda self, codes, step: None)
    monkeypatch.setattr("quant.train._codes", lambda weights: None)
    monkeypatch.setattr("quant.train.edge_rows", lambda weights, step: [])
    untracked, teacher = prepared(dropping_vit())
    done = list(reports(untracked, teacher, config, tmp_path / "untracked"))
    assert not any(row["oscillating_ema"] > 0 for report in done for row in report.oscillation)
    state = tracked.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in untracked.state_dict().items())


def test_other_sites_are_refused():
    """A site too few or too many would leave the tracker with codes of another step."""
    tracker = OscillationTracker(SIZES)
    with pytest.raises(ValueError, match=r"in one of the two only: blocks\.0\.attn\.qkv:weight\.query"):
        tracker.update({FIRST: torch.zeros(7)}, 0)


@pytest.mark.parametrize("shape", [(6,), (1,), (7, 1)])
def test_other_shapes_are_refused(shape):
    """Codes are flat and of the site's size; nothing broadcasts."""
    tracker = OscillationTracker(SIZES)
    with pytest.raises(ValueError, match=r"layer1\.conv:weight must have shape \(7,\)"):
        tracker.update({FIRST: torch.zeros(shape), SECOND: torch.zeros(5)}, 0)


def test_a_plan_without_low_bits_has_no_rows():
    """Nothing to track is no error: an 8-bit run has an empty table."""
    tracker = OscillationTracker({})
    tracker.update({}, 0)
    assert tracker.rows(0) == []
