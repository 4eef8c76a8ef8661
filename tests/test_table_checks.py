"""Tables that were edited by hand are read as they were, or refused with the place: never a traceback or nonsense."""

import json
import math
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from analysis.cost import COST_COLUMNS, SAME, cost_table
from analysis.planning.candidates import offered
from analysis.planning.frontier import PARETO_COLUMNS, UNIFORM_COLUMNS, pareto_front, uniform_points
from analysis.planning.objectives import measured_scores
from analysis.planning.plan_request import PlanRequest
from analysis.proxies import PROXY_COLUMNS, PROXY_IMAGE_COLUMNS, proxy_table
from analysis.runs import Run
from analysis.sensitivity import (
    IMAGE_COLUMNS,
    ROW_KEY,
    SENSITIVITY_COLUMNS,
    SweepConfig,
    images_table,
    preferred_rows,
    sensitivity_table,
    sweep_keys,
)
from analysis.steps import plan_step as plan_step
from analysis.steps.plan_step import run_plan
from analysis.storage.columns import (
    BINS_COLUMNS,
    HISTORY_COLUMNS,
    OSCILLATION_COLUMNS,
    VERIFICATION_COLUMNS,
    VERIFY_COLUMNS,
)
from analysis.storage.run_record import ModelRecord
from analysis.storage.table_checks import Column, Table, checked
from analysis.storage.tables import TABLES
from analysis.sweeps.proxy_correlation import CORRELATION_COLUMNS, measured_beside, proxy_correlations
from analysis.sweeps.sweep import sweep
from analysis.tasks import classification
from analysis.tensor_stats import STATS_COLUMNS, collect_stats
from quant.errors import InputError
from quant.sites import find_sites
from tests.digits_vit import qvw
from tests.networks import net_of

IMAGES = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
BATCHES = [(IMAGES, torch.arange(6) % 10)]
BUDGET = {"weight_bits": 5.5, "activation_bits": 5.0, "gbitops": 3e-4, "quiet": True}
# No measurement gives one of these, except where a column is not used by a plan at all.
WRONG_VALUES = (None, math.nan, math.inf, -math.inf, -1e30, 1e300, -1, "?", "", [], ["?"], ["?:weight"], [None])


@dataclass(frozen=True, repr=False)
class Measured:
    """Every table of a small network, and how many parameters it has."""

    frames: dict[str, pd.DataFrame]
    parameters: int

    def folder(self, path: Path, **changed: pd.DataFrame) -> Run:
        """A run folder with what a plan is made of, and the tables of `changed`, in place of the measured ones."""
        run = Run(path)
        run.set_model(ModelRecord(typed="vit", name="vit", weights_sha256="aa", parameters=self.parameters))
        for name in ("sensitivity", "cost"):
            run.write_table(name, self.frames[name])
        for name, frame in changed.items():
            run.write_table(name, frame)
        return run


