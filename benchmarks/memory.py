"""What it is worth to keep freed memory: processor time, page faults and peak memory with it and without.

    python benchmarks/memory.py [--rounds 5] [--batches 4] [--batch-size 16] [--weights FILE.safetensors]

The forward pass of EfficientNet-Lite0 at 224 x 224 pixels on one thread, after one batch that is not counted. Each
measurement is a process of its own; those with reuse (`analysis.memory.reuse_freed_memory`) and without alternate. The
weights are random unless a file is given; they change no figure. Processor seconds are those of the process, in user
and kernel mode. Page faults are those the kernel serves by clearing a page. On a machine without glibc both sides are
the same.

The last line is one JSON object: medians of the processor seconds and of the page faults of each side, their ratios,
and the peak memory in MiB.
"""

import sys
from pathlib import Path

if not __package__:  # as a script: this folder's statistics.py would hide Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import os
import resource
import subprocess
from statistics import median

import click

from analysis.memory import VARIABLE, reuse_freed_memory

FIGURES = {"seconds": "processor seconds", "kernel": "of them in kernel", "faults": "page faults", "peak": "MiB peak"}


@click.command(help=__doc__)
@click.option("--rounds", default=5, show_default=True)
@click.option("--batches", default=4, show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--weights", type=click.Path(exists=True, dir_okay=False))
@click.option("--measure", is_flag=True, hidden=True, help="Measure in this process.")
def main(rounds: int, batches: int, batch_size: int, weights: str | None, measure: bool) -> None:
    """Print a line a figure and a JSON object."""
    if measure:
        print(json.dumps(measured(batches, batch_size, weights)))
        return
    found: dict[str, list[dict[str, float]]] = {"0": [], "1": []}
    for _ in range(rounds):
        for reuse, rows in found.items():
            rows.append(_in_own_process(reuse, batches, batch_size, weights))
    medians = {reuse: {name: median(row[name] for row in rows) for name in FIGURES} for reuse, rows in found.items()}
    print(f"EfficientNet-Lite0, {batches} batches of {batch_size} images, one thread, medians of {rounds} processes")
    print(f"{'':24}{'without (range)':>32}{'with reuse (range)':>32}{'ratio':>8}")
    for name, title in FIGURES.items():
        cells = [
            f"{medians[reuse][name]:,.{2 if name in ('seconds', 'kernel') else 0}f}"
            f" ({min(r[name] for r in rows):,.3g} to {max(r[name] for r in rows):,.3g})"
            for reuse, rows in found.items()
        ]
        print(f"{title:24}{cells[0]:>32}{cells[1]:>32}{_ratio(medians, name):8.3f}")
    print(json.dumps({
        "seconds_without": medians["0"]["seconds"], "seconds_with": medians["1"]["seconds"],
        "seconds_ratio": round(_ratio(medians, "seconds"), 3),
        "faults_without": medians["0"]["faults"], "faults_with": medians["1"]["faults"],
        "faults_ratio": round(_ratio(medians, "faults"), 4),
        "peak_mib_without": medians["0"]["peak"], "peak_mib_with": medians["1"]["peak"],
    }))  # fmt: skip


def measured(batches: int, batch_size: int, weights: str | None) -> dict[str, float]:
    """Processor seconds, page faults and peak memory of the batches after the first, in this process."""
    reuse_freed_memory()  # the environment says whether
    import timm
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    if weights is not None:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(weights))
    images = torch.randn(batch_size, 3, 224, 224)
    with torch.inference_mode():
        model(images)
        before = resource.getrusage(resource.RUSAGE_SELF)
        for _ in range(batches):
            model(images)
        after = resource.getrusage(resource.RUSAGE_SELF)
    kernel = after.ru_stime - before.ru_stime
    return {
        "seconds": after.ru_utime - before.ru_utime + kernel, "kernel": kernel,
        "faults": after.ru_minflt - before.ru_minflt,
        "peak": after.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),
    }  # fmt: skip


def _in_own_process(reuse: str, batches: int, batch_size: int, weights: str | None) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", "--batches", str(batches), "--batch-size", str(batch_size)]
    command += [] if weights is None else ["--weights", weights]
    done = subprocess.run(
        command, env=os.environ | {VARIABLE: reuse, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def _ratio(medians: dict[str, dict[str, float]], name: str) -> float:
    return medians["1"][name] / max(medians["0"][name], 1e-9)


if __name__ == "__main__":
    main()
