"""Run folders -> one self-contained HTML page: its sections, definitions, and what is said where a table is missing."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined

from analysis import report_figures as figures
from analysis import report_plan, report_sensitivity
from analysis import report_tables as tables
from analysis.report_cells import Table
from analysis.report_content import RunContent, read_runs
from analysis.report_figures import Picture

T = TypeVar("T")
Definitions = tuple[tuple[str, str], ...]

SUMMARY: Definitions = (
    ("top-1", "Share of the validation images whose first answer is right, ± one standard error over the images."),
    ("loss", "Mean cross-entropy of the validation images in nats, ± one standard error over the images."),
    ("weight bits, activation bits", "Mean over the elements of all tensors that are quantized; 32 in floating point."),
    ("size", "Integer codes, scales and offsets, and 4 bytes for each parameter that stays in floating point; 1 MiB is "
             "1,048,576 bytes."),
    ("GBitOps", "Multiply-accumulates of one image times the bits of both operands, summed over all matrix products, "
                "in units of 10⁹."),
    ("w3a4", "3 bits for weights and 4 for activations. It includes the exception of layout paper: the first "
             "convolution or patch embedding and the classifier have 8 bits (none with layout strict). So uniform w3a4 "
             "costs more than 3 and 4 mean bits, while a plan of 3 and 4 pays for the exception out of its budget."),
    ("without training", "Quantized and calibrated on training images, no weight learned; QAT trains with the "
                         "quantizers in place."),
)  # fmt: skip
VARIATION: Definitions = (
    ("mean magnitude", "Mean absolute value of a module's tensor; its standard deviation over the modules is the SDAM "
                       "of Huang et al. (2024), divided by the mean it is free of scale."),
    ("excess kurtosis", "Heaviness of the tails: 0 for a Gaussian, larger where a few values are far out."),
    ("channel range ratio", "Largest magnitude of the widest channel over that of the median channel."),
    ("difference between modules", "For kurtosis and channel ranges: the interquartile range over the modules."),
    ("difference of cv", "Coefficient of variation (standard deviation over mean) of the modules' mean magnitudes, one "
                         "run's minus the other's, with a bootstrap interval over the modules; the Brown-Forsythe test "
                         "compares the spread of their logarithms. Modules are no independent sample: a description."),
    ("outliers", "Share of values further than 6 standard deviations from the mean."),
    ("heads", "One point a head of an attention layer: the standard deviation of its query, key, value or attention "
              "values; their spread is its coefficient of variation over the heads."),
    ("densities by kind", "Every tensor minus its mean, over its standard deviation; those of one kind of layer are "
                          "pooled, each counting alike. The height is logarithmic: a Gaussian is a dome."),
    ("channels", "Of one layer a run, that of the largest channel range ratio of its input unless another was asked "
                 "for: smallest and largest value of each channel, and mean plus and minus standard deviation."),
)  # fmt: skip
SENSITIVITY: Definitions = (
    ("site", "One tensor that can be quantized. Here one at a time is, while all else stays in floating point."),
    ("KL", "Mean Kullback-Leibler divergence of the network's answers from those in floating point, in nats; the sites "
           "are ranked by it, for it is the least noisy."),
    ("loss increase, top-1 change", "Against the floating-point network on the same images; ± one standard error of "
                                    "the difference. Negative changes are kept."),
    ("SQNR", "Power of a tensor over the power of its quantization error, in decibel: of the quantized tensor itself, "
             "and of its module's output."),
    ("rank in resampled images", "Where a site's rank lies in 95 % of bootstrap samples of the images; sites whose "
                                 "bands overlap cannot be told apart."),
    ("left out", "Everything is quantized but one group, which stays in floating point: a low bar says that it hurts."),
    ("proxy", "A score without a pass for each site. fisher: the KL to second order, from one backward pass; fit, "
              "output_gradient, hessian_trace: published scores; noise: 1/SQNR; stats_...: statistics of the tensor."),
)  # fmt: skip
PLAN: Definitions = (
    ("budget", "What the plan may cost at most; a dash leaves a cost free."),
    ("objective", "The measured change that the integer program minimises, added up over the sites as if they were "
                  "independent."),
    ("lower bound, gap", "No plan within the budget has a smaller objective than the bound; the gap is how far the "
                         "plan can be from it, relative to the objective: 0 is proved optimal."),
    ("sum of measured loss increases", "Of the chosen bits, each measured alone: a prediction, to be compared with the "
                                       "loss in the summary."),
    ("granularity", "Whether all elements of a tensor, each output channel or each attention head share a scale."),
    ("offset", "Whether the range is shifted by an offset beside the scale."),
)  # fmt: skip
TRAINING: Definitions = (
    ("loss, top-1", "Markers: cross-entropy and top-1 of the validation images; step 0 is the calibrated network "
                    "before training. Thin lines: of single batches, their loss being the sum of all terms."),
    ("best top-1", "The highest of the validation points; chosen on the images that it is measured on, it flatters."),
    ("loss terms", "What is added up and minimised, weights and ramps of the configuration included: task is the "
                   "cross-entropy with the labels, kd the divergence from the teacher's answers, obr_distance and "
                   "obr_variance the parts of oscillation-aware bin regularisation (squared distance of weights to "
                   "their grid points, variance of the weights in each bin), dampening and kurtosis others."),
    ("gradient norm", "Length of the gradient of one term over the weights: a term whose norm is far below the "
                      "others' does nothing."),
    ("oscillating", "Share of the weights of at most 4 bits whose integer code reversed its direction at least twice "
                    "in the last oscillation_window steps of the configuration."),
    ("oscillating, EMA", "Share whose moving average of reversals is above a threshold (Nagel et al., 2022); "
                         "comparable only between trainings of the same momentum."),
    ("bin edge", "Where a latent weight's integer code changes, halfway between two neighbouring grid points (the "
                 "centres of the bins). The density of weights over their distance from the nearest edge is 1 where "
                 "they are spread evenly; those that were clipped are left out."),
)  # fmt: skip
STEPS: Definitions = (
    ("status", "How the last start of a step ended."),
    ("git commit", "Of this program's checkout, with -dirty where it had changes; a dash where it was installed."),
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a section shows of one run, or of all together (`title` empty)."""

    title: str = ""
    lead: tuple[str, ...] = ()  # sentences to read first
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    folded: tuple[Table, ...] = ()  # opened on demand
    missing: tuple[str, ...] = ()  # sentences on what was not made, and the command that makes it


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section of the page: parts for all runs together above a grid with a part a run."""

    id: str
    title: str
    definitions: Definitions
    together: Part = field(default_factory=Part)
    parts: tuple[Part, ...] = ()
    wide: bool = False  # its figures need more than half a screen


def report_html(runs: Sequence[Path], variation: Sequence[Picture] | None = None) -> str:
    """The page of one or more run folders; the same folders give the same page. InputError as `read_runs`.

    `variation` are the pictures of how the runs vary, where they are drawn already.
    """
    contents = read_runs(runs)
    environment = Environment(
        loader=PackageLoader("analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    title = " and ".join(content.name for content in contents)
    return environment.get_template("report.html.jinja").render(title=title, sections=sections(contents, variation))


def sections(contents: Sequence[RunContent], variation: Sequence[Picture] | None = None) -> tuple[Section, ...]:
    """All sections, in the order of the page; `variation` as in `report_html`."""
    return (
        Section(
            id="summary", title="Summary", definitions=SUMMARY,
            together=Part(tables=_some(tables.side_by_side(contents) if len(contents) > 1 else None)),
            parts=tuple(map(_summary, contents)), wide=True,
        ),
        Section(
            id="variation", title="Variation", definitions=VARIATION,
            together=Part(pictures=tuple(figures.variation(contents) if variation is None else variation),
                          tables=_some(tables.differences_table(contents)) + _some(tables.variation_table(contents))),
            parts=tuple(map(_variation, contents)),
        ),
        Section(
            id="sensitivity", title="Sensitivity", definitions=SENSITIVITY, parts=tuple(map(_sensitivity, contents)),
            wide=True,
        ),
        Section(id="plan", title="Plan", definitions=PLAN, parts=tuple(map(_plan, contents))),
        *_where_made("front", "Pareto front", report_plan.FRONT, [_front(c) for c in contents if c.front is not None]),
        *_where_made(
            "verification", "Verification", report_plan.VERIFICATION,
            [_verification(c) for c in contents if c.verification is not None],
        ),
        Section(
            id="training", title="Training", definitions=TRAINING, parts=tuple(map(_training, contents)), wide=True,
        ),
        Section(id="steps", title="How it was made", definitions=STEPS, parts=tuple(map(_steps, contents)), wide=True),
    )  # fmt: skip


def _summary(content: RunContent) -> Part:
    missing = []
    found = set() if content.verify is None else set(content.verify["plan"])
    if "float" not in found:
        missing.append(f"The network in floating point was not evaluated yet: {_command(content, 'eval', '--float')}.")
    if "planned" not in found and content.plan is not None:
        command = _command(content, "eval", "--plan", content.folder / "plan.json")
        missing.append(f"The plan was not evaluated yet: {command}.")
    if "uniform" not in found:
        missing.append(f"Uniform bits were not evaluated yet: {_command(content, 'eval', '--uniform', 'w3a4')}.")
    for training in content.trainings:
        if training.finished and training.name not in found:
            command = _command(content, "eval", "--checkpoint", content.folder / training.name)
            missing.append(f"The training {training.name} was not evaluated yet: {command}.")
    return Part(title=content.name, tables=_some(tables.summary(content)), missing=tuple(missing))


def _variation(content: RunContent) -> Part:
    if content.stats is None:
        return _lacking(content, "No tensor was measured", _command(content, "stats", "MODEL", "--data", "DATA"))
    missing = []
    for file, what in (("channels.parquet", "heads and channels"), ("histograms.parquet", "densities")):
        if not (content.folder / file).exists():
            command = _command(content, "stats", "--overwrite")
            missing.append(f"The figures of {what} leave out this run, which has no {file}: {command}.")
    return Part(title=content.name, pictures=_some(figures.distribution(content)), missing=tuple(missing))


def _sensitivity(content: RunContent) -> Part:
    if content.sweep is None:
        return _lacking(content, "No sensitivity was measured", _command(content, "sensitivity"))
    return Part(
        title=content.name,
        pictures=tuple(figures.sensitivity(content)),
        tables=_some(report_sensitivity.most_sensitive(content)) + _some(report_sensitivity.proxy_ranks(content)),
    )


def _plan(content: RunContent) -> Part:
    if content.plan is None:
        command = _command(content, "plan", "--weight-bits", 3, "--activation-bits", 4)
        return _lacking(content, "No bits were planned", command)
    return Part(
        title=content.name,
        pictures=_some(figures.plan(content)),
        tables=_some(tables.certificate(content)),
        folded=_some(tables.planned_sites(content)),
    )


def _front(content: RunContent) -> Part:
    return Part(
        title=content.name,
        missing=report_plan.other_plan(content, content.front, "Pareto front", "--pareto"),
        lead=report_plan.front_sentences(content),
        pictures=_some(figures.front(content)),
        folded=report_plan.front_tables(content),
    )


def _verification(content: RunContent) -> Part:
    return Part(
        title=content.name,
        missing=report_plan.other_plan(content, content.verification, "verification", "--verify"),
        lead=report_plan.verification_sentences(content),
        pictures=_some(figures.verification(content)),
        tables=_some(report_plan.verification_table(content)),
    )


def _where_made(name: str, title: str, definitions: Definitions, parts: Sequence[Part]) -> tuple[Section, ...]:
    """A section of the runs that have it; none where no run has."""
    return (Section(id=name, title=title, definitions=definitions, parts=tuple(parts), wide=True),) if parts else ()


def _training(content: RunContent) -> Part:
    if not content.trainings:
        bits = ("--uniform", "w3a4") if content.plan is None else ()  # its own plan
        return _lacking(content, "No network was trained", _command(content, "train", *bits))
    return Part(
        title=content.name,
        pictures=tuple(figures.trainings(content)),
        tables=(*_some(tables.trained(content)), *_some(tables.gradient_norms(content))),
        folded=_some(tables.configuration(content)),
    )


def _steps(content: RunContent) -> Part:
    made = tables.provenance(content)
    if not made:
        text = f"{content.folder} has no run.json that says how its tables were made; every `qvw` step writes one."
        return Part(title=content.name, missing=(text,))
    return Part(title=content.name, tables=made)


def _command(content: RunContent, step: str, *arguments: object) -> str:
    """The command that makes what is missing, between backticks."""
    words = ["qvw", step, "--run", str(content.folder), *map(str, arguments)]
    return f"`{shlex.join(words)}` does it"


def _lacking(content: RunContent, what: str, command: str) -> Part:
    return Part(title=content.name, missing=(f"{what} yet: {command}.",))


def _some(thing: T | None) -> tuple[T, ...]:
    return () if thing is None else (thing,)