@pytest.fixture(scope="module")
def measured() -> Measured:
    """A ViT of one block, swept alone and by groups, with its statistics, proxies and fronts; a training by hand."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, in_chans=1, num_classes=10,
                              embed_dim=12, depth=1, num_heads=2).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    trace, every = find_sites(model, IMAGES[:2])
    sites = [info for info in every if info.quantizable]
    alone, groups = SweepConfig(bit_widths=(2, 4, 8)), SweepConfig(bit_widths=(2,), groups="kind")
    keys = [*sweep_keys(model, sites, alone), *sweep_keys(model, sites, groups)]
    rows = list(sweep(net_of(model, trace, sites, "vit"), sites, BATCHES, keys, task=classification()))
    frames = {
        "cost": cost_table(every),
        "sensitivity": sensitivity_table(rows),
        "sensitivity_images": images_table(rows),
    }
    stats = collect_stats(net_of(model, trace, every, "vit"), every, [IMAGES])
    frames |= {"stats": stats.stats, "channels": stats.channels, "histograms": stats.histograms}
    proxies, products = proxy_table(
        net_of(model, trace, sites), sites, BATCHES, (2, 4), task=classification(), estimator="mse", granularity=None,
        stats=stats.stats,
    )  # fmt: skip
    beside = measured_beside(proxies, frames["sensitivity"])
    frames |= {"proxies": proxies, "proxy_images": products,
               "proxy_correlation": proxy_correlations(proxies, beside, frames["sensitivity_images"])}  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters())
    options = preferred_rows(frames["sensitivity"]).assign(score=lambda table: table["kl"])
    frames["pareto"] = pareto_front(options, frames["cost"], stored=parameters, points=3)
    frames["pareto_uniform"] = uniform_points(options, frames["cost"], stored=parameters)
    costs = {
        "plan": ["float", "planned"], "weight_bits": [32.0, 3.0], "activation_bits": [32.0, 4.0],
        "size_bytes": [4000, 500], "bitops": [10**9, 10**7], "top1": [0.5, 0.4], "top1_se": [0.01, 0.01],
    }  # fmt: skip
    how = {"estimator": ["none", "mse"], "batchnorm": ["stored", "re_estimated"]}
    frames["verify"] = pd.DataFrame({**costs, "loss": 1.0, "loss_se": 0.1, "images": 6, **how})
    frames["verify"] = frames["verify"].reindex(columns=list(VERIFY_COLUMNS))
    names = (name for name in VERIFICATION_COLUMNS if name not in (*costs, "plan_sha256"))
    frames["verification"] = pd.DataFrame({**costs, **dict.fromkeys(names, 0.1), "plan_sha256": "ab"})
    history = {"step": [1, 2, 2], "epoch": 0, "images": [6, 12, 12], "lr": [0.1, 0.1, math.nan], "seconds": 1.0,
               "split": ["train", "train", "val"], "loss": 2.0, "task": [2.0, 2.0, math.nan], "top1": 0.5}  # fmt: skip
    whole = dict.fromkeys(("step", "epoch", "images"), int)
    figures = dict.fromkeys((name for name in HISTORY_COLUMNS if name not in (*whole, "split")), float)
    frames["history"] = pd.DataFrame(history, columns=list(HISTORY_COLUMNS)).astype(whole | figures)
    frames["oscillation"] = pd.DataFrame({"step": [1, 2], "module": "head", "tensor": "weight", "weights": 120,
                                          "oscillating": 0.1, "oscillating_ema": 0.2})  # fmt: skip
    frames["bins"] = pd.DataFrame({"step": 2, "module": "head", "tensor": "weight", "kind": "head",
                                   "position": [-0.25, 0.25], "weights": 60})  # fmt: skip
    return Measured(frames, parameters)


def test_the_columns_are_those_of_the_writers(measured):
    """What is checked is what is written, column by column; the names of the proxies are the proxies'."""
    written = {
        "cost": (*COST_COLUMNS, SAME), "sensitivity": SENSITIVITY_COLUMNS, "stats": STATS_COLUMNS,
        "sensitivity_images": (*ROW_KEY, *IMAGE_COLUMNS), "proxies": PROXY_COLUMNS,
        "proxy_images": PROXY_IMAGE_COLUMNS, "proxy_correlation": CORRELATION_COLUMNS, "verify": VERIFY_COLUMNS,
        "verification": VERIFICATION_COLUMNS, "history": HISTORY_COLUMNS, "oscillation": OSCILLATION_COLUMNS,
        "bins": BINS_COLUMNS,
        "pareto": PARETO_COLUMNS, "pareto_uniform": UNIFORM_COLUMNS,
        **{name: tuple(measured.frames[name]) for name in ("channels", "histograms")},
    }  # fmt: skip
    assert {name: sorted(columns) for name, columns in written.items()} == {
        name: sorted(table.columns) for name, table in TABLES.items()
    }
    assert set(TABLES["sensitivity"].key) == set(ROW_KEY)
    assert set(measured.frames) == set(TABLES)


def test_what_was_measured_is_read_as_it_was_written(measured, tmp_path):
    """No table of ours is refused, and none is changed by the check."""
    run = measured.folder(tmp_path, **measured.frames)
    for name in TABLES:
        path = tmp_path / f"{name}.parquet"
        pd.testing.assert_frame_equal(run.read_table(name), pd.read_parquet(path), check_exact=True)


