"""`qvw report`: one page that holds all, and says what is missing."""

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from analysis.cli import main
from analysis.figures.training_plots import plot_history, plot_oscillation, plot_terms, terms_figure, training_figure
from analysis.page.bits import bits_by_kind, certificate
from analysis.page.cells import DASH
from analysis.page.content import history_frame, oscillating_shares, oscillation_frame, read_run, read_runs, terms
from analysis.page.provenance import provenance
from analysis.page.sensitivity_section import all_sites, most_sensitive, proxy_ranks
from analysis.page.summary_section import deciding, evaluated
from analysis.page.training_section import gradient_norms, of_other_plans, trained
from analysis.report import report_html
from analysis.steps.report_step import run_report
from quant.errors import InputError

RESNET = json.dumps(
    {"layers": [1, 1, 1, 1], "num_classes": 10, "in_chans": 1, "stem_width": 8, "channels": [8, 8, 16, 16],
     "zero_init_last": False}
)  # fmt: skip
VIT = json.dumps(
    {"img_size": 32, "patch_size": 8, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depth": 1, "num_heads": 4}
)
LOADER = ["--num-workers", "0", "--batch-size", "32"]
SECTIONS = ["Summary", "Variation", "Sensitivity", "Plan", "Training", "How it was made"]


def qvw(*arguments):
    """A command that has to succeed."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 0, arguments


def history_rows() -> pd.DataFrame:
    """Rows of a history: batches every 5 steps, validation every 10 from step 0 on, a term that sets in at step 20."""
    rows = []
    for step in range(0, 41, 5):
        loss = 2.0 * 0.95**step
        if step % 10 == 0:
            rows.append({"step": step, "split": "val", "loss": loss, "top1": 0.2 + step / 100})
        if step:
            terms = {"task": 0.8 * loss, "kd": 0.2 * loss, "obr_distance": 0.0 if step < 20 else 1e-3}
            rows.append({"step": step, "split": "train", "loss": loss, **terms, "grad_task": 1.0})
    order = ["step", "split", "loss", "task", "kd", "obr_distance", "grad_task", "top1"]
    return pd.DataFrame(rows)[order].assign(epoch=0, images=32, lr=1e-3, seconds=0.1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """`resnet`, measured, planned, evaluated, with three trainings; `vit`, of which only the weights were measured."""
    root = tmp_path_factory.mktemp("runs with a space")
    run = ["--run", root / "resnet"]
    qvw("stats", "resnet18", "--model-kwargs", RESNET, "--data", "digits", *LOADER, *run, "--images", 32)
    qvw("sensitivity", *run, *LOADER, "--images", 32, "--bits", "2,8", "--bn", "stored", "--proxies")
    qvw("plan", *run, "--weight-bits", 4, "--activation-bits", 5)
    for what in (["--float"], ["--plan", root / "resnet" / "plan.json"], ["--uniform", "w4a4"]):
        qvw("eval", *run, "--images", 64, *LOADER, "--calibration-images", 32, *what)
    short = ["--images", 64, "--val-images", 64]
    settings = {"steps": 12, "log_every": 3, "batch_size": 16, "calibration_images": 32, "obr_weight": 0.001}
    short += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    for what in ([], ["--float", "--name", "float"], ["--uniform", "w4a4", "--name", "uniform"]):
        qvw("train", *run, "--num-workers", 0, *short, *what)
    qvw("stats", "vit_tiny_patch16_224", "--model-kwargs", VIT, "--run", root / "vit")
    return root


@pytest.fixture
def run(finished, tmp_path):
    """The ResNet's folder, which a test may change."""
    return shutil.copytree(finished / "resnet", tmp_path / "resnet")


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory):
    """The page of both runs."""
    out = tmp_path_factory.mktemp("out")
    run_report([finished / "resnet", finished / "vit"], out, quiet=True)
    return out / "index.html"


