"""How long a command takes to answer wrong input or to show its help: seconds on the clock and of the processor.

    python benchmarks/first_word.py [--rounds 5]

Each command is a process of its own; median and range over the rounds. Aims: 1 s for an answer, 0.3 s for help.
The last line is one JSON object: the slowest median of the answers and of the help pages, in seconds on the clock.
"""

import sys
from pathlib import Path

if not __package__:  # as a script: this folder's statistics.py would hide Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import resource
import subprocess
import tempfile
import time
from statistics import median

import click

from analysis.cli import cli

ANSWERS = (
    "plan --run runs/nope --weight-bits 3", "plan --run runs/nope --like 3w4a", "stats resnet19 --run r",
    "stats gone.py:build --run r", "stats resnet18 --data folder:gone --run r", "sensitivity --run r --data digits",
    "eval resnet18 --data csv:gone.csv --float --run r", "train resnet18 --data digits --run r --set lr=x",
    "soft-labels resnet19 --data digits --out s", "report nope --out o", "compare nope gone --out o",
    "plan-diff a.json b.json", "models no_such_net", "sensitivity resnet18 --data digits --run r --task segmentaton",
)  # fmt: skip


@click.command(help=__doc__)
@click.option("--rounds", default=5, show_default=True)
def main(rounds: int) -> None:
    """Print a line a command and a JSON object."""
    result = {}
    print(f"{'command':84}{'seconds (range)':>22}{'of processor':>14}")
    pages = ("--help", *(f"{name} --help" for name in sorted(cli.commands)))
    for kind, commands, code in (("answer", ANSWERS, 2), ("help", pages, 0)):
        slowest = 0.0
        for command in commands:
            seconds, busy = zip(*(timed(command.split(), code) for _ in range(rounds)), strict=True)
            slowest = max(slowest, median(seconds))
            shown = f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
            print(f"{command:84}{shown:>22}{median(busy):14.2f}", flush=True)
        result[kind] = round(slowest, 3)
    print(json.dumps(result))


def timed(arguments: list[str], code: int) -> tuple[float, float]:
    """Seconds on the clock and of the processor of one command, which must end with `code`."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {sys.path[0]!r}); from analysis.cli import main; "
             "main(sys.argv[1:])", *arguments], cwd=folder, capture_output=True, text=True,
        )  # fmt: skip
        seconds = time.perf_counter() - started
    if done.returncode != code:
        raise SystemExit(f"{' '.join(arguments)}: exit code {done.returncode}, expected {code}.\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
