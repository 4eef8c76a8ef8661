"""One small model of every timm family through statistics and sensitivity: which pass, and why the others do not.

    python benchmarks/zoo.py [--families 'res*,vit*'] [--besides] [--out FILE.csv]

For each family of `timm.models.list_modules()` the variant with the fewest parameters is built with random weights, at
the smallest image size that it takes. `--besides` adds the variants of `BESIDES`, whose attention or convolutions are
of another kind than those of the smallest. Each model passes when
- every convolution and linear that a forward pass executes has its input, output and weight in the statistics, over as
  many values as it should be;
- query, key, value and attention are observed in every module that computes softmax(query key^T) value, apart from
  `quant.trace` by the operators that torch dispatches. Where they are not, the reason is printed;
- the model answers under observation as it does alone: the same bits, or within 1e-4 where attention is computed by its
  formula; no hook stays behind and no class is changed;
- one weight, and one attention site where there is one, give a row of sensitivity with finite figures.

The last line is one JSON object: how many models there were, how many passed, and the cause of each other.
"""

import sys
from pathlib import Path

if not __package__:  # as a script: this folder's statistics.py would hide Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import csv
import json
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import pandas as pd
import timm
import torch
from torch import Tensor, nn

from analysis.memory import reuse_freed_memory
from analysis.sensitivity import SweepConfig, sweep_keys
from analysis.sweeps.sweep import sweep
from analysis.tasks import classification
from analysis.tensor_stats import collect_stats
from benchmarks.executed import AttentionOperators, executed
from quant.intercept import intercept
from quant.network import Network
from quant.site import ATTENTION_TENSORS, Site
from quant.trace import Trace, first_tensor

BESIDES = (
    "botnet26t_256", "lambda_resnet26t", "halonet26t", "gcresnext26ts", "resnet50_clip", "mobilenetv4_hybrid_medium",
    "tf_efficientnet_cc_b0_4e", "convnextv2_atto", "vit_small_patch16_18x2_224", "vit_base_patch16_siglip_224",
    "vit_dlittle_patch16_reg1_gap_256", "eva02_tiny_patch14_224", "vit_srelpos_small_patch16_224", "levit_conv_128s",
    "twins_pcpvt_small", "fastvit_sa12", "mobilevitv2_050", "caformer_s18", "mvitv2_small_cls", "resnetv2_50x1_bit",
    "nf_regnet_b0", "coatnet_nano_rw_224", "maxvit_rmlp_pico_rw_256", "maxvit_tiny_tf_224", "gmixer_12_224",
)  # fmt: skip
SIZES = (64, 96, 128, 160, 192, 224, 240, 256, 288, 320, 384)
# Arguments of the constructor, tried in turn where the smallest variant is over the limit.
SHRUNK: tuple[dict[str, Any], ...] = ({}, {"depth": 2}, {"depths": (1, 1, 1, 1)})
LIMIT = 140_000_000  # parameters
IMAGES = 2
TOLERANCE = 1e-4


@dataclass(kw_only=True)
class Result:
    """What is printed of one model; `cause` is empty where it passed."""

    family: str
    variant: str = ""
    size: int = 0
    parameters: int = 0
    layers: str = ""  # observed of executed
    weights: float = 0.0  # share of the values of parameters with two or more axes that is in the statistics
    attention: str = ""  # observed of computed
    norms: int = 0
    blocks: int = 0
    seconds: float = 0.0
    unobserved: str = ""
    cause: str = ""


def smallest(family: str) -> tuple[str, dict[str, Any]]:
    """The variant of a family with the fewest parameters, with the arguments that bring it under `LIMIT`."""
    counts = {}
    for name in timm.list_models(module=family):
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    name = min(counts, key=lambda name: (counts[name], name))
    for kwargs in SHRUNK if counts[name] > LIMIT else ({},):
        try:
            with torch.device("meta"):
                count = sum(p.numel() for p in timm.create_model(name, **kwargs).parameters())
        except TypeError:  # the constructor has no such argument
            continue
        if count <= LIMIT:
            return name, kwargs
    raise ValueError(f"the smallest variant, {name}, has {counts[name]} parameters, and cannot be made with fewer.")


def build(name: str, kwargs: dict[str, Any]) -> tuple[nn.Module, int]:
    """The model in evaluation mode, and the smallest of `SIZES` whose images it takes."""
    error: Exception | None = None
    for size in SIZES:
        sizes: tuple[dict[str, Any], ...] = ({"img_size": size}, {})
        for sized in sizes:
            try:
                torch.manual_seed(0)
                model = timm.create_model(name, **kwargs, **sized).eval()
                with torch.no_grad():
                    model(torch.rand(1, 3, size, size))
                    for parameter in model.parameters():  # many start at zero, and would hide what is inside a branch
                        parameter.add_(torch.randn_like(parameter) * 0.02)
                return model.eval(), size  # LeViT then forgets the attention biases of the former parameters
            except Exception as caught:  # each model refuses a size or an argument in its own way
                error = caught
    raise ValueError(f"takes none of the sizes {SIZES}") from error


