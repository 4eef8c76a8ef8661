"""A prepared model is still a model: it is copied, pickled, loaded, wrapped, compiled, cast, traced and exported."""

import copy
import io
import shutil
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from quant.insertion import latent_weights
from quant.network import Network
from quant.optimizer import parameter_groups
from quant.own_loop import attach_, oscillation_table
from quant.prepare import prepare_qat_, restore_float_
from quant.quantizer import LSQQuantizer
from quant.site import Site
from tests.digits_vit import KWARGS
from tests.plans import plan_of, uniform
from tests.test_trace import small

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")


class ConvNet(nn.Module):
    """Convolutions with BatchNorm, one of them grouped, and a linear."""

    def __init__(self):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        """Logits (samples, 10)."""
        x = self.norm1(self.first(x)).relu()
        return self.head(self.norm2(self.second(x)).relu().mean((2, 3)))


class Encoder(nn.Module):
    """torch's own encoder: attention by one function, and a kernel for all of it where nobody looks."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.embed, self.encoder = nn.Linear(16, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        """Logits; rows of an image are its tokens."""
        return self.head(self.encoder(self.embed(x[:, 0])).mean(1))


def vit():
    """The small ViT of the digits."""
    return timm.create_model("vit_tiny_patch16_224", **KWARGS)


IMAGES = torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 10
COLOURED = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NETWORKS = {
    "conv": (ConvNet, IMAGES, {}), "vit": (vit, IMAGES, {}), "weights only": (vit, IMAGES, {"activations": None}),
    "one part of qkv": (vit, IMAGES, {"only": "weight.value"}),
    "torch's attention": (Encoder, IMAGES, {}),
    "unused forward": (lambda: small("beit_base_patch16_224"), COLOURED, {}),
}  # fmt: skip


def prepared(name):
    """A prepared network in evaluation mode, and images for it."""
    build, images, options = NETWORKS[name]
    torch.manual_seed(0)
    model = build().eval()
    net = Network(model, [images])
    only = options.get("only")
    plan = uniform(net, [images], activations=options.get("activations", 4))
    if only:
        plan = plan_of([planned for planned in plan.sites if planned.tensor == only])
    return prepare_qat_(net, plan, [images]), images


def step_of(run, model, images):
    """Logits and every gradient of one backward pass."""
    model.zero_grad()
    logits = run(images)
    F.cross_entropy(logits.float(), LABELS[: len(images)]).backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected, rtol=1e-3):
    """Of every parameter, to a share of its norm; sums in another order differ by rounding."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= rtol * gradient.norm() + 1e-7, name


