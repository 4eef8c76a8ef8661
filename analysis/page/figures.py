"""The figures of a report: run content in, PNG as base64 with the words that stand for it out."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from analysis.figures.oscillation_plots import oscillation_figure
from analysis.figures.panels import bits_figure, distribution_figure
from analysis.figures.pareto_plots import pareto_figure
from analysis.figures.proxy_plots import proxies_figure
from analysis.figures.sensitivity_panels import sensitivity_figures
from analysis.figures.training_plots import terms_figure, training_figure
from analysis.figures.variation_panels import variation_figures
from analysis.figures.verification_plots import verification_figure
from analysis.page.cells import finite
from analysis.page.content import RunContent, Training, belongs, history_frame, oscillation_frame, terms
from analysis.page.plan_section import objective
from analysis.planning.budget_kinds import budget_words
from analysis.statistics.variation_frames import Measured
from analysis.sweeps.proxy_correlation import measured_beside
from analysis.training.oscillation_frames import edge_densities, kind_shares, module_shares

DOTS = 180  # an inch: sharp on a screen, and ten runs still fit in 5 MiB
SHOWN = 150  # pixels of the page an inch at most: letters of 7 points are then as large as those of tables
COLOURS = 256  # of a figure, its shades at the edges of letters included: a third of the bytes


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure inside the page."""

    caption: str
    words: str  # what it shows, for those who do not see it
    png: str  # base64
    inches: float  # its natural width

    @property
    def pixels(self) -> int:
        """The width on a page that has the room."""
        return round(SHOWN * self.inches)


def distribution(content: RunContent) -> Picture | None:
    """Where the values of each tensor lie."""
    if content.stats is None:
        return None
    words = "bands of quantiles of every weight, input and attention tensor, in its own standard deviations"
    return picture(distribution_figure(content.stats, content.name), f"{content.name}: distribution", words)


def variation(contents: Sequence[RunContent]) -> list[Picture]:
    """What `qvw compare` draws of all runs together: over depth, heads, densities by kind, channels of one layer."""
    runs = [
        Measured(name=c.name, stats=c.stats, channels=c.channels, histograms=c.histograms)
        for c in contents
        if c.stats is not None
    ]
    return [picture(each.figure, each.caption, each.words) for each in variation_figures(runs)]


_SWEEP = {
    "sensitivity": ("each site", "heatmap of the KL of the logits of every site, a column a bit-width"),
    "sensitivity_loss": ("loss of each site", "heatmap of the loss increase of every site, a column a bit-width"),
    "sensitivity_sqnr": ("SQNR of each tensor", "heatmap of the signal-to-noise ratio, a column a bit-width"),
    "sensitivity_ranks": ("ranks", "KL of each site with its error, and the band of ranks in resampled images"),
    "sensitivity_blocks": ("by block", "heatmap of the KL, depth down, kinds of tensor across"),
    "sensitivity_groups": ("groups", "bars of the KL of each group that is quantized alone"),
    "sensitivity_left_out": ("left out", "bars of the KL where everything but one group is quantized"),
}


def sensitivity(content: RunContent) -> list[Picture]:
    """All that the sweep can show, and the proxies beside it where they were computed."""
    if content.sweep is None:
        return []
    pictures = []
    for stem, figure in sensitivity_figures(content.sweep, content.name):
        caption, words = _SWEEP[stem]
        pictures.append(picture(figure, f"{content.name}: sensitivity, {caption}", words))
    if content.proxies is not None:
        proxies, correlation = content.proxies
        figure = proxies_figure(proxies, measured_beside(proxies, content.sweep), correlation, content.name)
        words = "scores that predict the sweep against the measured KL of each site, a panel a proxy"
        pictures.append(picture(figure, f"{content.name}: proxies", words))
    return pictures


def plan(content: RunContent) -> Picture | None:
    """The bits of each planned site."""
    if content.plan is None:
        return None
    sites = content.plan.sites  # in network order
    frame = pd.DataFrame(
        [{"module": s.module, "tensor": s.tensor, "bit_width": s.bit_width, "order": i} for i, s in enumerate(sites)]
    )
    words = "modules in network order across, tensors down, colour is the bit-width; the table of sites has the same"
    figure = bits_figure(frame, content.name, budget=budget_words(content.plan.budget))
    return picture(figure, f"{content.name}: bits of each site", words)


def front(content: RunContent) -> Picture | None:
    """What each budget buys."""
    if content.front is None:
        return None
    budget = content.plan.budget if content.plan is not None and belongs(content, content.front) else None
    figure = pareto_figure(
        content.front, content.name, uniform=content.uniform, objective=objective(content), budget=budget
    )
    words = "predicted change against the budget, a panel a kind; points are plans, the ring is the knee"
    return picture(figure, f"{content.name}: the best plan for each budget", words)


def verification(content: RunContent) -> Picture | None:
    """The plan beside others within its budget, as measured."""
    if content.verification is None:
        return None
    figure = verification_figure(content.verification, content.name, floating=_float_top1(content))
    words = "top-1 of each plan with its 95 % interval beside that in floating point; measured against predicted KL"
    return picture(figure, f"{content.name}: the plan beside others", words)


def _float_top1(content: RunContent) -> float | None:
    """Top-1 in floating point on the images of the verification; None where verify.parquet is of other images now."""
    if content.verify is None or content.verification is None:
        return None
    top1 = {kind: content.verify.loc[content.verify["plan"] == kind, "top1"].tolist() for kind in ("float", "planned")}
    if not top1["float"] or content.verification["top1"].iloc[0] not in top1["planned"]:
        return None
    return finite(top1["float"][0])


def trainings(content: RunContent) -> list[Picture]:
    """Curves of all trainings of a run, and the terms of their losses."""
    if not content.trainings:
        return []
    history = history_frame(content.trainings)
    figure = training_figure(history, oscillation_frame(content.trainings), content.name)
    words = "loss, top-1 and share of oscillating weights over steps, a colour a training"
    pictures = [picture(figure, f"{content.name}: trainings", words)]
    names = terms(content.trainings)
    if names:
        words = f"{', '.join(names)} over steps, a panel a training"
        pictures.append(picture(terms_figure(history, names, content.name), f"{content.name}: loss terms", words))
    pulls = [name for name in names if f"grad_{name}" in history and history[f"grad_{name}"].notna().any()]
    if pulls:
        words = f"norms of the gradients of {', '.join(pulls)} over steps, a panel a training: how hard each pulls"
        figure = terms_figure(history, pulls, content.name, gradients=True)
        pictures.append(picture(figure, f"{content.name}: pull of each term", words))
    return [*pictures, *filter(None, (_oscillation(training, content.name) for training in content.trainings))]


def _oscillation(training: Training, name: str) -> Picture | None:
    """Which weights of one training oscillate, and where they lie in their bins."""
    if training.oscillation is None or training.bins is None:
        return None
    kinds, modules = kind_shares(training.oscillation, training.bins), module_shares(training.oscillation)
    figure = oscillation_figure(kinds, modules, edge_densities(training.bins), f"{name}, {training.name}")
    words = "share of oscillating weights by kind and module over steps, and where weights lie around the edges of bins"
    return picture(figure, f"{name}: oscillation in {training.name}", words)


def picture(figure: Figure, caption: str, words: str) -> Picture:
    """The figure as PNG of few colours; it is closed. The same figure gives the same bytes."""
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DOTS)
    plt.close(figure)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(COLOURS).save(packed, "png", optimize=True)
    width = float(figure.get_size_inches()[0])
    return Picture(caption=caption, words=words, png=base64.b64encode(packed.getvalue()).decode(), inches=width)
