"""What quantization-aware training costs: a training step at 4 bits beside the same step in floating point.

    python benchmarks/qat_step.py [NAME ...] [--rounds 5] [--batch-size 16] [--threads 1] [--no-memory]

NAME is `resnet18`, `deit_tiny` or `deit_tiny_attention_obr`. A step is forward, cross-entropy, backward and AdamW, on
random images, of a network with random weights. Quantized are the weights and inputs of all layers at 4 bits, the first
layer and the classifier at 8, with learned scales; in `deit_tiny_attention_obr` also query, key, value and attention,
with the oscillation-aware term in the loss, against a float step whose attention is not fused. Each side is measured
with the fake quantization as it is and through torch.compile (`--set compile=true`), where that works. The sides
alternate within a round. `qvw train` also tracks oscillation (0.7 % of a deit_tiny step) and asks a teacher, if it has
one: neither is in the step. Another line is the time of each term on the weights, alone, over our step's without them.

Beside ours the same network where another library fake-quantizes in place of ours, if it is installed: torchao (range
learning) and Brevitas (learned scales, one a tensor: less work than ours).

Peak memory is of one step in a process of its own, on Linux. The last line is one JSON object: time over the float
step's, through the compiler where it works.
"""

import sys
from pathlib import Path

if not __package__:  # as a script: this folder's statistics.py would hide Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import importlib.util
import json
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median

import click
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.cost import cost_table
from analysis.memory import reuse_freed_memory
from analysis.planning.bit_options import uniform_bits
from quant.calibrate import default_scheme, make_quantizer, observe_activations
from quant.config import QATConfig
from quant.errors import InputError
from quant.functional import check_compiler
from quant.insertion import attach_quantizers_, latent_weights
from quant.loss_terms import weight_terms
from quant.network import Network
from quant.quantizer import LSQQuantizer
from quant.scheme import QuantScheme

MODELS = {
    "resnet18": "resnet18",
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_tiny_attention_obr": "deit_tiny_patch16_224",
}
TERMS = {
    "none": QATConfig(obr_weight=0.0),
    "OBR": QATConfig(obr_weight=0.01),
    "dampening": QATConfig(obr_weight=0.0, dampening_weight=0.1),
    "kurtosis": QATConfig(obr_weight=0.0, kurtosis_weight=1.0),
}
PROGRESS = 0.6  # of the training: past the start of the ramp
CALIBRATION_IMAGES = 4


class Step:
    """One training step of a network, of a side: `float`, `ours`, `compiled`, `torchao`, `brevitas`."""

    def __init__(self, name: str, side: str, batch_size: int) -> None:
        torch.manual_seed(0)
        attention = name.endswith("_attention_obr")
        kwargs = {"zero_init_last": False} if name.startswith("resnet") else {}
        self.model = timm.create_model(MODELS[name], **kwargs)
        size = self.model.pretrained_cfg["input_size"]
        self.images, self.labels = torch.randn(batch_size, *size), torch.randint(1000, (batch_size,))
        if side != "float":
            self._quantize(attention, compiled=side == "compiled")
        elif attention:
            for module in self.model.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = False
        if side in PEERS:
            PEERS[side](self.model, self.images[:1])
        self.weights = latent_weights(self.model) if side in ("ours", "compiled") else {}
        self.config = TERMS["OBR"] if attention and self.weights else TERMS["none"]
        self.quantizers = [module for module in self.model.modules() if isinstance(module, LSQQuantizer)]
        self.optimizer = torch.optim.AdamW(self.model.train().parameters(), lr=1e-5)

    def _quantize(self, attention: bool, *, compiled: bool) -> None:
        images = self.images[:CALIBRATION_IMAGES]
        net = Network(self.model, images)
        bits = uniform_bits(cost_table(net.infos), 4, 4, "paper")
        wanted = {site: net.by_site[site] for site in bits if attention or not site.is_attention}
        samples = observe_activations(net, wanted, [images], count=1)
        quantizers = {}
        for site, info in wanted.items():
            sample = samples.get(site)
            scheme = default_scheme(self.model, info, bits[site], sample=sample)
            quantizers[site] = make_quantizer(self.model, info, scheme, sample=sample, estimator="minmax")
        attach_quantizers_(net, quantizers, compiled=compiled)

    def __call__(self) -> float:
        """Do one; its seconds."""
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(self.images), self.labels)
        loss = sum(weight_terms(self.weights, self.config, PROGRESS).values(), loss)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        for quantizer in self.quantizers:
            quantizer.clamp_scale_()
        return time.perf_counter() - start

    def term(self, name: str) -> float:
        """Seconds of one term of the weights, forward and backward; what a step leaves takes its gradient."""
        start = time.perf_counter()
        torch.stack(list(weight_terms(self.weights, TERMS[name], PROGRESS).values())).sum().backward()
        return time.perf_counter() - start


