"""Ablations: the file that names them, the statistics of their results, and a whole small one."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from analysis.figures.ablation_plots import ablation_figure
from analysis.figures.panels import save_figure
from analysis.steps import ablation_step as ablation_step
from analysis.training.ablation_config import Ablation, Arm, Subject, read_ablation
from analysis.training.ablation_results import mean_and_interval, summarized, verdicts
from quant.errors import InputError
from tests.digits_vit import KWARGS, qvw

SMALL = {
    "baseline": "lsq",
    "seeds": [0, 1],
    "settings": {"steps": 3, "batch_size": 16, "kd_weight": 0, "obr_weight": 0},
    "arms": {
        "float": {"title": "float"},
        "lsq": {"title": "LSQ", "uniform": "w2a2", "per_head": False},
        "obr": {"title": "OBR", "uniform": "w2a2", "settings": {"obr_weight": 0.01}},
        "plan": {"title": "planned", "like": "w3a3", "against": "obr", "per_head": False},
    },
    "subjects": {
        "vit": {
            "model": "vit_tiny_patch16_224", "data": "digits", "images": 48, "val_images": 40, "sweep_images": 8,
            "sweep_bits": [2, 3, 8], "arms": ["lsq", "plan"],
            "input_size": [1, 16, 16], "mean": [0.5], "std": [0.5],
            "model_kwargs": KWARGS,
        }
    },
}  # fmt: skip


def written(tmp_path, **changes):
    """The YAML file of the small ablation with changes, keys as `subjects.vit.images`."""
    content = json.loads(json.dumps(SMALL))
    for place, value in changes.items():
        *path, last = place.split(".")
        where = content
        for name in path:
            where = where[name]
        where[last] = value
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms.lsq.unifrom": "w2a2"}, "line [0-9]+: arms.lsq.unifrom is unknown; the nearest is uniform"),
        ({"baseline": "lsp"}, "no arm 'lsp'; the nearest is lsq"),
        ({"arms.plan.against": "obs"}, "no arm 'obs'; the nearest is obr"),
        ({"subjects.vit.arms": ["all"]}, "no arm 'all'"),
        ({"arms.obr.settings": {"obr_wieght": 1}}, "small.yaml, line [0-9]+: 'obr_wieght' is no .* obr_weight"),
        ({"arms.obr.settings": {"kd_temperature": 0}}, "kd_temperature=0"),
        ({"arms.obr.settings": {"obr_weight": -1}}, "obr_weight=-1"),
        ({"arms.lsq.uniform": "w9a2"}, "line [0-9]+: uniform 'w9a2' is not understood"),
        ({"arms.lsq.like": "w3a3"}, "both `uniform` and `like`"),
        ({"subjects.vit.weights": "$QVW_NOT_SET/w"}, "names .QVW_NOT_SET, which the environment does not set"),
        ({"arms": {}}, "has no arm"),
        ({"subjects.vit.arms": ["lsq", "lsq"]}, "arms .'lsq', 'lsq'. must be one or more, each of them once"),
        ({"subjects.vit.arms": []}, "must be one or more"),
        ({"seeds": [True, False]}, "seeds.0: input should be a valid integer"),
        ({"arms.obr.settings": {"seed": 5}}, "the seed of each training is one of `seeds`"),
        ({"arms.obr.settings": {"batch_size": True}}, "batch_size=true: a number or a name is expected"),
        ({"arms": SMALL["arms"] | {"..": {"title": "x"}}}, "arm '..' is no name of a folder"),
        ({"seeds": [0, 1, 0]}, "seeds .0, 1, 0. must be one or more, each of them once"),
        ({"arms.a/b": {"title": "x"}}, "no name of a folder"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_told_before_anything_is_trained(tmp_path, changes, message):
    """The message names the place, and the nearest name."""
    if changes.get("arms.obr.settings"):
        changes = changes | {"subjects.vit.arms": ["lsq", "obr"]}
    with pytest.raises(InputError, match=message):
        read_ablation(written(tmp_path, **changes))


def test_a_key_that_is_there_twice_is_told(tmp_path):
    """YAML keeps the last of two arms of one name, and the other would be missing without a word."""
    file = written(tmp_path)
    file.write_text(file.read_text().replace("baseline: lsq", "baseline: lsq\nbaseline: obr"))
    with pytest.raises(InputError, match=r"line \d+ has 'baseline', which is there 2 times"):
        read_ablation(file)


def test_one_pattern_needs_no_list(tmp_path):
    """`exclude: "*x*"` is what a user writes first."""
    found = read_ablation(written(tmp_path, **{"subjects.vit.exclude": "*downsample*"}))
    assert found.subjects["vit"].exclude == ("*downsample*",)


def test_trainings_come_seed_by_seed_and_settings_of_the_arm_win(tmp_path):
    """An unfinished ablation has each arm about equally often."""
    jobs = list(read_ablation(written(tmp_path, **{"subjects.vit.settings": {"obr_weight": 0.5}})).jobs())
    assert [(job.arm, job.seed) for job in jobs] == [("lsq", 0), ("plan", 0), ("lsq", 1), ("plan", 1)]
    assert [job.config.seed for job in jobs] == [0, 0, 1, 1]
    settings = {"subjects.vit.settings": {"obr_weight": 0.5}, "subjects.vit.arms": ["lsq", "obr"]}
    jobs = list(read_ablation(written(tmp_path, **settings)).jobs())
    assert [job.config.obr_weight for job in jobs] == [0.5, 0.01, 0.5, 0.01]


def test_intervals_are_those_of_students_t():
    """Mean and 95 % interval are scipy's; the paired difference is that of a paired t-test."""
    generator = np.random.default_rng(0)
    a, b = generator.normal(0.6, 0.01, 5), generator.normal(0.5, 0.01, 5)
    mean, low, high = mean_and_interval(pd.Series(a))
    expected = stats.ttest_1samp(a, 0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((a.mean(), expected.low, expected.high))
    ablation = Ablation(
        subjects={"net": Subject(model="m", data="digits")}, baseline="b",
        arms={"a": Arm(title="A", uniform="w2a2"), "b": Arm(title="B")}, seeds=tuple(range(5)),
    )  # fmt: skip
    rows = pd.DataFrame(
        [{"subject": "net", "arm": arm, "seed": i, "top1_last": value} for arm, values in (("a", a), ("b", b))
         for i, value in enumerate(values)]
    ).reindex(columns=["subject", "arm", "seed", "top1_last", "weight_bits", "activation_bits", "top1_start",
                       "top1_best", "oscillating", "images_per_second"])  # fmt: skip
    summary = summarized(rows.sample(frac=1, random_state=1), ablation).set_index("arm")
    paired = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert summary.loc["a", ["ahead_low", "ahead_high"]].tolist() == pytest.approx([paired.low, paired.high])
    assert summary.loc["b", "ahead"] == 0
    assert "better: A +" in verdicts(summary.reset_index(), ablation)[0]
    equal = summarized(rows.assign(top1_last=rows["arm"].map({"a": 0.6, "b": 0.5})), ablation)
    assert "not significantly different: A +10.00" in verdicts(equal, ablation)[0]  # no spread is no certainty
    harmful = summarized(rows.assign(top1_last=-rows["top1_last"]), ablation)
    assert "worse: A -" in verdicts(harmful, ablation)[0]


def test_one_seed_has_no_interval():
    """Nothing is claimed from one training; what is missing counts nowhere."""
    assert np.isnan(mean_and_interval(pd.Series([0.5]))[1:]).all()
    assert mean_and_interval(pd.Series([0.5, 0.6, np.nan])) == mean_and_interval(pd.Series([0.5, 0.6]))


@pytest.mark.parametrize(("images", "right", "more"), [(450, (384, 350), 2), (450, (270, 234, 272), 4)])
def test_equal_differences_of_two_or_three_seeds_are_chance(images, right, more):
    """Shares of images differ in their last digit where counts do not: no arm is better for that."""
    ablation = Ablation(
        subjects={"net": Subject(model="m", data="digits")}, baseline="a", seeds=tuple(range(len(right))),
        arms={"a": Arm(title="A"), "b": Arm(title="B", uniform="w2a2")},
    )  # fmt: skip
    rows = [{"subject": "net", "arm": arm, "seed": seed, "top1_last": (count + extra) / images}
            for arm, extra in (("a", 0), ("b", more)) for seed, count in enumerate(right)]  # fmt: skip
    table = pd.DataFrame(rows).assign(
        **{name: 0.0 for name in ("top1_start", "top1_best", "oscillating", "weight_bits", "activation_bits",
                                  "images_per_second")}
    )  # fmt: skip
    (line,) = verdicts(summarized(table, ablation), ablation)
    assert "not significantly different: B" in line


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    """A small ablation, whole."""
    folder = tmp_path_factory.mktemp("ablation")
    file = written(folder)
    assert qvw("ablate", file, "--out", folder / "out", "--num-workers", 0) == 0
    return file, folder / "out"


def test_rows_are_those_of_the_trainings(ablated):
    """Accuracy before, after and at best are those of the history; the plan spends no more than the uniform bits."""
    _, out = ablated
    results = pd.read_csv(out / "ablation.csv")
    assert list(zip(results["arm"], results["seed"], strict=True)) == [("lsq", 0), ("plan", 0), ("lsq", 1), ("plan", 1)]
    for row in results.itertuples():
        val = pd.read_parquet(out / "vit" / f"qat-{row.arm}-{row.seed}" / "history.parquet").query("split == 'val'")
        assert (row.top1_start, row.top1_last) == (val["top1"].iloc[0], val["top1"].iloc[-1])
        assert row.top1_best == val["top1"].iloc[1:].max()
        assert (row.val_images, row.steps) == (40, 3)
        plan = json.loads((out / "vit" / f"qat-{row.arm}-{row.seed}" / "plan.json").read_text())
        assert {site["granularity"] for site in plan["sites"]} <= {"per_tensor", "per_channel"}
        assert row.weight_bits == pytest.approx(plan["totals"]["weight_bits"])
    assert (out / "ablation.png").stat().st_size > 10_000


def test_what_is_finished_is_kept(ablated, monkeypatch, capfd):
    """A second call trains nothing; another seed trains only its own."""
    file, out = ablated
    before, trained = (out / "ablation.csv").read_bytes(), []
    train = ablation_step.run_train
    monkeypatch.setattr(
        ablation_step, "run_train", lambda setup, request: (trained.append(request), train(setup, request))
    )
    assert qvw("ablate", file, "--out", out, "--num-workers", 0) == 0
    assert not trained
    assert "seed 1: finished already" in capfd.readouterr().out
    assert (out / "ablation.csv").read_bytes() == before
    changed = file.with_name("more.yaml")
    changed.write_text(file.read_text().replace("- 0\n- 1\n", "- 0\n- 1\n- 2\n"))
    assert qvw("ablate", changed, "--out", out, "--num-workers", 0, "--only", "vit") == 0
    assert [request.name for request in trained] == ["lsq-2", "plan-2"]
    other = file.with_name("other.yaml")
    other.write_text(file.read_text().replace("like: w3a3", "like: w4a4"))
    assert qvw("ablate", other, "--out", out, "--num-workers", 0) == 2
    assert "holds plan-0 trained with arm.like=w3a3, now it is w4a4" in capfd.readouterr().err
    assert qvw("ablate", file, "--out", out, "--only", "vti") == 2
    assert "no subject 'vti'" in capfd.readouterr().err


def test_the_figure_has_a_dot_a_seed(tmp_path):
    """Three networks and many arms; dots at the accuracies, a cross at the start."""
    generator = np.random.default_rng(0)
    arms = {f"arm{i}": Arm(title=f"arm with a long name {i}") for i in range(10)}
    ablation = Ablation(subjects={n: Subject(model="m", data="d") for n in ("vit", "resnet20", "swin")}, arms=arms,
                        baseline="arm0")  # fmt: skip
    results = pd.DataFrame(
        [{"subject": n, "arm": arm, "seed": seed, "top1_start": 0.3, "top1_last": generator.uniform(0.5, 0.6),
          "top1_best": 0.6, "oscillating": generator.uniform(0, 0.02), "weight_bits": 2, "activation_bits": 2,
          "images_per_second": 9} for n in ablation.subjects for arm in arms for seed in range(3)]
    )  # fmt: skip
    figure = ablation_figure(results, summarized(results, ablation))
    dots = [line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    expected = 100 * results[(results["subject"] == "vit") & (results["arm"] == "arm3")]["top1_last"]
    assert dots[3].get_xdata().tolist() == pytest.approx(expected.tolist())
    save_figure(figure, tmp_path / "ablation")
    assert (tmp_path / "ablation.svg").exists()
