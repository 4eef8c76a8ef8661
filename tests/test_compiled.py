"""Fake quantization through torch.compile: the same results, few graphs for any plan, and a plain error without."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode

from quant.choices import ALLOWED_BIT_WIDTHS
from quant.errors import InputError
from quant.functional import check_compiler, fake_quantize
from quant.insertion import attach_quantizers_
from quant.quantizer import LSQQuantizer
from tests.test_prepare import opened
from tests.test_sensitivity import IMAGES, model_of

MODELS = ("resnet", "vit")
SHAPES = ((1, 1, 70_000), (1, 1, 4), (1, 8, 8), (1, 64, 9), (1, 7, 1), (5, 3, 700))  # the first: of two blocks


@pytest.fixture(scope="module", autouse=True)
def _compiler():
    """Skips where there is no compiler to test with."""
    try:
        check_compiler(torch.device("cpu"))
    except InputError as error:
        pytest.skip(str(error))


class PassingMode(TorchFunctionMode):
    """Changes nothing, as attention's mode on a layer's input."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def value_and_gradients(x, scale, offset, bit_width, signed, *, compiled):
    """Detached results of one forward and backward pass, the value first."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, scale, offset)]
    out = fake_quantize(*leaves, bit_width, signed, compiled=compiled)
    out.backward(torch.randn(x.shape, generator=torch.Generator().manual_seed(7)))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def test_a_mixed_plan_gives_the_same_results_from_few_graphs():
    """Every bit-width, sign, offset and shape: value and gradient of x to the bit, scale and offset to float32's last.

    Autocast, a torch function mode and evaluation between steps compile nothing again; torch's recompile limit,
    beyond which it would run eagerly without a word, is never met.
    """
    counters.clear()
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        x = torch.randn(shape, generator=generator)
        for bit_width in ALLOWED_BIT_WIDTHS:
            for signed, offset in ((True, None), (False, None), (False, torch.randn(shape[1], generator=generator))):
                scale = (torch.rand(shape[1], generator=generator) + 0.5) * 2.0 ** (2 - bit_width)
                x[0, :, 0] = scale * (2 ** (bit_width - 1) - 1)  # the upper bound of signed codes, where exact
                arguments = (x, scale, offset, bit_width, signed)
                plain = value_and_gradients(*arguments, compiled=False)
                with torch.autocast("cpu", torch.bfloat16, enabled=bit_width == 4), PassingMode():
                    compiled = value_and_gradients(*arguments, compiled=True)
                with torch.no_grad():
                    assert torch.equal(fake_quantize(*arguments, compiled=True), plain[0])
                for ours, expected in zip(compiled[:2], plain[:2], strict=True):
                    assert torch.equal(ours, expected)
                for ours, expected in zip(compiled[2:], plain[2:], strict=True):
                    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert (
        counters["stats"]["unique_graphs"] <= 12
    )  # value and gradients, one signed bit and other; three forms of rows
    assert not counters["recompile_limit"]
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", MODELS)
def test_training_with_and_without_it_is_the_same(name):
    """Three steps at 3 bits, attention too: the same weights, but for last bits, under the same keys; copies work."""
    results = {}
    for compiled in (False, True):
        model = model_of(name)
        net, quantizers = opened(model, bits=3)
        attach_quantizers_(net, quantizers, compiled=compiled)
        learned = [module for module in model.modules() if isinstance(module, LSQQuantizer)]
        assert {quantizer.compiled for quantizer in learned} == {compiled}
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(IMAGES).square().mean().backward()
            optimizer.step()
        twin = copy.deepcopy(model)
        with torch.no_grad():
            assert torch.equal(twin(IMAGES), model(IMAGES))
        results[compiled] = model.state_dict()
    assert list(results[True]) == list(results[False])
    for key, value in results[False].items():
        torch.testing.assert_close(results[True][key], value, rtol=1e-5, atol=1e-7, msg=key)


def test_without_a_compiler_it_says_so(tmp_path):
    """Asked for where it cannot work, it is refused before the training, with the way on."""
    code = "import torch; from quant.functional import check_compiler; check_compiler(torch.device('cpu'))"
    environment = os.environ | {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "InputError: torch.compile does not work here" in done.stderr
