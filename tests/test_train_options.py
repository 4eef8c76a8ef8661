"""The configuration of a training: files and settings, and what is refused."""

from dataclasses import asdict

import pytest
import yaml

from analysis.training.ablation_config import read_ablation
from analysis.training.training_options import read_config
from quant.config import QATConfig
from quant.errors import InputError

ALIASES = "a0: &a0 [x, x]\n" + "\n".join(f"a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]" for i in range(1, 9))
"""Eight lines that stand for 10^8 values."""


def test_settings_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    """Three sources in this order; numbers such as 5e-4, which YAML takes for text, are understood."""
    path = tmp_path / "qat.yaml"
    path.write_text("epochs: 3\nlearning_rate: 1e-3\nobr_weight: 0.5\n")
    config = read_config(path, ["learning_rate=5e-4", "clip_grad_norm=null", "precision=bf16", "precision=fp32"])
    assert config == QATConfig(epochs=3, learning_rate=5e-4, obr_weight=0.5)


def test_what_was_written_is_read_again(tmp_path):
    """A configuration saved by a training is a configuration file."""
    config = QATConfig(steps=7, kd_temperature=2.0, horizontal_flip=0.0)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(asdict(config)))
    assert read_config(path, []) == config


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("kd_temperature=0", r"kd_temperature=0: should be greater than 0"),
        ("kd_temperature=-1", r"kd_temperature=-1: should be greater than 0"),
        ("obr_weight=-0.1", r"obr_weight=-0.1: should be greater than or equal to 0"),
        ("task_weight=-1", r"task_weight=-1: should be greater than or equal to 0"),
        ("kd_weight=-1", r"kd_weight=-1: should be greater than or equal to 0"),
        ("dampening_weight=-1", r"dampening_weight=-1: should be greater than or equal to 0"),
        ("kurtosis_weight=-1", r"kurtosis_weight=-1: should be greater than or equal to 0"),
        ("kd_weight=nan", r"kd_weight=nan: should be .*number"),
        ("task_weight=.inf", r"task_weight=inf: should be a finite number"),
        ("epochs=0", r"epochs=0: should be greater than or equal to 1"),
        ("epochs=2.5", r"epochs=2.5: should be a valid integer"),
        ("batch_size=many", r"batch_size=many: should be a valid integer"),
        ("schedule=cos", r"schedule=cos: should be 'cosine', 'linear' or 'constant'"),
        ("learning-rate=1", r"'learning-rate' is no setting of a training; the nearest is learning_rate"),
        ("lambda=1", r"'lambda' is no setting"),
        ("learning_rate", r"'learning_rate' is not understood; write key=value"),
        ("=3", r"'=3' is not understood"),
        ("seed=[1", r"the value is not readable"),
        ("seed=2026-13-45", r"the value is not readable"),
        ("steps=!!int x", r"the value is not readable"),
        ("epochs=" + "[" * 3000, r"the value is not readable"),
        ("steps=" + "9" * 5000, r"the value is not readable"),
        ("epochs={a: [1, 2]}", r"epochs=a dict: should be a valid integer"),
        ("steps=1000000000000", r"steps=1000000000000: should be less than or equal to 1000000000"),
        ("steps=0x" + "f" * 5000, r"steps=a number of more than 20 digits: should be less"),  # Python cannot print it
        ("steps={" + ALIASES.replace("\n", ", ") + "}", r"value is not readable: it stands for more than 20,000"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(setting, message):
    """What came, what was expected, and how to change it."""
    with pytest.raises(InputError, match=message):
        read_config(None, [setting])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "holds a list"),
        ("epochs: 3\na: [", "qat.yaml, line 2 cannot be read as YAML: expected the node content"),
        ("seed: 1\nlr: 1", "qat.yaml, line 2: 'lr' is no setting"),
        ("seed: 1\n\nepochs: 0", "qat.yaml, line 3: epochs=0: should be greater"),
    ],
)
def test_a_wrong_file_is_named(text, message, tmp_path):
    """A file that is no mapping, no YAML, or has an unknown key."""
    path = tmp_path / "qat.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_config(path, [])
    with pytest.raises(InputError, match="cannot be read"):
        read_config(tmp_path / "absent.yaml", [])


@pytest.mark.parametrize(
    "text",
    [
        ALIASES,
        "settings: &a [*a]",
        "settings: &a {b: *a}",
        "a0: &a0 {x: 1}\n" + "\n".join(f"a{i}: &a{i} {{<<: [{', '.join(9 * [f'*a{i - 1}'])}]}}" for i in range(1, 9)),
        "a: [" + "1," * 24_000 + "]",
    ],
    ids=["aliases", "a list in itself", "a mapping in itself", "merges", "a long list"],
)  # fmt: skip
def test_a_file_that_stands_for_more_than_it_says_is_refused_at_once(text, tmp_path):
    """Aliases of aliases take gigabytes to write out; a training and an ablation refuse them in one line."""
    path = tmp_path / "qat.yaml"
    path.write_text(text)
    for read in (lambda: read_config(path, []), lambda: read_ablation(path)):
        with pytest.raises(InputError, match=r"qat.yaml cannot be read as YAML: it stands for more than 20,000 val"):
            read()


def test_a_file_that_is_no_file_of_settings_is_not_read_to_its_end(tmp_path):
    """A wrong path, such as that of the weights, must not fill the memory: no settings take 256 KiB."""
    path = tmp_path / "weights.safetensors"
    with path.open("wb") as file:
        file.truncate(2**40)  # a hole: it takes no room on the disk
    for read in (lambda: read_config(path, []), lambda: read_ablation(path)):
        with pytest.raises(InputError, match=r"weights.safetensors cannot be read.*: it is larger than 256 KiB"):
            read()


def test_aliases_are_what_they_stand_for(tmp_path):
    """Anchors, aliases and merges serve as YAML has them, and errors in them have their line."""
    path = tmp_path / "qat.yaml"
    path.write_text("seed: &n 3\nsteps: *n\n<<: {epochs: 2}\n")
    config = read_config(path, [])
    assert (config.seed, config.steps, config.epochs) == (3, 3, 2)
    path.write_text("log_every: &n 0\nsteps: 3\n")
    with pytest.raises(InputError, match=r"qat\.yaml, line 1: log_every=0"):
        read_config(path, [])
