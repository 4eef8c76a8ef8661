"""The MACs of cost.parquet, against torch's own count of floating-point operations."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from analysis.cost import cost_table
from analysis.planning import accounting
from quant.sites import find_sites


@pytest.mark.parametrize(
    "name", ["resnet18", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mobilenetv2_100"]
)
def test_macs_are_half_of_torchs_flops(name):
    """Each product of two sites counted once, a MAC is two of torch's FLOPs: exactly, as no operator is left out.

    torch counts convolutions, linears and the two products of attention (fused or not), without biases; norms,
    activations, softmax and pooling are counted by neither.
    """
    model = timm.create_model(name).eval()
    image = torch.zeros(1, 3, 224, 224)
    _, sites = find_sites(model, image)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    assert 2 * accounting.edges(cost_table(sites))["macs"].sum() == counter.get_total_flops() > 0
