"""`qvw plan` and `qvw plan-diff`: the command line of the planner."""

from pathlib import Path
from typing import Any

import click

from analysis.commands.first_word import first_word
from analysis.commands.options import BitWidths, quiet_option


@click.command(short_help="Bits for every site within a budget.")
@click.option("--run", type=click.Path(file_okay=False, path_type=Path), required=True,
              help="The run folder, which holds `qvw sensitivity`.")  # fmt: skip
@click.option("--weight-bits", type=click.FloatRange(min=0, min_open=True), help="Mean bits of all weights.")
@click.option("--activation-bits", type=click.FloatRange(min=0, min_open=True), help="Mean bits of all activations.")
@click.option(
    "--size-mib",
    type=click.FloatRange(min=0, min_open=True),
    help="Size of the whole model; what is not planned has 32 bits.",
)
@click.option("--gbitops", type=click.FloatRange(min=0, min_open=True), help="10^9 bit operations of one image.")
@click.option("--activation-mib", type=click.FloatRange(min=0, min_open=True),
              help="Size of all quantized activations of one image.")  # fmt: skip
@click.option("--latency-ms", type=click.FloatRange(min=0, min_open=True), help="Milliseconds, by --latency.")
@click.option("--latency", type=click.Path(path_type=Path), metavar="FILE.csv",
              help="What each site costs in time: module, tensor, bit_width, milliseconds.")  # fmt: skip
@click.option("--candidates", type=BitWidths(), show_default="all that were measured",
              help="Bit-widths to choose from: 2,4,8 or 2-8 or 2-4,8.")  # fmt: skip
@click.option("--like", metavar="wXaY", help="The mean bits that these uniform bits take, such as w3a4.")
@click.option("--candidates-of", multiple=True, metavar="KIND=BITS",
              help="Bit-widths of a kind, such as 'mlp.fc2=4,8' or 'attn.*=4-8'; repeatable.")  # fmt: skip
@click.option("--objective",
              help="What is to grow least: kl (the default), loss, logit_nmse, top1, a proxy (fisher).")  # fmt: skip
@click.option("--scores", type=click.Path(path_type=Path), metavar="FILE.csv",
              help="Your own scores in place of the objective: module, tensor, bit_width, score.")  # fmt: skip
@click.option("--robust", is_flag=True, help="Plan with the upper 95 % bound of each measured change.")
@click.option("--interactions", is_flag=True,
              help="Count what the errors of two sites cost together, from `qvw sensitivity --proxies`.")  # fmt: skip
@click.option("--pin", multiple=True, metavar="PATTERN=BITS", help="Fix the bits of modules that match; repeatable.")
@click.option("--bounds", multiple=True, metavar="PATTERN=LOW-HIGH", help="Limits of their bits; repeatable.")
@click.option("--tie", multiple=True, metavar="PATTERN",
              help="Share their bits: 'a:input,b:input'; qkv: query, key, value of each attention; shared: "
                   "inputs that are the same tensor, as of the two branches of a residual block.")  # fmt: skip
@click.option("--layout", type=click.Choice(["paper", "strict"]), default="paper", show_default=True,
              help="paper: first layer and classifier at 8 bit; strict: no exception.")  # fmt: skip
@click.option("--pareto", is_flag=True, help="Also the best plan at 17 budgets of each kind, with a figure.")
@click.option("--verify", is_flag=True,
              help="Measure it beside uniform, greedy, worst-first and random bits at the budget.")  # fmt: skip
@click.option("--images", type=click.IntRange(min=1), help="Validation images of --verify; by default all.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Of --verify.")
@click.option("--num-workers", type=click.IntRange(min=0), default=2, show_default=True, help="Of --verify.")
@click.option("--device", default="cpu", show_default=True, help="Of --verify.")
@click.option("--task", metavar="NAME|FILE.py:FUNCTION",
              help="Of --verify: what the output means; by default the run folder's.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="The plan file; by default RUN/plan.json.")
@quiet_option
def plan(run: Path, **options: Any) -> None:
    """The bit plan that hurts least within the budgets, by an exact integer program, with its certificate.

    Needs `qvw sensitivity` in the same run folder. Writes plan.json, plan.csv and plan.png; with --pareto
    pareto.parquet and pareto.png; with --verify rows of verify.parquet, and verification.parquet, where the predicted
    change stands beside the measured one.
    """
    from analysis.planning.request import PlanRequest
    from analysis.steps.plan_files import checked_files

    request = PlanRequest.of(options)
    first_word(lambda: checked_files(run, request))
    from analysis.steps.plan import run_plan  # after the check: it imports torch

    run_plan(run, request)


@click.command(name="plan-diff", short_help="Two plans site by site.")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--csv", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Write every site: bits and bytes in A and B, change, note.")  # fmt: skip
@quiet_option
def plan_diff(a: Path, b: Path, csv: Path | None, quiet: bool) -> None:
    """What two plans cost, and the sites in which they differ. A and B are plan files or run folders.

    Bytes of each site are there where both are run folders with cost.parquet. The exit code is 0 also where the plans
    differ; 2 where one cannot be read.
    """
    from analysis.storage.plan_file import read_plan_file

    first_word(lambda: [read_plan_file(path) for path in (a, b)])
    from analysis.steps.plan_diff import run_plan_diff  # after the check: it imports pandas

    run_plan_diff(a, b, csv=csv, quiet=quiet)
