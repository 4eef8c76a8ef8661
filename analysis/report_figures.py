"""The figures of a report: run content in, PNG as base64 with the words that stand for it out."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from analysis.panels import bits_figure, distribution_figure
from analysis.proxy_correlation import measured_beside
from analysis.proxy_plots import proxies_figure
from analysis.report_content import RunContent, history_frame, oscillation_frame, terms
from analysis.runs import Run
from analysis.sensitivity_panels import sensitivity_figures
from analysis.training_plots import terms_figure, training_figure
from analysis.variation_frames import Measured
from analysis.variation_panels import variation_figures

DOTS = 180  # an inch: sharp on a screen, and ten runs still fit in 5 MiB
COLOURS = 256  # of a figure, its shades at the edges of letters included: a third of the bytes


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure inside the page."""

    caption: str
    words: str  # what it shows, for those who do not see it
    png: str  # base64
    inches: float  # its natural width


def distribution(content: RunContent) -> Picture | None:
    """Where the values of each tensor lie."""
    if content.stats is None:
        return None
    words = "bands of quantiles of every weight, input and attention tensor, in its own standard deviations"
    return picture(distribution_figure(content.stats, content.name), f"{content.name}: distribution", words)


def variation(contents: Sequence[RunContent]) -> list[Picture]:
    """What `qvw compare` draws of all runs together: over depth, heads, densities by kind, channels of one layer."""
    runs = [Measured.read(Run(c.folder), c.name, c.stats) for c in contents if c.stats is not None]
    return [picture(each.figure, each.caption, each.words) for each in variation_figures(runs)]


_SWEEP = {
    "sensitivity": ("each site", "heatmap of {value} of every site, a column a bit-width"),
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
    value = "the loss increase" if content.sweep["delta_loss"].notna().any() else "the KL of the logits"
    pictures = []
    for stem, figure in sensitivity_figures(content.sweep, content.name):
        caption, words = _SWEEP[stem]
        pictures.append(picture(figure, f"{content.name}: sensitivity, {caption}", words.format(value=value)))
    if content.proxies is not None:
        proxies, correlation = content.proxies
        figure = proxies_figure(proxies, measured_beside(proxies, content.sweep), correlation, content.name)
        words = "scores that foretell the sweep against the measured KL of each site, a panel a proxy"
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
    return picture(bits_figure(frame, content.name), f"{content.name}: bits of each site", words)


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
    return pictures


def picture(figure: Figure, caption: str, words: str) -> Picture:
    """The figure as PNG of few colours; it is closed. The same figure gives the same bytes."""
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DOTS)
    plt.close(figure)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(COLOURS).save(packed, "png", optimize=True)
    width = float(figure.get_size_inches()[0])
    return Picture(caption=caption, words=words, png=base64.b64encode(packed.getvalue()).decode(), inches=width)
