"""What is kept of real runs: small tables, each run.json without a machine's paths, and the gallery of every figure.

python reports/build.py RUNS ABLATION TUNING: RUNS is the folder that networks/runs.sh made, the others those that
`qvw ablate` made of ablation/cifar10.yaml and ablation/tuning.yaml. The environment variables of runs.sh are needed.
"""

import base64
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from PIL import Image

from analysis.figures.ablation_plots import ablation_figure
from analysis.page import figures as report_figures
from analysis.page.content import read_runs
from analysis.page.figures import Picture
from analysis.report import page_environment

HERE = Path(__file__).parent
NETWORKS = ("cifar10_resnet20", "cifar10_vit_d128_l4", "cifar10_swin_e48", "imagenet_mobilenetv1_025")
LARGE = ("resnet50", "swin_tiny_patch4_window7_224")  # untrained: for the layout of figures
PLANS = ("w3a3", "w3a4", "w4a4", "w4a8")
SHOWN_IN_GALLERY = ("qat-lsq-0", "qat-kd-0", "qat-obr-0", "qat-all-0")
STATS = ("module", "tensor", "kind", "order", "numel", "std", "abs_mean", "excess_kurtosis", "outlier_fraction",
         "channel_range_ratio", "head_std_cv")  # fmt: skip
SWEEP = ("module", "tensor", "group", "bit_width", "protocol", "batchnorm", "kl", "kl_se", "delta_loss",
         "delta_loss_se", "delta_top1", "top1_se", "sqnr_db", "rank_low", "rank_high")  # fmt: skip
PLACES = ("QVW_IMAGENET", "QVW_CIFAR10", "QVW_MODELS")  # environment variables that runs.sh reads
CHANGED = ("learning_rate", "crop_area", "task_weight", "kd_weight", "kd_temperature", "obr_weight", "gradient_scale")
COLOURS = 96  # of a figure's palette


def main() -> None:
    """Write networks/NAME/, ablation/cifar10/, ablation/tuning/ and gallery/index.html."""
    runs, ablation, tuning = map(Path, sys.argv[1:])
    for name, folder in (("cifar10", ablation), ("tuning", tuning)):
        keep_ablation(folder, HERE / "ablation" / name, f"{name}.yaml")
    for name in NETWORKS:
        keep(runs / name, HERE / "networks" / name, {str(runs.resolve()): "$RUNS"})
    kept = HERE / "networks" / "comparison.csv"
    kept.write_text(rounded(pd.read_csv(runs / "compare" / "differences.csv")), encoding="utf-8")
    page = HERE / "gallery" / "index.html"
    page.parent.mkdir(exist_ok=True)
    for old in page.parent.glob("*.webp"):
        old.unlink()
    sections = [
        (title, lead, [drawn(each, page.parent) for each in some]) for title, lead, some in gallery(runs, ablation)
    ]
    template = page_environment(HERE).get_template("gallery.html.jinja")
    page.write_text(template.render(sections=sections), "utf-8")
    size = sum(file.stat().st_size for file in HERE.rglob("*") if file.is_file())
    print(f"{sum(len(each[2]) for each in sections)} figures in {page}; {size / 2**20:.2f} MiB in {HERE}")


def keep(run: Path, to: Path, paths: dict[str, str]) -> None:
    """The small tables of a run, its plans side by side and how it was made."""
    to.mkdir(parents=True, exist_ok=True)
    write_record(run / "run.json", to / "run.json", paths)
    pairs = (("stats", STATS), ("sensitivity", SWEEP), ("proxy_correlation", None))
    for name, columns in pairs:
        table = pd.read_parquet(run / f"{name}.parquet")
        (to / f"{name}.csv").write_text(rounded(table[list(columns)] if columns else table), encoding="utf-8")
    files = {like: run / ("plan.json" if like == "w3a3" else f"plan-{like}.json") for like in PLANS}
    bits = {like: planned(file) for like, file in files.items()}
    pd.DataFrame(bits).rename_axis(["module", "tensor"]).to_csv(to / "plans.csv")
    found = {like: run / ("" if like == "w3a3" else f"plan-{like}") / "verification.parquet" for like in PLANS}
    verified = [pd.read_parquet(file).assign(like=like) for like, file in found.items()]
    table = pd.concat(verified).drop(columns="plan_sha256").set_index("like").reset_index()
    (to / "verification.csv").write_text(rounded(table), encoding="utf-8")


def keep_ablation(made: Path, to: Path, config: str) -> None:
    """Tables and figure of an ablation, of each network the run.json, and a row for each of its trainings."""
    paths = {str(made.resolve()): f"runs/{to.name}"}
    paths |= {str(file): f"reports/ablation/{config}" for file in made.resolve().parent.glob("*.yaml")}
    for name in ("ablation.csv", "summary.csv"):
        (to / name).write_text(rounded(pd.read_csv(made / name)), encoding="utf-8")
    few_colours(Image.open(made / "ablation.png").convert("RGB")).save(to / "ablation.png", optimize=True)
    rows = []
    for run in sorted(path.parent for path in made.glob("*/run.json")):
        write_record(run / "run.json", to / f"{run.name}.run.json", paths)
        rows += [training(folder) for folder in sorted(run.glob("qat-*")) if (folder / "history.parquet").exists()]
    (to / "trainings.csv").write_text(rounded(pd.DataFrame(rows)), encoding="utf-8")


