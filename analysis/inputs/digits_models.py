"""The two small networks of `qvw demo`, for grey images of 32 x 32 pixels in ten classes."""

import timm
from torch import nn


def digits_resnet() -> nn.Module:
    """A ResNet of six blocks and 16 to 64 channels, 159 thousand parameters; images (batch, 1, height, width)."""
    return timm.create_model(
        "resnet18", layers=[2, 2, 1, 1], channels=[16, 32, 48, 64], stem_width=16, num_classes=10, in_chans=1,
        zero_init_last=False,
    )  # fmt: skip


def digits_swin() -> nn.Module:
    """A Swin of 2 + 2 blocks, 48 and 96 wide, windows of 4 x 4, 302 thousand parameters; images (batch, 1, 32, 32)."""
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, patch_size=4, window_size=4, embed_dim=48, depths=[2, 2],
        num_heads=[3, 6], num_classes=10, in_chans=1, drop_path_rate=0.0, weight_init="jax",
    )  # fmt: skip