def pickled(model):
    """The model after a round through torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_copy_answers_and_learns_as_the_original_and_shares_nothing(name, duplicate):
    """Same logits, gradients and classes; a training of the copy leaves the original, and it can be undone."""
    model, images = prepared(name)
    expected, gradients = step_of(model, model, images)
    twin = duplicate(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    logits, found = step_of(twin, twin, images)
    assert torch.equal(logits, expected)
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)
    optimizer = torch.optim.Adam(parameter_groups(twin, learning_rate=0.1, scale_learning_rate=0.1))
    attach_(optimizer, twin)
    optimizer.step()
    assert not torch.equal(twin(images), expected)
    assert torch.equal(model(images), expected)
    assert oscillation_table(model)["steps"].eq(0).all()
    restore_float_(twin)
    assert not [m for m in twin.modules() if isinstance(m, LSQQuantizer)]
    assert {type(m) for m in twin.modules()} == {type(m) for m in NETWORKS[name][0]().modules()}


def test_counts_of_oscillation_survive_a_copy_and_a_pickle_but_are_no_state():
    """The tracker goes with the model, and its names are not in the state dict."""
    model, images = prepared("conv")
    keys = set(model.state_dict())
    optimizer = torch.optim.SGD(parameter_groups(model, learning_rate=0.5))
    attach_(optimizer, model)
    model.train()
    for _ in range(6):
        step_of(model, model, images)
        optimizer.step()
    table = oscillation_table(model)
    assert table["steps"].eq(6).all()
    for twin in (copy.deepcopy(model), pickled(model)):
        assert oscillation_table(twin).equals(table)
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize("name", NETWORKS)
def test_a_state_dict_goes_into_another_prepared_model(name):
    """Strictly, into one that was prepared from other weights; the answers are then the same bit for bit."""
    model, images = prepared(name)
    torch.manual_seed(1)
    other, _ = prepared(name)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    assert not torch.equal(other(images), model(images))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(images), model(images))


@pytest.mark.parametrize("name", ["conv", "vit"])
def test_parts_of_a_batch_add_up_to_its_gradient(name):
    """Gradient accumulation: the mean over two halves is the gradient of the whole."""
    model, images = prepared(name)
    _, whole = step_of(model, model, images)
    halves = []
    for half in (slice(0, 8), slice(8, 16)):
        model.zero_grad()
        F.cross_entropy(model(images[half]), LABELS[half]).backward()
        halves.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    mean = {n: (halves[0][n] + halves[1][n]) / 2 for n in whole}
    assert_same_gradients(mean, whole)


@pytest.mark.parametrize("name", ["conv", "vit", "unused forward"])
def test_autocast_to_bfloat16_changes_little(name):
    """Products are in bfloat16, codes and scales in float32: logits near those of float32, all gradients finite."""
    model, images = prepared(name)
    expected, _ = step_of(model, model, images)
    with torch.autocast("cpu", torch.bfloat16):
        logits, gradients = step_of(model, model, images)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.2 * expected.norm()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert all(q.scale.dtype == torch.float32 for q in model.modules() if isinstance(q, LSQQuantizer))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler looks at it where a graph breaks
@pytest.mark.parametrize("name", NETWORKS)
def test_a_compiled_graph_gives_the_eager_outputs_and_gradients(name):
    """As torch.compile records it, without a compiler of machine code: the same outputs to the bit."""
    model, images = prepared(name)
    expected, gradients = step_of(model, model, images)
    torch._dynamo.reset()
    logits, found = step_of(torch.compile(model, backend="aot_eager"), model, images)
    assert torch.equal(logits, expected)
    assert_same_gradients(found, gradients)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv", "vit"])
def test_machine_code_gives_the_eager_outputs_and_gradients(name):
    """torch.compile with its own backend; training mode, with attach_ on the compiled model."""
    model, images = prepared(name)
    model.train()
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model)
    expected, gradients = step_of(twin, twin, images)
    logits, found = step_of(compiled, model, images)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert_same_gradients(found, gradients, rtol=1e-2)
    optimizer = torch.optim.AdamW(parameter_groups(compiled))
    attach_(optimizer, compiled)
    optimizer.step()
    assert set(oscillation_table(compiled)["module"]) == {site.module for site in latent_weights(model)}


def onnx_graph(model, images, tmp_path, dynamo):
    """The exported model; skips without the packages."""
    pytest.importorskip("onnxscript" if dynamo else "onnx")
    onnx, path = pytest.importorskip("onnx"), tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own deprecations
        torch.onnx.export(model, (images,), path, dynamo=dynamo, **({"verbose": False} if dynamo else {}))
    return onnx.load(path), path


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_onnx_export_computes_what_the_model_does(name, dynamo, tmp_path):
    """Of images that the exporter did not see; the output depends on the input."""
    model, images = prepared(name)
    with torch.no_grad():
        expected = model(images[8:])
    loaded, path = onnx_graph(model, images[:8], tmp_path, dynamo)
    assert len(loaded.graph.input) >= 1
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images[8:].numpy()})
    assert (torch.from_numpy(logits) - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("name", NETWORKS)
def test_an_exported_program_and_a_trace_keep_the_input(name):
    """torch.export and torch.jit.trace, beneath the exporters: the answers to other images are the model's."""
    model, images = prepared(name)
    with torch.no_grad():
        expected = model(images[8:])
        program = torch.export.export(model, (images[:8],)).module()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and it warns of sizes taken for constants
            traced = torch.jit.trace(model, images[:8], check_trace=False)
        assert torch.equal(program(images[8:]), expected)
        assert torch.equal(traced(images[8:]), expected)


def test_a_functional_call_takes_other_weights():
    """As torch.func and optimizers of a second kind do: latent weights and scales come from outside."""
    model, images = prepared("vit")
    other = {name: p * 1.5 for name, p in model.named_parameters()}
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in expected.named_parameters():
            p.copy_(other[name])
    assert torch.equal(torch.func.functional_call(model, other, (images,)), expected(images))


def test_an_unused_forward_leaves_no_trace():
    """The module that used a layer's weight, and its attention, are of their own classes again, in any order."""
    model, _ = prepared("unused forward")
    attention = model.blocks[0].attn
    assert {Site("blocks.0.attn.qkv", "weight.query"), Site("blocks.0.attn.qkv", "weight.key")} <= set(
        latent_weights(model)
    )
    restore_float_(model)
    assert type(attention).__name__ == "Attention"
    assert not {name for name in vars(attention) if "quant" in name}
