"""Laws of loading a model: the same source gives the same weights, and wrong sources are told in one message."""

import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from analysis.inputs.model_options import TEACHER_OPTIONS
from analysis.inputs.model_source import ModelSource
from analysis.inputs.timm_names import model_names
from analysis.inputs.weights import weights_sha256
from analysis.models import load_model
from analysis.tasks import classes_of
from quant.errors import InputError
from quant.sites import classifier_names

FACTORIES = """
from dataclasses import dataclass

from torch import nn

from neighbour import WIDTH


@dataclass
class Config:
    width: int = WIDTH


class Net(nn.Sequential):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(nn.Linear(width, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))


def small(width: int = 2):
    return Net(Config(width).width)


def broken():
    raise ZeroDivisionError("no such depth")


def stops():
    raise SystemExit(3)


def no_module():
    return "a string"


def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))


def compiled():
    import torch

    return torch.compile(Net())


def in_place():
    model = Net()
    model.compile()
    return model


def _private():
    return Net()
"""


@pytest.fixture
def factory_file(tmp_path):
    """A user's file of factories that imports its neighbour."""
    (tmp_path / "neighbour.py").write_text("WIDTH = 2\n")
    path = tmp_path / "nets.py"
    path.write_text(FACTORIES)
    return path


def small(path, weights=None):
    """The source of the factory `small`."""
    return ModelSource(model=f"{path}:small", weights=None if weights is None else str(weights))


def saved(path, state):
    """Write a state dict in the format that the suffix says."""
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def test_a_timm_model_is_in_eval_mode_and_the_random_state_is_untouched():
    """Loading is silent, gives a model in eval mode on the CPU, and draws nothing from the global generator."""
    before = torch.get_rng_state()
    model = load_model(ModelSource(model="resnet10t", kwargs={"num_classes": 7, "in_chans": 1}))
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in model.modules())
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 7)


def test_untrained_weights_depend_on_the_seed_alone():
    """The same seed gives the same weights whatever was drawn before; another seed gives others."""
    hashes = []
    for seed in (0, 0, 1):
        torch.rand(5)
        hashes.append(weights_sha256(load_model(ModelSource(model="resnet10t", seed=seed))))
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]


def test_the_hash_sees_names_shapes_dtypes_and_bytes():
    """A change of a name, shape, dtype, bit or buffer changes the hash; an equal model in train mode does not."""

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))

    variants = [net() for _ in range(6)]
    variants[1][0].weight.data[0, 0] += 1e-6
    variants[2].half()
    variants[3][0].weight = nn.Parameter(variants[3][0].weight.data.reshape(2, 3))
    variants[4].add_module("2", nn.BatchNorm1d(1))
    variants[5][1].running_mean += 1
    hashes = [weights_sha256(variant) for variant in variants]
    assert len(set(hashes)) == len(variants)
    assert weights_sha256(net().train()) == hashes[0]
    assert weights_sha256(nn.Sequential(nn.Linear(2, 3).bfloat16())) != weights_sha256(nn.Identity())


def test_a_factory_in_a_users_file(factory_file):
    """The function of the file is called with the arguments; the file may import its neighbours."""
    model = load_model(ModelSource(model=f"{factory_file}:small", kwargs={"width": 5}))
    assert model[0].in_features == 5
    assert not model.training
    assert load_model(ModelSource(model=f"{factory_file}:Net"))[0].in_features == 2


@pytest.mark.parametrize("model", ["resnet18", "resnet18.a1_in1k"])
def test_timm_names_are_no_factories(model):
    """Only what ends in .py, or .py:function, is the user's file."""
    assert ModelSource(model=model).factory is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnett18", r"no model 'resnett18'\. The nearest: resnet18\b.*path/to/file\.py:factory"),
        ("resnet18.a1_in2k", r"no weights 'resnet18\.a1_in2k'\. The nearest: resnet18\.a1_in1k"),
        ("qqqqqqqq", r"no model 'qqqqqqqq'\. `qvw models` lists them"),
        ("gone.py:small", r"no file gone\.py"),
        ("{file}:larger", r"no function 'larger'\. It has: Config, Net, small, broken, stops, no_module, "),
        ("{file}", r"no function ''\. It has: Config, Net, small"),
        ("{file}:broken", r"nets\.py:broken raised ZeroDivisionError: no such depth\."),
        ("{file}:stops", r"nets\.py:stops raised SystemExit: 3"),
        ("{file}:lazy", r"1 of .*nets\.py:lazy has a weight without a size: a lazy layer \(LazyLinear\)"),
        ("{file}:compiled", r"nets\.py:compiled is compiled by torch\.compile: "),
        ("{file}:in_place", r"nets\.py:in_place is compiled by torch\.compile"),
        ("{file}:no_module", r"must return a torch\.nn\.Module, got str"),
    ],
)
def test_wrong_models_are_told(factory_file, model, message):
    """Each way to name a model wrongly has one message that says what there is."""
    with pytest.raises(InputError, match=message) as caught:
        load_model(ModelSource(model=model.format(file=factory_file)))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_package\ndef f(): pass", "raised ModuleNotFoundError: No module named 'no_such_package'"),
        ("def f(:", "raised SyntaxError"),
        ("raise RuntimeError\ndef f(): pass", "raised RuntimeError"),
    ],
)
def test_a_file_that_raises_is_told(tmp_path, text, message):
    """A file that cannot be executed is named with its exception, which stays chained."""
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_model(ModelSource(model=f"{path}:f"))
    assert caught.value.__cause__ is not None