def site_row(frame: pd.DataFrame, tensor: str) -> int:
    """The place of the first row of one site that holds `tensor`."""
    alone = frame["group"] == "" if "group" in frame else True
    return int(np.flatnonzero((frame["tensor"] == tensor) & alone)[0])


def with_value(frame: pd.DataFrame, column: str, value: object, tensor: str = "input") -> pd.DataFrame:
    """The frame with another value in one row, of a site that holds `tensor`."""
    changed = frame.copy()
    changed[column] = changed[column].astype(object)
    changed.at[site_row(frame, tensor), column] = value
    return changed


@pytest.mark.parametrize(
    ("table", "column", "value", "message"),
    [
        ("sensitivity", "bit_width", 0, r"bit_width is 0, expected one of 1, 2, 3, 4, 5, 6, 7, 8, 16\."),
        ("sensitivity", "bit_width", 2.5, r"bit_width is 2\.5, expected one of 1, 2"),
        ("sensitivity", "kl", math.nan, r"kl is missing, expected a number"),
        ("sensitivity", "divergence", math.nan, r"divergence is missing, expected a number"),
        ("sensitivity", "divergence", -2.0, r"divergence is -2\.0, expected a number from -1e-06"),
        ("sensitivity", "kl", -2.0, r"kl is -2\.0, expected a number from -1e-06"),
        ("sensitivity", "kl", math.inf, r"kl is inf, expected"),
        ("sensitivity", "signed", None, r"signed is (missing|None), expected True or False for a row of one site"),
        ("sensitivity", "offset", None, r"offset is missing, expected True or False"),
        ("sensitivity", "module", None, r"row \d+: module is missing, expected text\."),
        ("sensitivity", "tensor", None, r"row \d+: tensor is missing, expected text\."),
        ("sensitivity", "tensor", "wieght", r"tensor is 'wieght', expected one of weight, weight\.query, .*classes"),
        ("sensitivity", "group", "mine", r"group is 'mine', expected nothing in a row of one site, and .*kind"),
        ("sensitivity", "granularity", "per_row", r"granularity is 'per_row', expected one of per_tensor, per_ch"),
        ("sensitivity", "granularity", "default", r"granularity is 'default', expected one of per_tensor, per_ch"),
        ("sensitivity", "estimator", "max", r"estimator is 'max', expected one of mse"),
        ("sensitivity", "batchnorm", "?", r"batchnorm is '\?', expected one of stored"),
        ("sensitivity", "protocol", "?", r"protocol is '\?', expected one of single"),
        ("sensitivity", "delta_loss", math.nan, r"delta_loss is missing, expected a number, or none in any row"),
        ("sensitivity", "top1", 1.5, r"top1 is 1\.5, expected a number from 0 to 1"),
        ("sensitivity", "rank_low", 1e6, r"rank_high is [\d.]+, expected rank_low or more"),
        ("cost", "macs", math.nan, r"macs is missing, expected a whole number from 0"),
        ("cost", "macs", 1, r"macs is \d+, expected the sum of those of its edges"),
        ("cost", "macs", 2**53, r"macs is"),
        ("cost", "numel", 0, r"numel is 0, expected 1 or more, for the site can be quantized"),
        ("cost", "numel", -5, r"numel is -5, expected a whole number from 0 to 9\.0072e\+15"),
        ("cost", "numel", math.inf, r"numel is inf, expected a whole number"),
        ("cost", "elements_per_image", math.nan, r"elements_per_image is missing, expected none for a weight, numel"),
        ("cost", "edges", None, r"edges is missing, expected a list, each value text\."),
        ("cost", "edges", [], r"edges is \[\], expected sites of this table"),
        ("cost", "edges", ["head:weights"], r"edges is \['head:weights'\], expected sites of this table \(module"),
        ("cost", "edges", ["head:input"], r"edges is \['head:input'\], expected sites of this table \(module"),
        ("cost", "edges", ["head:weight"], r"expected sites whose edges name this one in turn"),
        ("cost", "heads", -1, r"heads is -1, expected a whole number from 0"),
        ("cost", "kind", "convolution", r"kind is 'convolution', expected one of conv, conv\.depthwise"),
        ("cost", "pinned", None, r"pinned is missing, expected True or False\."),
        ("cost", "quantizable", None, r"quantizable is missing, expected True or False\."),
        ("cost", SAME, "head:output", r"same_tensor is 'head:output', expected a site of this table"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_with_its_place(measured, tmp_path, table, column, value, message):
    """One value that no measurement gives: file, row and site, column, what came, what was expected, the next step."""
    run = measured.folder(tmp_path, **{table: with_value(measured.frames[table], column, value)})
    with pytest.raises(InputError, match=message) as caught:
        run.read_table(table)
    text = str(caught.value)
    assert re.search(rf"{table}\.parquet, row \d+", text)
    if column not in ("module", "tensor", "macs", "edges"):
        assert ":input): " in text
    assert re.search(r"Make it again: .*qvw sensitivity", text)
    assert len(text.splitlines()) == 1


def test_a_column_of_another_type_is_told_once(measured, tmp_path):
    """Numbers as text: the first row is named, and how many more are wrong; a flag as a number is no flag."""
    frame = measured.frames["sensitivity"]
    run = measured.folder(tmp_path, sensitivity=frame.astype({"kl": str}))
    with pytest.raises(
        InputError, match=rf"row 0 .*kl is '[\d.e-]+' \(and {len(frame) - 1} more rows are wrong\), exp"
    ):
        run.read_table("sensitivity")
    run.write_table("cost", measured.frames["cost"].astype({"pinned": int}))
    with pytest.raises(InputError, match=r"pinned is 1 \(and \d+ more rows are wrong\), expected True or False"):
        run.read_table("cost")


def test_repeated_rows_are_told(measured, tmp_path):
    """Both rows are named, and the columns in which they agree; other figures make no other measurement."""
    for table, key in (("cost", "module, tensor"), ("sensitivity", "module, tensor, group, bit_width, protocol")):
        frame = measured.frames[table]
        again = frame.iloc[[3]].assign(**{"note": "x"} if "note" in frame else {})
        run = measured.folder(tmp_path / table, **{table: pd.concat([frame, again])})
        with pytest.raises(InputError, match=rf"row {len(frame)} \(.*\) repeats row 3: both have the same {key}"):
            run.read_table(table)


def test_tables_without_a_row_are_told(measured, tmp_path):
    """There is nothing to plan without a site; of other tables no row is no damage."""
    for name in ("sensitivity", "cost", "oscillation"):
        run = measured.folder(tmp_path / name, **{name: measured.frames[name].iloc[:0]})
        if name == "oscillation":
            assert run.read_table(name).empty
        else:
            with pytest.raises(InputError, match=rf"{name}\.parquet has no row\. Make it again"):
                run.read_table(name)


def test_figures_of_images_are_as_many_in_every_row(measured, tmp_path):
    """Lists of unequal length, or with a value that is no number, are told; losses may lack where labels do."""
    frame = measured.frames["sensitivity_images"]
    short = with_value(frame, "image_divergence", [0.1, 0.2])
    with pytest.raises(InputError, match=r"image_divergence is \[0\.1, 0\.2\], expected as many values as in row 0"):
        measured.folder(tmp_path, sensitivity_images=short).read_table("sensitivity_images")
    holed = with_value(frame, "image_divergence", [math.nan] * 6)
    with pytest.raises(InputError, match=r"image_divergence is \[nan, .*\], expected a list, each value a number from"):
        measured.folder(tmp_path, sensitivity_images=holed).read_table("sensitivity_images")
    unlabelled = frame.assign(image_delta_loss=[[math.nan] * 6] * len(frame))
    measured.folder(tmp_path, sensitivity_images=unlabelled).read_table("sensitivity_images")


def test_other_types_of_the_same_values_are_the_same_table(measured, tmp_path):
    """Small integers, nullable and categorical columns, an index: read as int64, float64, bool and text."""
    run, narrow = measured.folder(tmp_path / "a", proxies=measured.frames["proxies"]), {}
    for name in ("sensitivity", "cost", "proxies"):
        frame = measured.frames[name].convert_dtypes()
        small = {"bit_width": "int8", "tensor": "category", "order": "uint16"}
        narrow[name] = frame.astype({column: dtype for column, dtype in small.items() if column in frame})
        narrow[name].index += 7
    other = measured.folder(tmp_path / "b")
    for name, frame in narrow.items():
        frame.to_parquet(tmp_path / "b" / f"{name}.parquet", index=True)
        pd.testing.assert_frame_equal(other.read_table(name), run.read_table(name), check_dtype=True)


def test_an_unknown_table_is_read_as_it_is(tmp_path):
    """A table of which nothing is known is only asked for its columns; one name twice is told."""
    run = Run(tmp_path)
    run.write_table("mine", pd.DataFrame({"a": [None, 1.0]}))
    assert len(run.read_table("mine", ["a"])) == 2
    with pytest.raises(InputError, match=r"mine\.parquet lacks the column 'b'"):
        run.read_table("mine", ["b"])
    doubled = pd.DataFrame([[1, 2]], columns=["a", "a"])
    with pytest.raises(InputError, match=r"x has two columns 'a'\. Fix it\."):
        checked(doubled, Table(columns={"a": Column(sort="whole")}), (), source="x", remedy="Fix it.")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (10, r"The model has 10 parameters by run\.json, which is \d+ less than the planned weights hold\. Correct"),
        (-1, r"run\.json is not a record of a run: model\.parameters: .*greater than or equal to 0"),
        (10**400, r"run\.json is not a record of a run: model\.parameters: .*less than or equal to"),
        (math.nan, r"run\.json is not a record of a run: model\.parameters"),
    ],
    ids=["few", "negative", "huge", "nan"],
)
def test_parameters_that_no_network_has_are_told(measured, tmp_path, capfd, parameters, message):
    """run.json says how many there are in all: fewer than the planned weights, none, or beyond all counting."""
    measured.folder(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    record["model"]["parameters"] = parameters
    (tmp_path / "run.json").write_text(json.dumps(record))
    for budget in (["--weight-bits", 6], ["--size", "1MiB"], ["--like", "w4a4"]):
        assert qvw("plan", "--run", tmp_path, *budget) == 2
        error = capfd.readouterr().err
        assert re.search(message, error), error
        assert len(error.strip().splitlines()) <= 2
    assert not (tmp_path / "plan.json").exists()


def latency(frame: pd.DataFrame) -> pd.DataFrame:
    """Milliseconds of every site and bit-width that was measured, not rising with the bits everywhere."""
    rows = preferred_rows(frame)[["module", "tensor", "bit_width"]]
    return rows.assign(milliseconds=[0.001 * (bits if i % 5 else 9 - bits) for i, bits in enumerate(rows["bit_width"])])


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("module", "haed", r"no site haed:\w+.*; the nearest is head:\w+\. Check that the latency table is for"),
        ("module", None, r"no site :input; the nearest is .*the latency table"),
        ("tensor", "wieght", r"no site .*:wieght; the nearest is .*:weight"),
        ("bit_width", 2.5, r"The latency table has .* at 2\.5 bits; expected a whole number from 1 to 32\. Fix"),
        ("bit_width", 99, r"at 99(\.0)? bits; expected a whole number"),
        ("milliseconds", -1.0, r"The latency of .*:input at 2 bits is -1\.0; expected milliseconds, 0 to"),
        ("milliseconds", math.nan, r"The latency of .*:input at 2 bits is nan; expected milliseconds"),
        ("milliseconds", 1e12, r"The latency of .*:input at 2 bits is 1000000000000\.0; expected milliseconds, 0"),
    ],
)  # fmt: skip
def test_a_wrong_row_of_latencies_is_told(measured, tmp_path, capfd, column, value, message):
    """A site that the model lacks would cost nothing under its right name; what is no time is no cost."""
    measured.folder(tmp_path)
    table = with_value(latency(measured.frames["sensitivity"]).reset_index(drop=True), column, value)
    if column == "module" and value == "haed":
        table = latency(measured.frames["sensitivity"]).replace({"module": {"head": "haed"}})
    table.to_csv(tmp_path / "mine.csv", index=False)
    assert qvw("plan", "--run", tmp_path, "--latency-ms", 0.1, "--latency", tmp_path / "mine.csv") == 2
    error = capfd.readouterr().err
    assert re.search(message, error), error
    assert len(error.strip().splitlines()) <= 2


