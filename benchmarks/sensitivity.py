"""What the sensitivity sweep costs: its time beside a plain loop of full forward passes over the same sites.

    python benchmarks/sensitivity.py [MODEL ...] [--images 32] [--batch-size 16] [--every 1] [--rounds 1] [--threads 1]

Weights of every convolution and linear at 2, 4 and 8 bit, each alone, networks with random weights on random images,
BatchNorm as stored. The plain loop does for each site and bit-width what any tool does at least: estimate the scale,
quantize the weight, run the whole network on all images, compare the logits. Ours gives the same figures to the bit
(checked here), and the SQNR of each module's output besides. The two sides alternate from round to round; a round takes
minutes, and `--every 4` takes one site in four.

Where nvidia-modelopt is installed (`pip install '.[peers]'`), its `auto_quantize(method="kl_div")` does the same work
too, whole layers where ours takes query, key and value of a fused weight apart.

The last line is one JSON object: our time over the plain loop's, set-up included, of each model.
"""

import sys
from pathlib import Path

if not __package__:  # as a script: this folder's statistics.py would hide Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import copy
import importlib.util
import json
import os
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from statistics import median
from typing import Any

import click
import timm
import torch
from torch import Tensor, nn

from analysis.memory import reuse_freed_memory
from analysis.scoring import compare, outputs_of, reference_of
from analysis.sensitivity import SweepConfig, sweep_keys
from analysis.sweeps.sweep import sweep
from analysis.tasks import classification
from quant.calibrate import default_scheme, make_quantizer
from quant.insertion import quantized
from quant.network import Network
from quant.site import Site

MODELS = ("resnet18", "swin_tiny_patch4_window7_224", "deit_tiny_patch16_224")
FIGURES = ("loss", "delta_loss", "kl", "kl_se", "logit_nmse")


def plain_loop(net: Network, batches: list[tuple[Tensor, Tensor]], keys: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of each key by a full pass over all images."""
    task = classification()
    run = partial(task.forward, net.model)
    reference = reference_of(task, outputs_of(run, batches, task), batches)
    rows = []
    for key in keys:
        info = net.by_site[Site(key["module"], key["tensor"])]
        scheme = default_scheme(net.model, info, key["bit_width"], sample=None)
        quantizer = make_quantizer(net.model, info, scheme, sample=None, estimator=key["estimator"])
        with quantized(net, {info.site: quantizer}):
            outputs = outputs_of(run, batches, task)
        rows.append(key | compare(task, outputs, reference, batches)[0])
    return rows


def modelopt_search(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float | None:
    """Seconds of ModelOpt's search over the layers' weights at 2, 4 and 8 bit by KL divergence; None without it."""
    if importlib.util.find_spec("modelopt") is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq
    formats = [
        {"quant_cfg": {"*weight_quantizer": {"num_bits": bits, "axis": 0}, "*input_quantizer": {"enable": False},
                       "default": {"enable": False}}, "algorithm": "max"}
        for bits in (2, 4, 8)
    ]  # fmt: skip
    start = time.perf_counter()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        mtq.auto_quantize(
            copy.deepcopy(model), constraints={"effective_bits": 5.0}, quantization_formats=formats,
            data_loader=[images for images, _ in batches], forward_step=lambda m, images: m(images),
            num_calib_steps=1, num_score_steps=len(batches), method="kl_div",
        )  # fmt: skip
    return time.perf_counter() - start


@click.command(help=__doc__)
@click.argument("models", nargs=-1)
@click.option("--images", default=32, show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--every", default=1, show_default=True, help="One site in so many.")
@click.option("--rounds", default=1, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(models: tuple[str, ...], images: int, batch_size: int, every: int, rounds: int, threads: int) -> None:
    """Print one line a model."""
    reuse_freed_memory()
    torch.set_num_threads(threads)
    result = {}
    for name in models or MODELS:
        torch.manual_seed(0)
        kwargs = {"zero_init_last": False} if name.startswith("resnet") else {}
        model = timm.create_model(name, **kwargs).eval()
        size = model.pretrained_cfg["input_size"]
        labels = torch.randint(1000, (images,))
        batches = list(zip(torch.randn(images, *size).split(batch_size), labels.split(batch_size), strict=True))
        net = Network(model, batches[0], name=name)
        sites = [info for info in net.infos if info.quantizable and info.site.is_weight][::every]
        config = SweepConfig(bit_widths=(2, 4, 8), batchnorm="stored")
        keys = sweep_keys(model, sites, config)
        ratios, seconds = [], []
        for _ in range(rounds):
            start = time.perf_counter()
            ours = list(sweep(net, sites, batches, keys, task=classification()))
            middle = time.perf_counter()
            plain = plain_loop(net, batches, keys)
            seconds.append((middle - start, time.perf_counter() - middle))
            ratios.append(seconds[-1][0] / seconds[-1][1])
            assert all(a[figure] == b[figure] for a, b in zip(ours, plain, strict=True) for figure in FIGURES)
        mine, theirs = (median(side) for side in zip(*seconds, strict=True))
        peer = modelopt_search(model, batches) if every == 1 else None
        beside = "" if peer is None else f"; ModelOpt kl_div {peer:.1f} s, ours over it {mine / peer:.2f}"
        print(
            f"{name}: {len(sites)} sites, {images} images: sweep {mine:.1f} s, plain loop {theirs:.1f} s, "
            f"ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}){beside}",
            flush=True,
        )
        result["_".join(name.split("_")[:2])] = round(median(ratios), 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