def test_wrong_arguments_are_told(factory_file):
    """Arguments that the constructor does not know, or cannot use, are the user's matter."""
    with pytest.raises(InputError, match=r"resnet10t refuses `--model-kwargs`: .*unexpected keyword argument 'foo'"):
        load_model(ModelSource(model="resnet10t", kwargs={"foo": 3}))
    with pytest.raises(InputError, match=r"small refuses `--model-kwargs`: .*unexpected keyword argument 'foo'"):
        load_model(ModelSource(model=f"{factory_file}:small", kwargs={"foo": 3}))
    with pytest.raises(InputError, match=r"resnet10t cannot be built with `--model-kwargs` .*'cardinality': 2"):
        load_model(ModelSource(model="resnet10t", kwargs={"cardinality": 2}))


def test_pretrained_without_network_is_told(monkeypatch, tmp_path, capfd):
    """Weights that the hub cannot give end in one message with the way out, and nothing else on the screen."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        InputError, match=r"pretrained weights of resnet10t could not be downloaded.*`--weights FILE"
    ) as caught:
        load_model(ModelSource(model="resnet10t", pretrained=True))
    assert caught.value.__cause__ is not None
    with pytest.raises(InputError, match=r"no weights .resnet10t\.no_such_tag.\. The nearest: resnet10t"):
        load_model(ModelSource(model="resnet10t.no_such_tag", pretrained=True))
    assert capfd.readouterr() == ("", "")


def test_pretrained_goes_with_a_timm_name_alone(factory_file):
    """`--pretrained` beside a factory or a weights file is a contradiction."""
    with pytest.raises(InputError, match="`--pretrained` needs a timm name"):
        load_model(ModelSource(model=f"{factory_file}:small", pretrained=True))
    with pytest.raises(InputError, match="both given"):
        load_model(ModelSource(model="resnet10t", pretrained=True, weights="x.safetensors"))


def test_errors_of_a_teacher_name_its_own_options(factory_file, tmp_path):
    """`qvw train` loads two models: which of them is wrong shows in the option."""
    own = saved(tmp_path / "w.safetensors", load_model(small(factory_file)).state_dict())
    wrong = {
        "`--teacher-pretrained` and `--teacher-weights` were both given": {"pretrained": True, "weights": str(own)},
        "`--teacher-pretrained` needs a timm name, .* Use `--teacher-weights": {"pretrained": True},
        "refuses `--teacher-kwargs`": {"kwargs": {"foo": 3}},
        "no weights file .* Check `--teacher-weights`": {"weights": str(tmp_path / "gone.safetensors")},
        "has shape .* Check the model's name and `--teacher-kwargs`": {"kwargs": {"width": 5}, "weights": str(own)},
    }
    for message, given in wrong.items():
        with pytest.raises(InputError, match=message):
            load_model(ModelSource(model=f"{factory_file}:small", options=TEACHER_OPTIONS, **given))
    with pytest.raises(InputError, match="resnet10t cannot be built with `--teacher-kwargs`"):
        load_model(ModelSource(model="resnet10t", kwargs={"cardinality": 2}, options=TEACHER_OPTIONS))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
def test_weights_are_loaded_to_the_bit(factory_file, tmp_path, suffix, nested):
    """A saved state dict, also below `state_dict` or `model`, comes back to the bit in every format."""
    if nested is not None and suffix == ".safetensors":
        nested = None  # a flat format
    original = load_model(ModelSource(model=f"{factory_file}:small", seed=3))
    state = original.state_dict()
    path = saved(tmp_path / f"w{suffix}", state if nested is None else {nested: state, "epoch": 3})
    assert weights_sha256(load_model(small(factory_file, path))) == weights_sha256(original)
    assert weights_sha256(load_model(small(factory_file))) != weights_sha256(original)


def test_checkpoints_without_the_batch_counter_are_loaded(factory_file, tmp_path):
    """The counter of batches, which eval mode never reads, may be absent."""
    state = load_model(small(factory_file)).state_dict()
    del state["1.num_batches_tracked"]
    load_model(small(factory_file, saved(tmp_path / "w.safetensors", state)))


def without(name):
    """Drop a tensor."""
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {**s, "0.weight": torch.zeros(3, 9)}, r"'0\.weight' has shape \(3, 9\), the model expects \(3, 2\)"),
        (without("0.bias"), r"does not fit Net: 6 of 7 fit; '0\.bias' is missing \(1 missing, 0 unexpected\)"),
        (
            lambda s: {f"{key}s": value for key, value in s.items()},
            r"'0\.weight' is missing \(6 missing, 7 unexpected; the nearest is '0\.weights'\)",
        ),
        (
            lambda s: {**s, "0.weights": torch.zeros(1), "zz": torch.zeros(1)},
            r"'0\.weights' is not in the model \(2 unexpected; the nearest is '0\.weight'\)",
        ),
        (lambda s: {**s, "0.weight": torch.full((3, 2), torch.nan)}, r"'0\.weight' holds 6 NaN or infinite values"),
        (lambda s: {**s, "1.running_var": torch.tensor([1, torch.inf, 1])}, r"'1\.running_var' holds 1 NaN"),
        (
            lambda s: {**s, "0.weight": torch.ones(3, 2, dtype=torch.int8)},
            r"'0\.weight' is torch\.int8, the model expects torch\.float32",
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_that_do_not_fit_are_told(factory_file, tmp_path, suffix, change, message):
    """The first tensor that does not fit is named with what was expected."""
    state = change(load_model(small(factory_file)).state_dict())
    with pytest.raises(InputError, match=message):
        load_model(small(factory_file, saved(tmp_path / f"w{suffix}", state)))


def test_values_beyond_the_models_precision_are_told(factory_file, tmp_path):
    """A float64 value that is infinite as float32 is as useless as an infinity."""
    state = load_model(small(factory_file)).state_dict()
    state["0.weight"] = torch.full((3, 2), 1e300, dtype=torch.float64)
    with pytest.raises(InputError, match=r"'0\.weight' holds 6 NaN or infinite"):
        load_model(small(factory_file, saved(tmp_path / "w.safetensors", state)))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_weights_that_were_cut_short_are_told(factory_file, tmp_path, suffix, share):
    """A file of which only the first part arrived is told from one that does not fit."""
    path = saved(tmp_path / f"w{suffix}", load_model(small(factory_file)).state_dict())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InputError, match=r"cut short|is empty|no file of torch"):
        load_model(small(factory_file, path))


def test_other_weights_files_are_told(factory_file, tmp_path):
    """A missing file, an unknown format, a pickled object and a list are each told; no code of a file is run."""
    with pytest.raises(InputError, match=r"no weights file .*gone\.safetensors"):
        load_model(small(factory_file, tmp_path / "gone.safetensors"))
    with pytest.raises(InputError, match="without running code"):
        load_model(small(factory_file, saved(tmp_path / "module.pt", nn.Linear(1, 1))))
    with pytest.raises(InputError, match="holds a list, not a state_dict"):
        load_model(small(factory_file, saved(tmp_path / "list.pt", [1])))
    with pytest.raises(InputError, match="holds no tensors"):
        load_model(small(factory_file, saved(tmp_path / "text.pt", {"0.weight": "x"})))
    with pytest.raises(InputError, match=r"'0\.weight' is a str, not a tensor"):
        load_model(small(factory_file, saved(tmp_path / "part.pt", load_model(small(factory_file)).state_dict()
                                             | {"0.weight": "x"})))  # fmt: skip


def test_model_names_match_as_substring_or_wildcard():
    """A pattern without wildcards matches anywhere in the name, one with them the whole name, none everything."""
    every = model_names()
    assert every == timm.list_models()
    assert model_names("resnet1") == [name for name in every if "resnet1" in name]
    assert model_names("resnet1*") == [name for name in every if name.startswith("resnet1")]
    assert model_names("no_such") == []


@pytest.mark.parametrize(
    ("name", "kwargs", "names"),
    [
        ("resnet10t", {}, ("fc",)),
        ("resnet10t", {"num_classes": 0}, ()),
        ("test_vit", {}, ("head",)),
        ("deit_tiny_distilled_patch16_224", {"depth": 1}, ("head", "head_dist")),
    ],
)
def test_classifier_names(name, kwargs, names):
    """The classifier's layers are those that timm names; a model without a head has none."""
    model = load_model(ModelSource(model=name, kwargs=kwargs))
    assert classifier_names(model) == names


def test_a_model_that_says_nothing_has_no_classifier():
    """Any module may be measured; what it does not say is empty."""
    assert classifier_names(nn.Sequential(nn.Linear(1, 1))) == ()


@pytest.mark.parametrize(
    ("name", "classes", "head"),
    [
        ("cifar10_resnet20", 10, "fc"),
        ("cifar10_vit_d128_l4", 10, "head"),
        ("cifar10_swin_e48", 10, "head.fc"),
        ("imagenet_mobilenetv1_025", 1000, "classifier"),
    ],
)
def test_trained_models_of_a_users_file(shared, name, classes, head):
    """Factories built on timm's classes load their trained weights and tell classes and classifier."""
    weights = str(shared / "weights" / f"{name}.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_model(ModelSource(model=f"{shared / 'models.py'}:{name}", weights=weights))
    assert classifier_names(model) == (head,)
    side = 32 if name.startswith("cifar10") else 224
    assert classes_of(model(torch.zeros(1, 3, side, side))) == classes
    other = "cifar10_resnet32" if name != "cifar10_resnet32" else "cifar10_resnet20"
    with pytest.raises(InputError, match=r"does not fit|has shape"):
        load_model(ModelSource(model=f"{shared / 'models.py'}:{other}", weights=weights))
