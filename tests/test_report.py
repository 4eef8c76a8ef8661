"""`qvw report`: one page that holds all, says what is missing, and behaves in a browser."""

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
from analysis.report import report_html
from analysis.report_cells import DASH
from analysis.report_content import history_frame, oscillating_shares, oscillation_frame, read_run, read_runs, terms
from analysis.report_sensitivity import most_sensitive, proxy_ranks
from analysis.report_step import run_report
from analysis.report_tables import certificate, gradient_norms, side_by_side, summary, trained
from analysis.training_plots import plot_history, plot_oscillation, plot_terms, terms_figure, training_figure
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
        if tag not in ("meta", "link", "img"):
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
    assert {a["href"] for a in reader.all("a")} == {f"#{a['id']}" for a in reader.all("h2")}
    assert [a["href"] for a in reader.all("link")] == ["data:,"]
    # 2 over depth, 2 by kind, channels; 2 distributions; sensitivity, SQNR, ranks, proxies; plan; 2 of the trainings,
    # and for each that quantizes one of its oscillation
    assert len(reader.all("img")) == 16
    for section in SECTIONS:
        assert f">{section}</h2>" in text


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
    table = summary(content)
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
    ]
    assert texts(table)[4][3:5] == ["32.00", "32.00"]


def test_runs_stand_side_by_side(finished, page):
    """A column a run; a dash where a run lacks the network; two evaluations of one sort share a cell."""
    resnet, vit = read_runs([finished / "resnet", finished / "vit"])
    another = resnet.verify[resnet.verify["plan"] == "uniform"].assign(weight_bits=2.0)
    resnet = replace(resnet, verify=pd.concat([resnet.verify, another]))
    table = side_by_side([resnet, vit])
    assert table.columns == ("network", "resnet", "vit")
    assert [row[2] for row in texts(table)] == [DASH] * 6
    uniform = texts(table)[2][1].splitlines()
    assert len(uniform) == 4
    assert uniform[3].startswith("w 2.00")
    text = page.read_text(encoding="utf-8")
    assert ": largest in" in text  # the comparison's reading
    assert "weights of convolutions and linears by depth" in text


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
    for row in summary(content).rows[:3]:
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
    """Cut a file short."""
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
    with pytest.raises(InputError, match="is no run folder"):
        read_runs([run / "run.json"])
    with pytest.raises(InputError, match="holds nothing to report"):
        read_runs([empty])
    with pytest.raises(InputError, match="Give each once"):
        read_runs([run, run, run])
    (run / "qat" / "config.json").write_text("[]")
    with pytest.raises(InputError, match="no table of settings"):
        read_runs([run])
    pd.DataFrame({"a": [1]}).to_parquet(run / "verify.parquet")
    with pytest.raises(InputError, match="lacks the column 'plan'"):
        read_runs([run])


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
    assert plot_oscillation(pd.DataFrame({"training": [], "step": [], "oscillating": []})).get_ylabel()
    plt.close("all")


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium that notes its console and what it loads."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    driver = shutil.which("chromedriver")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if driver is None or program is None:
        pytest.skip("chromium and its chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


def loaded(browser) -> list[str]:
    """Addresses that the browser has loaded since the last call, without what lies inside the page."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith("data:")]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_the_window(browser, page, width, scheme):
    """Nothing reaches beyond the window save inside a region that scrolls; no console errors, no requests."""
    loaded(browser)
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())
    outside = browser.execute_script(
        "document.querySelectorAll('details').forEach(each => { each.open = true; });"
        "const wide = e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5;"
        "return Array.from(document.body.querySelectorAll('*')).filter(wide)"
        ".filter(e => !e.parentElement.closest('.scroll')).map(e => e.outerHTML.slice(0, 100));"
    )
    assert outside == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return Array.from(document.images).every(i => i.complete && i.naturalWidth > 0)")
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    assert loaded(browser) == [page.as_uri()]
    assert browser.get_log("browser") == []


def column(browser, caption: str, place: int) -> list[str]:
    """The cells of a table's column as they stand."""
    return browser.execute_script(
        "const tables = Array.from(document.querySelectorAll('table'));"
        "const table = tables.find(each => each.caption.textContent.includes(arguments[0]));"
        "return Array.from(table.tBodies[0].rows, row => row.cells[arguments[1]].textContent);",
        caption,
        place,
    )


def test_a_table_sorts_by_the_column_that_is_clicked(browser, page, finished):
    """Numbers as numbers, words as words, a second click the other way; the keyboard does it too; dashes stay last."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.get(page.as_uri())

    def head(caption, name):
        region = f"//table[caption[contains(., '{caption}')]]"
        return browser.find_element(By.XPATH, f"{region}//th[button[normalize-space() = '{name}']]")

    expected = pd.read_parquet(finished / "resnet" / "verify.parquet")["loss"].map("{:.3f}".format)
    before = column(browser, "evaluated networks", 2)
    ascending = sorted(before, key=lambda cell: float(cell.split()[0]))
    assert sorted(cell.split()[0] for cell in before) == sorted(expected)
    loss = head("resnet: evaluated networks", "loss (nats)")
    loss.find_element(By.TAG_NAME, "button").click()
    assert column(browser, "evaluated networks", 2) == ascending
    assert loss.get_attribute("aria-sort") == "ascending"
    loss.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    after = [float(cell.split()[0]) for cell in column(browser, "evaluated networks", 2)]
    assert after == sorted(after, reverse=True)
    assert loss.get_attribute("aria-sort") == "descending"

    network = head("resnet: evaluated networks", "network")
    network.find_element(By.TAG_NAME, "button").click()
    names = column(browser, "evaluated networks", 0)
    assert names == sorted(names)
    assert loss.get_attribute("aria-sort") is None

    for expected_budgets in (["4", "5"], ["5", "4"]):
        head("certificate", "budget").find_element(By.TAG_NAME, "button").click()
        cells = column(browser, "certificate", 2)
        assert cells[:2] == expected_budgets
        assert set(cells[2:]) == {DASH}
    assert browser.get_log("browser") == []