def training(folder: Path) -> dict[str, object]:
    """The settings of a training that the ablations change, and its first and last validation."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    history = pd.read_parquet(folder / "history.parquet")
    validated = history[history["split"] == "val"]
    return {
        "network": folder.parent.name, "training": folder.name, **{name: config[name] for name in CHANGED},
        "steps": int(history["step"].max()), "top1_start": validated["top1"].iloc[0],
        "top1_last": validated["top1"].iloc[-1], "loss_last": validated["loss"].iloc[-1],
    }  # fmt: skip


def planned(file: Path) -> pd.Series:
    """Bits of each site of a plan file, by module and tensor."""
    sites = pd.DataFrame(json.loads(file.read_text(encoding="utf-8"))["sites"])
    return sites.set_index(["module", "tensor"])["bit_width"]


def rounded(table: pd.DataFrame) -> str:
    """The table as CSV, figures with five significant digits."""
    return table.to_csv(index=False, float_format="%.5g")


def write_record(record: Path, to: Path, paths: dict[str, str]) -> None:
    """A run.json with the names of environment variables in place of this machine's folders, on one line."""
    text = json.dumps(json.loads(record.read_text(encoding="utf-8")), separators=(",", ":"))
    places = {os.environ[name]: f"${name}" for name in PLACES if name in os.environ}
    for path, name in sorted((places | paths).items(), key=lambda item: -len(item[0])):
        text = text.replace(path, name)
    to.write_text(text + "\n", encoding="utf-8")


def gallery(runs: Path, ablation: Path) -> Iterable[tuple[str, str, Sequence[Picture]]]:
    """Title, a sentence and the pictures of each section."""
    resnet, vit, swin, mobilenet = read_runs([runs / name for name in NETWORKS])
    large = read_runs([runs / name for name in LARGE])
    trained = read_runs([ablation / "vit"])[0]
    trained = replace(trained, trainings=tuple(t for t in trained.trainings if t.name in SHOWN_IN_GALLERY))
    yield (
        "Variation",
        "A ResNet-20, a ViT and a Swin trained on CIFAR-10, side by side (qvw compare), and one of them alone.",
        [*report_figures.variation([resnet, vit, swin]), *some(report_figures.distribution(vit))],
    )
    yield (
        "Sensitivity",
        "What one quantized tensor costs (qvw sensitivity): the Swin in every way, the ResNet-20 by its KL.",
        [*report_figures.sensitivity(swin), *report_figures.sensitivity(resnet)[:1]],
    )
    yield (
        "Plan",
        "Bits at the budget of uniform 3 bit (qvw plan --pareto --verify).",
        [
            each
            for content in (vit, mobilenet)
            for each in some(
                report_figures.plan(content), report_figures.front(content), report_figures.verification(content)
            )
        ],
    )
    results, summary = (pd.read_csv(ablation / f"{name}.csv") for name in ("ablation", "summary"))
    figure = ablation_figure(results, summary)
    words = "top-1 of each arm, a dot a seed, before and after training, and the share of oscillating weights"
    yield (
        "Training",
        "The ViT at 2 bits with and without the paper's remedies (qvw train), and all arms and seeds (qvw ablate).",
        [*report_figures.trainings(trained), report_figures.picture(figure, "What each remedy is worth", words)],
    )
    yield (
        "At the size of real networks",
        "A ResNet-50 with 54 layers and a Swin-T with about 150 tensors, both untrained: this shows the layout, the "
        "numbers say nothing.",
        [
            each
            for content in large
            for each in (report_figures.sensitivity(content)[0], *some(report_figures.plan(content)))
        ],
    )


def some(*pictures: Picture | None) -> list[Picture]:
    """Those that are there."""
    return [each for each in pictures if each is not None]


def few_colours(image: Image.Image) -> Image.Image:
    """The image with a palette: a third of the bytes."""
    return image.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)


def drawn(picture: Picture, folder: Path) -> dict[str, object]:
    """The picture as a file of few colours at the size of the page, in git for good; what the page says of it."""
    image = Image.open(io.BytesIO(base64.b64decode(picture.png))).convert("RGB")
    size = picture.pixels, round(image.height * picture.pixels / image.width)
    few = few_colours(image.resize(size, Image.Resampling.LANCZOS))
    file = folder / f"{re.sub(r'[^a-z0-9]+', '-', picture.caption.lower()).strip('-')}.webp"
    few.convert("RGB").save(file, lossless=True, quality=100, method=6)
    return {"file": file.name, "caption": picture.caption, "words": picture.words, "size": size}


if __name__ == "__main__":
    main()