class Reader(HTMLParser):
    """The elements of a page and their attributes; fails where an end tag does not fit the last start tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        """Note an element."""
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        """Close the innermost element."""
        assert self.open.pop() == tag

    def all(self, tag):
        """The attributes of all elements of one name."""
        return [attrs for name, attrs in self.elements if name == tag]


def texts(table):
    """The cells of a table as text."""
    return [[cell.text for cell in row] for row in table.rows]


def test_the_page_holds_all_that_it_needs(page):
    """Well formed; figures are inside, nothing is loaded from elsewhere; at most 5 MiB."""
    text = page.read_text(encoding="utf-8")
    reader = Reader(text)
    assert page.stat().st_size < 5 * 2**20
    assert "http://" not in text
    assert "https://" not in text
    assert not [a for _, a in reader.elements if "src" in a and not a["src"].startswith("data:image/png;base64,")]
    inside = {a["href"] for a in reader.all("a") if "download" not in a}
    assert inside == {f"#{a['id']}" for a in reader.all("h2")}
    assert all(a["href"].startswith("data:") for a in reader.all("a") if "download" in a)
    assert [a["href"] for a in reader.all("link")] == ["data:,"]
    # 2 over depth, 2 by kind, channels; 2 distributions; KL, loss, SQNR, ranks, proxies; plan; 3 of the trainings,
    # and for each that quantizes one of its oscillation
    assert len(reader.all("img")) == 18
    for section in SECTIONS:
        assert f">{section}</h2>" in text


def test_the_page_says_whose_weights_it_shows(page):
    """Under the title, for each run: figures of an untrained network must not look like a finding."""
    text = page.read_text(encoding="utf-8")
    assert text.count("UNTRAINED weights: its figures say nothing of a trained one; ") == 2
    assert "; images of digits.</p>" in text


def test_the_page_can_be_read_without_seeing_it(page):
    """Language, words for figures, captions of tables, scopes of headers, a name for each region that scrolls."""
    reader = Reader(page.read_text(encoding="utf-8"))
    assert reader.all("html") == [{"lang": "en"}]
    assert all(len(a["alt"]) > 20 for a in reader.all("img"))
    assert len(reader.all("caption")) == len(reader.all("table"))
    assert all(a["scope"] in ("row", "col") for a in reader.all("th"))
    assert all(a["aria-label"] for a in reader.all("div") if a.get("role") == "region")
    ids = [a["id"] for _, a in reader.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_what_a_folder_holds_is_shown_as_text(run, tmp_path):
    """Names and settings with characters of HTML come out as they are, and open no element."""
    odd = run.rename(tmp_path / "<i>a & b")
    (odd / "qat" / "config.json").write_text(json.dumps({"note": "</script><b>"}))
    text = report_html([odd])
    assert "<i>" not in text
    assert "&lt;i&gt;a &amp; b" in text
    assert "&lt;/script&gt;&lt;b&gt;" in text
    Reader(text)


def test_the_same_folders_give_the_same_page(finished, page):
    """No date, no random id: two pages can be compared."""
    assert report_html([finished / "resnet", finished / "vit"]) == page.read_text(encoding="utf-8")


def test_the_summary_has_the_figures_of_verify(run):
    """Float, planned and uniform bits without training, then trainings; in percent, nats, bits, MiB and GBitOps."""
    content = read_run(run, "mine")
    table = evaluated(content)
    rows = pd.read_parquet(run / "verify.parquet").set_index("plan")
    assert [row[0] for row in texts(table)] == [
        "floating point", "planned bits, without training", "uniform bits, without training", "qat: trained with QAT",
        "qat-float: trained in floating point", "qat-uniform: trained with QAT",
    ]  # fmt: skip
    planned = rows.loc["planned"]
    assert texts(table)[1][1:] == [
        f"{100 * planned['top1']:.1f} ± {100 * planned['top1_se']:.1f}",
        f"{planned['loss']:.3f} ± {planned['loss_se']:.3f}",
        f"{planned['weight_bits']:.2f}",
        f"{planned['activation_bits']:.2f}",
        f"{planned['size_bytes'] / 2**20:.3f}",
        f"{planned['bitops'] / 1e9:.3f}",
        "64",
        "mse",
        "re-estimated",
    ]
    assert texts(table)[4][3:5] == ["32.00", "32.00"]


def test_plans_that_only_compare_are_left_to_the_verification(run):
    """Greedy, worst-first and random bits; uniform bits stay, those of several widths told apart by their mean."""
    content = read_run(run, "mine")
    uniform = content.verify[content.verify["plan"] == "uniform"]
    others = [uniform.assign(plan=kind) for kind in ("additive", "greedy", "reverse", "random")]
    assert evaluated(replace(content, verify=pd.concat([content.verify, *others]))) == evaluated(content)
    lower = uniform.assign(top1=0.25, weight_bits=2.0, activation_bits=2.5)
    names = [row[0] for row in texts(evaluated(replace(content, verify=pd.concat([content.verify, lower]))))]
    assert "uniform bits, without training, 2.0 and 2.5 bits on average" in names
    assert "uniform bits, without training" not in names


def test_what_decides_stands_side_by_side(finished, page):
    """A row a figure, a column a run; a dash where a run lacks it; first how the modules vary, last the accuracy."""
    resnet, vit = read_runs([finished / "resnet", finished / "vit"])
    table = deciding([resnet, vit])
    assert table.columns == ("figure", "resnet", "vit")
    rows = {row[0]: row[1:] for row in texts(table)}
    assert next(iter(rows)).startswith("weights: difference between modules")
    assert list(rows)[-1].startswith("top-1")
    at_2 = resnet.sensitivity[resnet.sensitivity["bit_width"] == 2]
    weights = at_2[at_2["tensor"] == "weight"]
    assert rows["KL of the typical weight tensor at 2 bit (nats)"] == [f"{weights['kl'].median():.2g}", DASH]
    assert rows["sites measured"] == [f"{len(at_2)}", DASH]
    top = at_2["kl"].nlargest(10).sum() / at_2["kl"].sum()
    assert rows["share of all KL in the 10 most sensitive (%)"] == [f"{100 * top:.0f}", DASH]
    floating = resnet.verify.set_index("plan").loc["float"]
    assert rows["top-1 in floating point (%)"][0].startswith(f"{100 * floating['top1']:.1f} ± ")
    assert not [row for row in rows if row.startswith("plan ahead")]  # no run has a verification
    text = page.read_text(encoding="utf-8")
    assert text.index("The figures that decide") < text.index("evaluated networks")
    assert ": largest in" in text  # the comparison's reading
    assert "weights of convolutions and linears by depth" in text


def test_runs_are_compared_at_bits_that_all_measured(finished):
    """The lowest that they share; without one each at its own lowest."""
    resnet = read_run(finished / "resnet", "a")
    few = replace(resnet, sensitivity=resnet.sensitivity[resnet.sensitivity["bit_width"] == 8])
    other = replace(resnet, sensitivity=few.sensitivity.assign(bit_width=4))
    assert [row[0].text for row in deciding([resnet, few]).rows if "at 8 bit" in row[0].text]
    assert [row[0].text for row in deciding([few, other]).rows if "at the lowest bits" in row[0].text]


def test_what_was_not_measured_is_a_dash(run):
    """Images without labels have neither loss nor top-1: dashes, without a key to sort by, and a page all the same."""
    verify = pd.read_parquet(run / "verify.parquet").assign(
        loss=np.nan, loss_se=np.nan, top1=np.nan, top1_se=np.nan
    )  # fmt: skip
    verify.to_parquet(run / "verify.parquet")
    table = pd.read_parquet(run / "sensitivity.parquet")
    names = ["loss", "delta_loss", "delta_loss_se", "top1", "delta_top1", "top1_se"]
    table.assign(**dict.fromkeys(names, np.nan)).to_parquet(run / "sensitivity.parquet")
    (run / "stats.parquet").unlink()  # its figures take the most time
    history = pd.read_parquet(run / "qat" / "history.parquet")
    history.assign(loss=np.nan, top1=np.nan).to_parquet(run / "qat" / "history.parquet")
    content = read_run(run, "mine")
    for row in evaluated(content).rows[:3]:
        assert [cell.text for cell in row[1:3]] == [DASH, DASH]
        assert row[1].key is None
    assert texts(trained(content))[0][5:10] == [DASH] * 5
    page = report_html([run])
    assert "heatmap of the KL of the logits of every site" in page
    assert ">nan" not in page


def test_the_ten_most_sensitive_sites_come_first(run):
    """Ten sites at the lowest bit-width that was measured, by falling KL."""
    table = most_sensitive(read_run(run, "mine"))
    rows = pd.read_parquet(run / "sensitivity.parquet")
    expected = rows[rows["bit_width"] == 2].sort_values("kl", ascending=False)["kl"].head(10)
    assert [row[2].key for row in table.rows] == expected.tolist()
    assert "at 2 bits" in table.caption


def test_all_sites_are_listed_in_network_order(run):
    """A row a site, its KL at each bit-width as the table of the run has it, with the error in the file."""
    content = read_run(run, "mine")
    table = all_sites(content)
    assert table.columns[:5] == ("module", "tensor", "kind", "KL at 2 bit (nats)", "KL at 8 bit (nats)")
    rows = content.sensitivity.set_index(["module", "tensor", "bit_width"])
    assert len(table.rows) == len(rows) / 2
    for row in table.rows:
        for cell, bits in zip(row[3:5], (2, 8), strict=True):
            found = rows.loc[(row[0].text, row[1].text, bits)]
            assert (cell.key, cell.error) == (found["kl"], found["kl_se"])
    order = rows.reset_index().drop_duplicates(["module", "tensor"])
    assert [row[0].text for row in table.rows] == order["module"].tolist()


def test_bits_are_told_by_kind_of_layer(run):
    """The mean over the sites of a kind, with the least and the most; every site of the plan is counted once."""
    content = read_run(run, "mine")
    table = bits_by_kind(content)
    assert sum(row[-1].key for row in table.rows) == len(content.plan.sites)
    kinds = content.sensitivity.drop_duplicates(["module", "tensor"]).set_index(["module", "tensor"])["kind"]
    bits = [s.bit_width for s in content.plan.sites if s.tensor == "weight" and kinds[s.module, s.tensor] == "conv"]
    cell = next(row[1] for row in table.rows if row[0].text == "conv")
    assert cell.key == pytest.approx(np.mean(bits))
    assert cell.text == f"{np.mean(bits):.2f} ({min(bits)} to {max(bits)})"
    assert bits_by_kind(replace(content, sensitivity=None)) is not None  # statistics tell the kinds too
    assert bits_by_kind(replace(content, sensitivity=None, stats=None)) is None


def test_proxies_stand_beside_the_ceiling(run):
    """Spearman's correlation as the table of the run has it, a column a bit-width, the ceiling last."""
    table = proxy_ranks(read_run(run, "mine"))
    found = pd.read_parquet(run / "proxy_correlation.parquet")
    found = found[(found["tensors"] == "all") & (found["bit_width"] == 8)].set_index("proxy")
    assert table.columns == ("proxy", "2 bit", "8 bit")
    assert {row[0].text: row[2].key for row in table.rows[:-1]} == found["spearman"].to_dict()
    assert table.rows[-1][2].key == found["ceiling"].max()


