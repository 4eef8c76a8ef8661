"""What the statistics cost: time beside a plain forward pass, and memory beside it.

    python benchmarks/statistics.py [MODEL ...] [--rounds 5] [--batches 8] [--threads 1]

A round runs, one after the other on the same images: the plain forward; the statistics of inputs, outputs and weights
of every convolution and linear, everything on; the same of every site that `qvw stats` observes (normalisations,
blocks and attention too); and torch's HistogramObserver, which takes range and histogram only, on the same inputs and
outputs. Ratios are to the plain forward of the same round; median and range over the rounds are printed. Weights are
measured once and tables made once, whatever the number of images: their seconds are apart.

Memory is the peak of the resident set of a process of its own, less that of one that runs plain forwards. The compiled
pass brings numba, about 100 MiB of code, which is stated apart: that process has it imported too.

The last line is one JSON object: the ratio of the layers' statistics, weights and tables included, of each model.
"""

import sys
from pathlib import Path

if not __package__:  # as a script: this folder's statistics.py would hide Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median

import click
import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.ao.quantization import HistogramObserver

from analysis.memory import reuse_freed_memory
from analysis.statistics.fused_pass import fused_pass
from analysis.tensor_stats import measure_activations, measure_weights, start_activations, stats_tables
from quant.intercept import intercept
from quant.network import Network
from quant.site import SiteInfo
from quant.sites import is_layer

MODELS = ("resnet18", "swin_tiny_patch4_window7_224")
BATCH = 16


class Subject:
    """A network with random weights and some batches of random images; the statistics that are measured."""

    def __init__(self, name: str, batches: int) -> None:
        torch.manual_seed(0)
        self.name, self.model = name, timm.create_model(name).eval()
        size = self.model.pretrained_cfg["input_size"]
        self.images = [torch.randn(BATCH, *size) for _ in range(batches)]
        self.net = Network(self.model, self.images[0], name=name)
        self.every_site = self.net.infos
        layers = {name for name, module in self.model.named_modules() if is_layer(module)}
        self.layer_sites = [
            info for info in self.every_site
            if info.site.module in layers and (info.site.is_weight or info.site.tensor in ("input", "output"))
        ]  # fmt: skip
        self.once: list[float] = []

    def plain(self) -> None:
        """The forward pass alone."""
        with torch.inference_mode():
            for images in self.images:
                self.model(images)

    def layers(self) -> None:
        """Activations of the layers; the seconds for weights and tables go to `once`."""
        self._statistics(self.layer_sites, self.once)

    def everything(self) -> None:
        """Activations of every site."""
        self._statistics(self.every_site, [])

    def histogram_observer(self) -> None:
        """HistogramObserver on inputs and outputs of the layers."""
        handlers = {}
        for info in self.layer_sites:
            if not info.site.is_weight:
                handlers[info.site] = _observing(HistogramObserver())
        with torch.no_grad(), intercept(self.net, handlers):
            for images in self.images:
                self.model(images)

    def _statistics(self, sites: list[SiteInfo], once: list[float]) -> None:
        start = time.perf_counter()
        measured = measure_weights(self.model, sites)
        once.append(time.perf_counter() - start)
        running = start_activations(sites)
        measure_activations(self.net, sites, self._named(), running)
        measured |= running
        start = time.perf_counter()
        stats_tables(self.net, sites, measured, with_activations=True)
        once[-1:] = [once[-1] + time.perf_counter() - start] if once else []

    def _named(self) -> Iterator[tuple[Tensor, list[str]]]:
        for images in self.images:
            yield images, [str(i) for i in range(len(images))]


def _observing(observer: nn.Module) -> Callable[[Tensor], None]:
    def handler(x: Tensor) -> None:
        observer(x)

    return handler


def _peak_mib(name: str, work: str, batches: int, threads: int) -> float:
    """Peak resident set while `work` runs on `batches` batches, after a plain pass; Linux only."""
    torch.set_num_threads(threads)
    subject = Subject(name, batches)
    subject.plain()
    fused_pass(np.zeros((2, 2, 32), dtype=np.float32), 0.0, 1)  # numba's own code is not what is asked for
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    getattr(subject, work)()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024


def _peak_in_own_process(name: str, work: str, batches: int, threads: int) -> float:
    # Without a fixed threshold glibc keeps what was freed, and the resident set says little.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 17)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_mib, name, work, batches, threads).result()


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@click.command(help=__doc__)
@click.argument("models", nargs=-1)
@click.option("--rounds", default=5, show_default=True)
@click.option("--batches", default=8, show_default=True, help=f"Of {BATCH} images.")
@click.option("--threads", default=1, show_default=True)
def main(models: tuple[str, ...], rounds: int, batches: int, threads: int) -> None:
    """Print one block a model."""
    reuse_freed_memory()
    torch.set_num_threads(threads)
    print(f"torch {torch.__version__}, {threads} thread(s), {rounds} rounds of {batches} batches of {BATCH} images")
    result = {}
    for name in models or MODELS:
        subject = Subject(name, batches)
        works = (subject.layers, subject.everything, subject.histogram_observer)
        _seconds(subject.layers)  # compiles, and warms the caches
        subject.once.clear()
        ratios: dict[str, list[float]] = {work.__name__: [] for work in works}
        plain = []
        for _ in range(rounds):
            plain.append(_seconds(subject.plain))
            for work in works:
                ratios[work.__name__].append(_seconds(work) / plain[-1])
        per_batch = median(plain) / batches
        print(f"\n{name}: plain forward {per_batch:.3f} s a batch")
        for label, values in ratios.items():
            print(f"  {label:20s} {median(values):.2f}  ({min(values):.2f} to {max(values):.2f})")
        once = median(subject.once)
        whole = median(ratios["layers"])
        result["_".join(name.split("_")[:2])] = round(whole, 3)
        streamed = whole - once / per_batch / batches
        print(f"  of layers, once      {once:.2f} s for weights and tables; without it {streamed:.2f}")
        for few_or_many in (2, max(3, batches)):
            peaks = {w: _peak_in_own_process(name, w, few_or_many, threads) for w in ("plain", "layers", "everything")}
            more = ", ".join(f"{w} +{peak - peaks['plain']:.0f} MiB" for w, peak in peaks.items() if w != "plain")
            print(f"  memory, {few_or_many} batches     plain {peaks['plain']:.0f} MiB, {more}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
