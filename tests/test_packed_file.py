"""A trained network as a file: the same answers in a fresh network, and nothing but what was saved."""

import copy
import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from quant.errors import InputError
from quant.insertion import is_prepared
from quant.network import Network
from quant.packed_file import load_packed, packed_layout, save_packed
from quant.packed_layout import FORMAT, file_size
from quant.prepare import prepare_qat_, restore_float_
from quant.quantizer import LSQQuantizer
from tests.plans import uniform
from tests.test_prepared_model import NETWORKS, prepared

NAMES = {torch.float32: "F32", torch.uint8: "U8", torch.int64: "I64", torch.bool: "BOOL"}


class Tied(nn.Module):
    """A weight that is used as embedding of pixels and, as it is, in the head."""

    def __init__(self):
        super().__init__()
        self.embed, self.middle, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        """Logits (samples, 16)."""
        return self.head(self.middle(self.embed(x[:, 0]).relu()).relu().mean(1))


def fresh(name):
    """A network of the kind with other weights."""
    torch.manual_seed(7)
    return NETWORKS[name][0]()


def saved(name, path):
    """A prepared network, saved, with images for it."""
    model, images = prepared(name)
    save_packed(model, path)
    return model, images


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fresh_network_answers_as_the_one_that_was_saved(name, tmp_path):
    """To the bit, from the file alone; a second save is the same file."""
    model, images = saved(name, tmp_path / "m.safetensors")
    twin = fresh(name)
    assert load_packed(twin, tmp_path / "m.safetensors") is twin
    assert not twin.training
    with torch.no_grad():
        torch.testing.assert_close(twin(images), model(images), rtol=1e-5, atol=1e-6)
    save_packed(twin, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


def test_tied_weights_stay_tied(tmp_path):
    """One tensor, one quantizer, saved once."""
    torch.manual_seed(0)
    images = torch.randn(8, 1, 16, 16)
    model = Tied().eval()
    net = Network(model, [images])
    prepare_qat_(net, uniform(net, [images]), [images])
    save_packed(model, tmp_path / "m.safetensors")
    twin = load_packed(Tied(), tmp_path / "m.safetensors")
    assert twin.head._parameters["weight"] is twin.embed._parameters["weight"]
    with torch.no_grad():
        torch.testing.assert_close(twin(images), model(images), rtol=1e-5, atol=1e-6)
    codes = [key for key in load_file(tmp_path / "m.safetensors") if key.startswith("codes/")]
    assert sorted(codes) == ["codes/embed:weight", "codes/middle:weight"]


@pytest.mark.parametrize("name", ["conv", "vit", "torch's attention"])
def test_what_was_loaded_can_be_trained_and_restored(name, tmp_path):
    """Its scales and weights have gradients; the float network that it becomes has the values of the codes."""
    _, images = saved(name, tmp_path / "m.safetensors")
    twin = load_packed(fresh(name), tmp_path / "m.safetensors")
    twin(images).square().sum().backward()
    scales = [q.scale for q in twin.modules() if isinstance(q, LSQQuantizer)]
    assert scales
    assert all(scale.grad is not None for scale in scales)
    restore_float_(twin)
    assert not is_prepared(twin)
    assert {type(m) for m in twin.modules()} == {type(m) for m in fresh(name).modules()}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_size_of_the_file_is_known_from_shapes(name, tmp_path):
    """`file_size` of names, types and shapes, and the layout's text, is what the file takes, to the byte."""
    path = tmp_path / "m.safetensors"
    model, _ = saved(name, path)
    tensors = [(key, NAMES[x.dtype], tuple(x.shape)) for key, x in load_file(path).items()]
    assert file_size(tensors, {FORMAT: packed_layout(model).text()}) == path.stat().st_size


def test_a_model_in_floating_point_is_not_saved(tmp_path):
    """And a prepared one is not loaded into."""
    with pytest.raises(InputError):
        save_packed(nn.Linear(2, 2), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())
    model, _ = saved("conv", tmp_path / "m.safetensors")
    with pytest.raises(InputError):
        load_packed(model, tmp_path / "m.safetensors")


def changed_value(path):
    """The same file with other scales."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    key = next(key for key in tensors if key.startswith("scale/"))
    tensors[key] *= 2
    save_file(tensors, path, metadata=metadata)


def changed_layout(path):
    """The same file whose first site has another bit-width."""
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()[FORMAT])
    content["sites"][0][2] = 5
    save_file(load_file(path), path, metadata={FORMAT: json.dumps(content, separators=(",", ":"))})


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "huge header": lambda path: path.write_bytes(struct.pack("<Q", 2**40) + path.read_bytes()[8:]),
    "a flipped bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "another scale": changed_value,
    "another layout": changed_layout,
    "no metadata": lambda path: save_file(load_file(path), path),
    "not even safetensors": lambda path: path.write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused_and_the_model_left_alone(damage, tmp_path):
    """InputError, whatever is wrong with it."""
    path = tmp_path / "m.safetensors"
    saved("conv", path)
    damage(path)
    model = fresh("conv")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError):
        load_packed(model, path)
    assert not is_prepared(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("other", ["vit", "torch's attention"])
def test_a_file_of_another_network_is_refused(other, tmp_path):
    """The model has its classes, values and hooks afterwards, and can be prepared."""
    saved("conv", tmp_path / "m.safetensors")
    model = fresh(other).eval()
    images = NETWORKS[other][1]
    with torch.no_grad():
        before = model(images)
        with pytest.raises(InputError):
            load_packed(model, tmp_path / "m.safetensors")
        assert torch.equal(model(images), before)


def test_a_network_of_other_widths_is_refused(tmp_path):
    """Same names, other shapes."""
    saved("conv", tmp_path / "m.safetensors")
    model = fresh("conv")
    model.head = nn.Linear(8, 12)
    with pytest.raises(InputError):
        load_packed(model, tmp_path / "m.safetensors")
    assert type(model.head) is nn.Linear


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """And no half of a new one."""
    path = tmp_path / "m.safetensors"
    model, _ = saved("conv", path)
    before = path.read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("quant.packed_file.save_file", full)
    with pytest.raises(InputError):
        save_packed(model, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