def test_the_certificate_is_that_of_the_plan(run):
    """Totals beside their budgets, and what the solver proved."""
    rows = {row[0]: row[1:] for row in texts(certificate(read_run(run, "mine")))}
    plan = json.loads((run / "plan.json").read_text())
    assert rows["mean weight bits"] == [f"{plan['totals']['weight_bits']:.4f}", "4"]
    assert rows["solver, status"] == ["highs, optimal", DASH]
    assert rows["objective"] == ["kl", DASH]
    assert rows["gap"][0] == f"{plan['solver']['gap']:.4g}"


def test_a_missing_section_names_the_command_that_makes_it(finished, page):
    """A run of weights only has sentences in place of sections, each with a command that can be pasted."""
    text = page.read_text(encoding="utf-8")
    folder = f"{finished / 'vit'}"
    assert " " in folder
    for command in ("eval", "sensitivity", "plan", "train"):
        assert f"<code>qvw {command} --run &#39;{folder}&#39;" in text
    assert text.count("No sensitivity was measured yet") == 1


def test_a_finished_training_that_was_not_evaluated_is_named(run):
    """The summary says how to evaluate it; a training without model is not called finished."""
    verify = pd.read_parquet(run / "verify.parquet")
    verify[~verify["plan"].isin(["qat", "qat-uniform"])].to_parquet(run / "verify.parquet")
    (run / "qat-uniform" / "model.safetensors").unlink()
    (run / "stats.parquet").unlink()  # its figures take the most time
    text = report_html([run])
    assert f"qvw eval --run {run} --checkpoint {run / 'qat'}</code>" in text
    assert f"--checkpoint {run / 'qat-uniform'}" not in text
    assert [row[1] for row in texts(trained(read_run(run, "mine")))] == ["finished", "finished", "not finished"]