class Foreign(nn.Module):
    """A quantizer of another library in the place of ours; it sees rows, each with one scale, or one row."""

    def __init__(self, quantizer: nn.Module, rows: int) -> None:
        super().__init__()
        self.quantizer, self.rows = quantizer, rows

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the other library's grid."""
        return self.quantizer(x.reshape(self.rows, -1)).view(x.shape)


def _replace_(model: nn.Module, make: Callable[[LSQQuantizer, QuantScheme], nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LSQQuantizer):
                setattr(module, name, make(child, child.scheme))


def _torchao_(model: nn.Module, image: Tensor) -> None:
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer, initialize_fake_quantizers

    def make(ours: LSQQuantizer, scheme: QuantScheme) -> nn.Module:
        dtype = {4: torch.int4, 8: torch.int8}[scheme.bit_width]
        config = IntxFakeQuantizeConfig(
            dtype, "per_channel", is_symmetric=True, is_dynamic=False, range_learning=True
        )  # fmt: skip
        return Foreign(IntxFakeQuantizer(config), ours.groups if scheme.granularity == "per_channel" else 1)

    _replace_(model, make)
    initialize_fake_quantizers(model, (image,))


def _brevitas_(model: nn.Module, image: Tensor) -> None:
    from brevitas.inject.enum import ScalingImplType
    from brevitas.nn import QuantIdentity
    from brevitas.quant import Int8ActPerTensorFloat

    def make(ours: LSQQuantizer, scheme: QuantScheme) -> nn.Module:
        reach = ours.scale.mean().item() * scheme.quant_max
        return Foreign(
            QuantIdentity(
                Int8ActPerTensorFloat, bit_width=scheme.bit_width, return_quant_tensor=False,
                scaling_impl_type=ScalingImplType.PARAMETER, scaling_init=reach,
            ), 1,
        )  # fmt: skip

    _replace_(model, make)
    model(image)


PEERS = {"torchao": _torchao_, "brevitas": _brevitas_}


def sides_of(name: str) -> list[str]:
    """What can be measured here, the float step first."""
    sides = ["float", "ours"]
    try:
        check_compiler(torch.device("cpu"))
        sides.append("compiled")
    except InputError as error:
        print(f"without the compiler: {error}")
    if name.endswith("_attention_obr"):
        return sides
    return sides + [peer for peer in PEERS if importlib.util.find_spec(peer)]


def _peak_mib(name: str, side: str, batch_size: int, threads: int) -> float:
    """Peak resident set of a second step."""
    torch.set_num_threads(threads)
    step = Step(name, side, batch_size)
    step()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from scratch
    step()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024


def _peak_in_own_process(name: str, side: str, batch_size: int, threads: int) -> float:
    # Without a fixed threshold glibc keeps what was freed, and the resident set says little.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 17)
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(_peak_mib, name, side, batch_size, threads).result()
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


@click.command(help=__doc__)
@click.argument("names", nargs=-1, type=click.Choice(list(MODELS)))
@click.option("--rounds", default=5, show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--memory/--no-memory", default=True, show_default=True, help="Measure peak memory too.")
def main(names: tuple[str, ...], rounds: int, batch_size: int, threads: int, memory: bool) -> None:
    """Print one block a network."""
    reuse_freed_memory()
    torch.set_num_threads(threads)
    print(f"torch {torch.__version__}, {threads} thread(s), {rounds} rounds, batch {batch_size}")
    result = {}
    for name in names or MODELS:
        steps = {side: Step(name, side, batch_size) for side in sides_of(name)}
        for step in steps.values():
            step()  # compiles, makes the optimizer's state, and warms the caches
        seconds = [{side: step() for side, step in steps.items()} for _ in range(rounds)]
        print(f"\n{name}: float step {median(taken['float'] for taken in seconds):.2f} s", flush=True)
        for side in steps:
            ratios = [taken[side] / taken["float"] for taken in seconds]
            peak = f", {_peak_in_own_process(name, side, batch_size, threads):.0f} MiB" if memory else ""
            print(f"  {side:12s} {median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f}){peak}", flush=True)
        own = steps["ours"]
        for term in list(TERMS)[1:]:
            included = own.config is TERMS[term]  # then the step without it is the shorter
            shares = []
            for _ in range(rounds):
                alone, whole = own.term(term), own()
                shares.append(alone / (whole - alone if included else whole))
            print(
                f"  {term:12s} {median(shares):.1%} of our step  ({min(shares):.1%} to {max(shares):.1%})", flush=True
            )
        best = "compiled" if "compiled" in steps else "ours"
        result[name] = round(median(taken[best] / taken["float"] for taken in seconds), 3)
    print(json.dumps(result))


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peers
        main()
