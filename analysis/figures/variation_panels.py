"""How the tensors of several runs vary: each figure with the frame that it draws, for files and for a page."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.panels import channels_figure, depth_figure, heads_figure, ridges_figure
from analysis.statistics.variation_frames import Measured, channel_frame, depth_frame, distribution_frame, head_frame

STEMS = ("variation_weight", "variation_input", "heads", "distributions_weight", "distributions_input", "channels")


class VariationFigure(NamedTuple):
    """One figure and its data; whoever takes it closes it."""

    stem: str  # of the files: STEM.png, STEM.svg, STEM.csv
    caption: str
    words: str  # what it shows, for those who do not see it
    frame: pd.DataFrame
    figure: Figure


def variation_figures(runs: Sequence[Measured], modules: Sequence[str] = ()) -> Iterator[VariationFigure]:
    """Every figure for which one of the runs holds data, drawn when it is asked for.

    `modules` are the patterns of `variation_frames.channel_frame`: InputError for one that matches no layer.
    """
    models = [run.name for run in runs]
    channels = channel_frame(runs, modules)  # before anything is drawn: a pattern may be wrong
    for tensor, name in (("weight", "weights"), ("input", "inputs")):
        frame = depth_frame(runs, tensor=tensor)
        if not frame.empty:
            caption = f"{name} of convolutions and linears by depth"
            words = "absolute mean, standard deviation, kurtosis, outliers and channel ranges of each layer over depth"
            yield VariationFigure(f"variation_{tensor}", caption, words, frame, depth_figure(frame, tensor, models))
    frame = head_frame(runs)
    if not frame.empty:
        words = "standard deviation of each head of query, key, value and attention in every layer, and their spread"
        yield VariationFigure("heads", "heads of each attention layer", words, frame, heads_figure(frame))
    for tensor, name in (("weight", "weights"), ("input", "activations")):
        frame = distribution_frame(runs, tensor=tensor)
        if not frame.empty:
            words = f"densities of standardised {name}, a ridge for each kind of layer and run, beside a Gaussian's"
            figure = ridges_figure(frame, tensor)
            yield VariationFigure(f"distributions_{tensor}", f"{name} by kind of layer", words, frame, figure)
    if not channels.empty:
        words = "minimum, maximum, mean and standard deviation of the channels of one layer a run, the widest first"
        caption = f"channels of {' and '.join(channels['module'].drop_duplicates())}"
        yield VariationFigure("channels", caption, words, channels, channels_figure(channels, modules))
