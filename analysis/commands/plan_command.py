"""`qvw plan` and `qvw plan-diff`: the command line of the planner."""

from pathlib import Path
from typing import Any

import click

from analysis.commands.first_word import first_word
from analysis.commands.shared_options import BitWidths, Bytes, quiet_option


@click.command(short_help="Choose bit-widths within a budget.")
@click.option("--run", type=click.Path(file_okay=False, path_type=Path), required=True,
              help="The run folder, after `qvw sensitivity`.")  # fmt: skip
@click.option("--weight-bits", type=click.FloatRange(min=0, min_open=True), help="Mean bits of all weights.")
@click.option("--activation-bits", type=click.FloatRange(min=0, min_open=True), help="Mean bits of all activations.")
@click.option(
    "--size",
    "size_bytes",
    type=Bytes(),
    help="Size of the packed file: 50KB, 1.5MiB; a plain number is bytes.",
)
@click.option("--gbitops", type=click.FloatRange(min=0, min_open=True), help="GBitOps per image (10^9 bit operations).")
@click.option("--activation-mib", type=click.FloatRange(min=0, min_open=True),
              help="Size of all quantized activations per image.")  # fmt: skip
@click.option(
    "--latency-ms",
    type=click.FloatRange(min=0, min_open=True),
    help="Latency in milliseconds, from the table of --latency.",
)
@click.option("--latency", type=click.Path(path_type=Path), metavar="FILE.csv",
              help="Latency of each site: columns module, tensor, bit_width, milliseconds.")  # fmt: skip
@click.option("--candidates", type=BitWidths(), show_default="all that were measured",
              help="Bit-widths to choose from: 2,4,8 or 2-8 or 2-4,8.")  # fmt: skip
@click.option("--like", metavar="wXaY", help="Same mean bits as uniform bits such as w3a4.")
@click.option("--candidates-of", multiple=True, metavar="KIND=BITS",
              help="Bit-widths of a kind, such as 'mlp.fc2=4,8' or 'attn.*=4-8'; repeatable.")  # fmt: skip
@click.option("--objective",
              help="What to minimize: divergence (the default; kl for classifiers), loss, score, metric, top1, "
                   "logit_nmse, or a proxy such as fisher.")  # fmt: skip
@click.option("--scores", type=click.Path(path_type=Path), metavar="FILE.csv",
              help="Your own scores instead of an objective: columns module, tensor, bit_width, score.")  # fmt: skip
@click.option("--robust", is_flag=True, help="Minimize the upper 95 % bound of each measured change.")
@click.option("--interactions/--no-interactions", default=None,
              show_default="with --verify where they measurably help",
              help="Include interactions between sites, from `qvw sensitivity --proxies`.")  # fmt: skip
@click.option("--pin", multiple=True, metavar="PATTERN=BITS", help="Fix the bits of modules that match; repeatable.")
@click.option(
    "--bounds", multiple=True, metavar="PATTERN=LOW-HIGH", help="Limit the bits of modules that match; repeatable."
)
@click.option("--tie", multiple=True, metavar="PATTERN",
              help="Give sites the same bits: 'a:input,b:input'; qkv: query, key and value of each attention; shared: "
                   "inputs that are the same tensor, as in the two branches of a residual block.")  # fmt: skip
@click.option("--layout", type=click.Choice(["paper", "strict"]), default="paper", show_default=True,
              help="paper: first layer and classifier at 8 bits; strict: no exception.")  # fmt: skip
@click.option("--pareto", is_flag=True, help="Also compute the best plan at 17 budgets of each kind, with a figure.")
@click.option("--verify", is_flag=True,
              help="Measure it beside uniform, greedy, worst-first and random bits of the same budget.")  # fmt: skip
@click.option("--images", type=click.IntRange(min=1), help="Validation images for --verify; by default all.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="For --verify.")
@click.option("--num-workers", type=click.IntRange(min=0), default=2, show_default=True, help="For --verify.")
@click.option("--device", default="cpu", show_default=True, help="For --verify.")
@click.option("--task", metavar="NAME|FILE.py:FUNCTION",
              help="For --verify: what the output means; by default the run folder's.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="The plan file; by default RUN/plan.json.")
@quiet_option
def plan(run: Path, **options: Any) -> None:
    """Choose bit-widths that minimize accuracy loss under a budget (exact integer program).

    Needs `qvw sensitivity` in the same run folder. Writes plan.json, plan.csv and plan.png; with --pareto also
    pareto.parquet and pareto.png; with --verify also rows of verify.parquet, and verification.parquet, which compares
    predicted and measured changes.
    """
    from analysis.planning.plan_request import PlanRequest
    from analysis.steps.plan_files import checked_files

    request = PlanRequest.of(options)
    first_word(lambda: checked_files(run, request))
    from analysis.steps.plan_step import run_plan  # after the check: it imports torch

    run_plan(run, request)


@click.command(name="plan-diff", short_help="Compare two plans site by site.")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--csv", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Write all sites: bits and bytes in A and B, change, note.")  # fmt: skip
@quiet_option
def plan_diff(a: Path, b: Path, csv: Path | None, quiet: bool) -> None:
    """Compare the cost of two plans and list the sites that differ. A and B are plan files or run folders.

    Bytes per site are included if both are run folders with cost.parquet. The exit code is 0 even if the plans differ,
    and 2 if one cannot be read.
    """
    from analysis.storage.plan_file import read_plan_file

    first_word(lambda: [read_plan_file(path) for path in (a, b)])
    from analysis.steps.plan_diff import run_plan_diff  # after the check: it imports pandas

    run_plan_diff(a, b, csv=csv, quiet=quiet)