def damage(run: Path, file: str) -> None:
    """EntryPoint a file short."""
    (run / file).write_bytes((run / file).read_bytes()[:100])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("stats.parquet", "stats.parquet cannot be read"),
        ("verify.parquet", "verify.parquet cannot be read"),
        ("plan.json", "plan.json is not readable as JSON"),
        ("run.json", "run.json is not JSON"),
        ("qat/history.parquet", "history.parquet cannot be read"),
        ("qat/plan.json", "plan.json is not readable as JSON"),
    ],
)
def test_a_damaged_file_is_named(run, tmp_path, file, message):
    """A file that was cut short is an input error with its name, and no page is written."""
    damage(run, file)
    with pytest.raises(InputError, match=message):
        run_report([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_folders_are_refused(run, tmp_path):
    """None, a missing one, a file, an empty one, one given again, another program's table, settings that are none."""
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="name at least one"):
        read_runs([])
    with pytest.raises(InputError, match="no such folder"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="is not a run folder"):
        read_runs([run / "run.json"])
    with pytest.raises(InputError, match="holds nothing to report"):
        read_runs([empty])
    with pytest.raises(InputError, match="Give each once"):
        read_runs([run, run, run])
    (run / "qat" / "config.json").write_text("[]")
    with pytest.raises(InputError, match="no table of settings"):
        read_runs([run])
    pd.DataFrame({"a": [1]}).to_parquet(empty / "verify.parquet")
    with pytest.raises(InputError, match=r"nothing to report.*lacks the column 'plan'"):
        read_runs([empty])


@pytest.mark.parametrize(
    ("file", "column", "command"),
    [
        ("stats", "abs_mean", "qvw stats"),
        ("channels", "min", "qvw stats"),
        ("histograms", "left", "qvw stats"),
        ("sensitivity", "kl", "qvw sensitivity"),
        ("proxies", "score", "qvw sensitivity --proxies"),
        ("verify", "loss", "qvw eval"),
        ("qat/history", "split", "qvw train"),
        ("qat/bins", "position", "qvw train"),
    ],
)
def test_a_table_of_another_version_is_left_out(run, file, column, command):
    """It counts as not made; the reason names the column and what makes the table anew."""
    table = pd.read_parquet(run / f"{file}.parquet")
    table.drop(columns=column).to_parquet(run / f"{file}.parquet")
    content = read_run(run, "mine")
    (reason,) = content.left_out.values()
    assert f"{Path(file).name}.parquet lacks the column '{column}'" in reason
    assert f"`{command}" in reason
    assert list(content.left_out) == [file]
    if "/" not in file:
        assert getattr(content, file) is None


def test_a_section_says_what_was_left_out(run):
    """Each reason once, in place of what would be there; all else is shown."""
    for file, column in (
        ("stats", "abs_mean"),
        ("sensitivity", "divergence"),
        ("verify", "loss"),
        ("qat/history", "split"),
    ):
        pd.read_parquet(run / f"{file}.parquet").drop(columns=column).to_parquet(run / f"{file}.parquet")
    for name in ("qat-float", "qat-uniform"):  # whose figures take time
        shutil.rmtree(run / name)
    text = report_html([run])
    for reason in ("stats.parquet lacks the column &#39;abs_mean&#39;", "history.parquet lacks the column"):
        assert text.count(reason) == 1
    assert "<code>qvw train</code> with" in text
    assert "No sensitivity was measured" not in text
    assert "No network was trained" not in text
    assert "certificate of the plan" in text


def test_a_history_without_a_term_is_shown(run):
    """Terms of the loss have been added: a training of before is whole without them."""
    history = pd.read_parquet(run / "qat" / "history.parquet")
    history.drop(columns=["soft", "grad_soft"]).to_parquet(run / "qat" / "history.parquet")
    content = read_run(run, "mine")
    assert not content.left_out
    assert content.trainings[0].name == "qat"


def test_a_training_with_an_earlier_plan_says_so(run):
    """Where bits differ, with the number of sites; not for uniform bits, floats or the same bits in another budget."""
    content = read_run(run, "mine")
    assert of_other_plans(content) == ()
    first, *rest = content.plan.sites
    renewed = replace(content, plan=replace(content.plan, predicted_delta_loss=1.0))
    assert of_other_plans(renewed) == ()
    other = replace(content.plan, sites=(replace(first, bit_width=16), *rest))
    (sentence,) = of_other_plans(replace(content, plan=other))
    assert sentence.startswith("qat was trained with another plan than plan.json now holds: 1 of its ")
    (run / "plan.json").write_text(other.to_json())
    for file in ("stats.parquet", "sensitivity.parquet", "qat/bins.parquet"):
        (run / file).unlink()  # whose figures take time
    for name in ("qat-float", "qat-uniform"):
        shutil.rmtree(run / name)
    assert sentence.split("`")[0] in report_html([run])


def test_every_sweep_of_the_table_is_listed(run):
    """The record has the command of the last sweep alone; the table has all of them."""
    content = read_run(run, "mine")
    group = content.sweep.head(2).assign(
        module="", tensor="weight+input", group="kind:conv", protocol="leave_one_out", images=16
    )
    (sweeps,) = [
        table
        for table in provenance(replace(content, sweep=pd.concat([content.sweep, group])))
        if "sweeps" in table.caption
    ]
    assert texts(sweeps) == [
        ["each site quantized", "weight+input", "2, 8", "mse", "as stored", "32", f"{len(content.sweep)}"],
        ["each group, by kind left out of all else quantized", "weight+input", "2, 8", "mse", "as stored", "16", "2"],
    ]


def test_an_earlier_page_is_replaced_whole(finished, tmp_path, capsys):
    """The page's path is said; a second report takes its place and leaves nothing else."""
    for _ in range(2):
        run_report([finished / "vit"], tmp_path)
        assert f"report in {tmp_path / 'index.html'}" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_oscillating_shares_are_over_all_weights():
    """A tensor of 300 weights counts three times one of 100."""
    rows = pd.DataFrame(
        {"step": [10, 10], "weights": [100, 300], "oscillating": [0.4, 0.0], "oscillating_ema": [0.0, 1.0]}
    )
    assert oscillating_shares(rows).to_dict("records") == [{"step": 10, "oscillating": 0.1, "oscillating_ema": 0.75}]


def test_curves_show_the_history(run):
    """Two lines a training, of batches and of validation; top-1 in percent; the same colour in every panel."""
    content = read_run(run, "mine")
    frame = history_frame(content.trainings)
    ax = plot_history(frame, value="top1")
    assert len(ax.lines) == 6
    first = content.trainings[0].history
    expected = 100 * first.loc[first["split"] == "val", "top1"]
    assert any(np.array_equal(line.get_ydata(), expected) for line in ax.lines)
    figure = training_figure(frame, oscillation_frame(content.trainings), "mine")
    loss, _, share = figure.axes
    assert len(loss.lines) == 6
    assert [line.get_color() for line in share.lines] == [loss.lines[0].get_color(), loss.lines[4].get_color()]
    plt.close("all")


def test_the_training_section_has_its_last_figures(run):
    """Loss and top-1 from step 0 to the last, as the history has them, and each term's gradient norm."""
    content = read_run(run, "mine")
    assert terms(content.trainings) == ["task", "kd", "obr_distance", "obr_variance"]
    first = content.trainings[0].history
    validated = first[first["split"] == "val"]
    row = texts(trained(content))[0]
    assert row[:2] == ["qat", "finished"]
    assert row[4] == "12"
    assert row[5:7] == [f"{validated['loss'].iloc[0]:.3f}", f"{validated['loss'].iloc[-1]:.3f}"]
    assert row[7:9] == [f"{100 * validated['top1'].iloc[0]:.1f}", f"{100 * validated['top1'].iloc[-1]:.1f}"]
    norms = gradient_norms(content)
    assert norms.columns == ("training", "task", "kd", "obr_distance", "obr_variance")
    assert norms.rows[0][1].key == first["grad_task"].dropna().iloc[-1]
    assert texts(norms)[1][3] == DASH  # the float training has no bins


def test_terms_that_are_not_yet_switched_on_are_drawn():
    """A term that is 0 at first stays on the figure: the scale is linear about 0. One without values does no harm."""
    history = history_rows().assign(training="qat", absent=np.nan)
    ax = plot_terms(history, ["task", "obr_distance", "absent"])
    assert ax.get_yscale() == "symlog"
    assert ax.lines[1].get_ydata()[0] == 0
    assert len(ax.lines[2].get_ydata()) == 0
    later = history.assign(training="qat-float", obr_distance=np.nan)
    figure = terms_figure(pd.concat([history, later]), ["task", "obr_distance"], "mine")
    assert [ax.yaxis.get_transform().linthresh for ax in figure.axes] == [1e-3, 1e-3]  # of all panels, not of the last
    pulls = terms_figure(history.assign(grad_task=2.0, grad_obr_distance=0.1), ["task"], "mine", gradients=True)
    assert pulls.axes[0].get_ylabel() == "gradient norm"
    assert set(pulls.axes[0].lines[0].get_ydata()) == {2.0}
    assert plot_oscillation(pd.DataFrame({"training": [], "step": [], "oscillating": []})).get_ylabel()
    plt.close("all")