@pytest.fixture(scope="module")
def undrawn():
    """Plans without their figures, which take ten times as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_step, "bits_figure", lambda *_, **__: None)
        patch.setattr(plan_step, "save_figure", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def expected(measured, undrawn, tmp_path_factory):
    """The plan of the tables as they were measured."""
    return plan_of(measured.folder(tmp_path_factory.mktemp("whole")))


def plan_of(run: Run) -> dict:
    """What `qvw plan` writes: the sites and what they cost."""
    run_plan(run.path, PlanRequest(**BUDGET))
    content = json.loads((run.path / "plan.json").read_text())
    return {"sites": content["sites"], "totals": content["totals"]}


@st.composite
def damages(draw, frames: dict[str, pd.DataFrame], tables: tuple[str, ...]) -> tuple[str, pd.DataFrame]:
    """A table with one value, one column or one row damaged, in a way that no measurement could have made it so."""
    name = draw(st.sampled_from(tables))
    frame = frames[name]
    column, row = draw(st.sampled_from(list(frame))), draw(st.integers(0, len(frame) - 1))
    how = draw(st.sampled_from(["value"] * 6 + ["text", "nothing", "drop", "repeat"]))
    if how == "drop":
        return name, frame.drop(columns=column)
    if how == "repeat":
        return name, pd.concat([frame, frame.iloc[[row]]], ignore_index=True)
    if how != "value":
        return name, frame.assign(**{column: frame[column].map(str) if how == "text" else None})
    values = [*WRONG_VALUES]
    if frame[column].dtype.kind in "iu":
        values += [2.5, True]
    changed = frame.astype({column: object})
    changed.at[row, column] = draw(st.sampled_from(values))
    return name, changed


def write(run: Run, name: str, frame: pd.DataFrame) -> None:
    """Write the damaged table, unless Parquet itself cannot hold it."""
    try:
        run.write_table(name, frame)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        assume(False)


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_table_gives_the_same_plan_or_is_refused(measured, expected, data):
    """Whatever is damaged in what a plan is made of: the very same plan, or an InputError of one or two lines."""
    name, frame = data.draw(damages(measured.frames, ("sensitivity", "cost")))
    with tempfile.TemporaryDirectory() as folder:
        run = measured.folder(Path(folder))
        write(run, name, frame)
        try:
            plan = plan_of(run)
        except InputError as error:
            plan, told = expected, str(error).splitlines()
        else:
            told = []
    assert plan == expected
    assert len(told) <= 1


@settings(max_examples=100)
@given(data=st.data())
def test_a_damaged_table_is_whole_or_refused(measured, data):
    """Whatever is damaged in any table: each column that is read has its type and no hole, or it is an InputError."""
    with tempfile.TemporaryDirectory() as folder:
        name, frame = data.draw(damages(measured.frames, tuple(TABLES)))
        run = Run(folder)
        write(run, name, frame)
        try:
            table = run.read_table(name)
        except InputError as error:
            told = str(error)
            table = frame.iloc[:0]
        else:
            told = f"{name}.parquet"
        assert f"{name}.parquet" in told
        kinds = {"whole": "i", "number": "f", "flag": "bO"}
        for column, known in TABLES[name].columns.items() if len(table) else ():
            if column in table:
                assert table[column].dtype.kind in kinds.get(known.sort, "OTU")
                assert known.missing != "never" or table[column].notna().all()
        key = list(TABLES[name].key)
        assert not key or not table.duplicated(key).any()


def test_options_of_a_plan_come_from_what_is_read(measured, tmp_path):
    """The check changes no score: options from the folder are those of the frames that were measured."""
    run = measured.folder(tmp_path)
    request = PlanRequest(**BUDGET)
    frames, options = measured.frames, []
    for table, cost in (
        (run.read_table("sensitivity"), run.read_table("cost")),
        (frames["sensitivity"], frames["cost"]),
    ):
        rows = preferred_rows(table)
        options.append(offered(measured_scores(rows, "divergence", robust=False), rows, cost, request))
    read, made = options
    assert read["score"].tolist() == made["score"].tolist()
    assert asdict(request.budget(read, frames["cost"], measured.parameters))["weight_bits"] == 5.5