def check(model: nn.Module, size: int, result: Result) -> Iterator[str]:
    """Each reason for which the model does not pass; fills in `result`."""
    images = torch.rand(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    before = _state(model)
    with torch.no_grad():
        plain = _answer(model, images)
    used, operators = executed(model, images[:1])
    net = Network(model, images[:1], name=result.variant)
    if not torch.isfinite(plain).all():
        yield "the answers of random weights are not finite"
        return
    stats = collect_stats(net, net.infos, [images]).stats
    held = sum(i.numel for i in net.infos if i.site.is_weight)
    result.weights = held / sum(p.numel() for p in model.parameters() if p.ndim > 1)
    yield from _check_rows(stats, used, result)
    yield from _check_attention(net.trace, stats, operators, result)
    yield from _check_answers(net, images, plain)
    yield from _check_sensitivity(net, images)
    if _state(model) != before:
        yield "a hook, a changed class or a changed switch stays behind"
    with torch.no_grad():
        if not torch.equal(_answer(model, images), plain):
            yield "the model answers otherwise afterwards"


def _answer(model: nn.Module, images: Tensor) -> Tensor:
    found = first_tensor(model(images))
    if found is None:
        raise ValueError("the model returns no tensor.")
    return found[1]


def _state(model: nn.Module) -> list[Any]:
    return [
        (type(m), len(m._forward_hooks), len(m._forward_pre_hooks), getattr(m, "fused_attn", None), sorted(vars(m)))
        for m in model.modules()
    ]


def _check_rows(stats: pd.DataFrame, used: set[str], result: Result) -> Iterator[str]:
    """Input, output and weight of each executed layer, and the count of every row."""
    observed = {Site(r.module, r.tensor.partition(".")[0]) for r in stats.itertuples() if r.count or r.note}
    missing = sorted(n for n in used if {Site(n, t) for t in ("input", "output", "weight")} - observed)
    result.layers = f"{len(used) - len(missing)} of {len(used)}"
    result.norms = stats[(stats["kind"] == "norm") & (stats["count"] > 0)]["module"].nunique()
    result.blocks = stats[(stats["kind"] == "block") & (stats["count"] > 0)]["module"].nunique()
    if missing:
        yield f"not observed: {', '.join(missing[:3])} ({len(missing)} layers)"
    for row in stats.itertuples():
        activation = not row.tensor.startswith("weight")
        expected = {row.numel * IMAGES, row.numel} if activation else {row.numel}
        if row.count not in expected and not (row.count == 0 and row.note):
            yield f"{row.module}:{row.tensor} has {row.count} values, expected {row.numel} x {IMAGES}"
            return


def _check_attention(trace: Trace, stats: pd.DataFrame, operators: AttentionOperators, result: Result) -> Iterator[str]:
    rows = stats[stats["tensor"].isin(ATTENTION_TENSORS) & (stats["count"] > 0)]
    observed = {module for module, group in rows.groupby("module") if len(group) == len(ATTENTION_TENSORS)}
    computed = operators.modules()
    result.attention = f"{len(observed & set(computed))} of {len(computed)}"
    by_reason = {
        reason: [n for n, r in trace.unobserved.items() if r == reason] for reason in trace.unobserved.values()
    }
    result.unobserved = "; ".join(f"{reason} ({names[0]}, {len(names)} in all)" for reason, names in by_reason.items())
    silent = [name for name in computed if name not in observed and name not in trace.unobserved]
    if silent:
        yield f"attention not observed, without a reason: {', '.join(silent[:3])} ({len(silent)} modules)"
    invented = sorted(observed - set(computed))
    if invented:
        yield f"attention observed where torch dispatched none: {', '.join(invented[:3])}"
        return
    yield from _check_shapes(trace, operators)


def _check_shapes(trace: Trace, operators: AttentionOperators) -> Iterator[str]:
    """Query, key, value and attention fit together, and attention has as many elements as torch dispatched."""
    for name, form in trace.attention.items():
        query, key, value, attention = (trace.shapes[Site(name, tensor)] for tensor in ATTENTION_TENSORS)
        fits = query[-1] == key[-1] and attention[-2:] == (query[-2], key[-2]) and value[-2] == key[-2]
        if not fits:
            yield f"{name} has query {query}, key {key}, value {value} and attention {attention}"
        others = operators.operators[name].count("softmax") != len(form.softmaxes) * trace.calls[name]
        counted, seen = operators.elements[name], trace.elements[Site(name, "attention")]
        if counted != seen and not others:
            yield f"{name} has {seen} elements of attention, torch dispatched {counted}"


def _check_answers(net: Network, images: Tensor, plain: Tensor) -> Iterator[str]:
    model = net.model
    outside = {site: lambda x: None for site in net.trace.shapes if not site.is_attention}
    with torch.no_grad(), intercept(net, outside):
        if not torch.equal(_answer(model, images), plain):
            yield "observed outside attention, the model answers otherwise"
    everywhere = {site: lambda x: None for site in net.trace.shapes}
    with torch.no_grad(), intercept(net, everywhere):
        difference = (_answer(model, images) - plain).norm() / plain.norm()
    if not difference <= TOLERANCE:
        yield f"observed inside attention, the answers differ by {difference:.1e} of their size"


def _check_sensitivity(net: Network, images: Tensor) -> Iterator[str]:
    batches = [(images, torch.zeros(IMAGES, dtype=torch.long))]
    weights = [i for i in net.infos if i.quantizable and i.site.is_weight]
    attention = [i for i in net.infos if i.quantizable and i.site.is_attention]
    chosen = [group[len(group) // 2] for group in (weights, attention) if group]
    if not weights:
        yield "no weight can be quantized"
    keys = sweep_keys(net.model, chosen, SweepConfig(bit_widths=(4,), estimator="minmax", batchnorm="stored"))
    for row in sweep(net, chosen, batches, keys, task=classification()):
        figures = {name: row[name] for name in ("loss", "delta_loss", "kl", "sqnr_db")}
        if not all(map(torch.isfinite, map(torch.tensor, figures.values()))):
            yield f"sensitivity of {row['module']}:{row['tensor']} is not finite: {figures}"


def examine(family: str, variant: str | None) -> Result:
    """Everything about one model; a crash is a cause."""
    start, result = time.perf_counter(), Result(family=family)
    try:
        result.variant, kwargs = smallest(family) if variant is None else (variant, {})
        model, result.size = build(result.variant, kwargs)
        result.parameters = sum(p.numel() for p in model.parameters())
        result.cause = "; ".join(check(model, result.size, result))
    except Exception as error:  # whatever a model makes of us is told, and the next family follows
        place = traceback.extract_tb(error.__traceback__)[-1]
        result.cause = f"{type(error).__name__}: {error} ({place.filename.rpartition('/')[2]}:{place.lineno})"
    result.seconds = round(time.perf_counter() - start, 1)
    return result


def _line(result: Result) -> str:
    words = [
        "FAIL" if result.cause else "pass", f"{result.family:22}", f"{result.variant:34}", f"{result.size:4} px",
        f"{result.parameters / 1e6:6.1f} M", f"{result.seconds:5.1f} s", f"layers: {result.layers:10}",
        f"attention: observed in {result.attention or '-'} modules", f"{result.norms} norms", f"{result.blocks} blocks",
        f"{result.weights:.0%} of weights",
    ]  # fmt: skip
    return "\n      ".join(filter(None, ["  ".join(words), result.unobserved, result.cause]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line a model, how many passed, and the others with their cause; returns how many did not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default="*", help="patterns of families, separated by commas")
    parser.add_argument("--besides", action="store_true", help="also the variants of BESIDES")
    parser.add_argument("--variants", help="names of variants instead, separated by commas")
    parser.add_argument("--out", help="a CSV file of the printed table")
    options = parser.parse_args(arguments)
    reuse_freed_memory()
    models: list[tuple[str, str | None]] = []
    if options.variants is None:
        patterns = options.families.split(",")
        models += [(f, None) for f in timm.list_modules() if any(fnmatchcase(f, p) for p in patterns)]
    names = options.variants.split(",") if options.variants else BESIDES if options.besides else ()
    models += [(timm.model_entrypoint(name).__module__.rpartition(".")[2], name) for name in names]
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of timm, on models that it has renamed
        rows = None
        if options.out:  # opened first: a path that cannot be written ends nothing that took minutes
            file = stack.enter_context(open(options.out, "w", newline="", encoding="utf-8"))
            rows = csv.DictWriter(file, list(Result.__dataclass_fields__))
            rows.writeheader()
        results = []
        for family, variant in models:
            results.append(result := examine(family, variant))
            print(_line(result), flush=True)
            if rows is not None:
                rows.writerow(asdict(result))
    failed = [result for result in results if result.cause]
    print(f"\n{len(results) - len(failed)} of {len(results)} pass.")
    _table("not passed", [(r.variant, r.cause) for r in failed])
    _table("a softmax whose attention is not observed", [(r.variant, r.unobserved) for r in results if r.unobserved])
    causes = {result.variant or result.family: result.cause for result in failed}
    print(json.dumps({"families": len(results), "passed": len(results) - len(failed), "failed": causes}))
    return len(failed)


def _table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    if rows:
        print(f"\n{title}:", *(f"  {name or '-'}: {text}" for name, text in rows), sep="\n")


if __name__ == "__main__":
    sys.exit(bool(main()))
