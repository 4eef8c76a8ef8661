"""A small ViT on the bundled digits, and the command line, for the tests of whole commands."""

import json

import pytest

from analysis.cli import main

KWARGS = {"img_size": 16, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 24, "depth": 2,
          "num_heads": 3}  # fmt: skip
MODEL = ["vit_tiny_patch16_224", "--model-kwargs", json.dumps(KWARGS), "--input-size", "1,16,16", "--mean", "0.5",
         "--std", "0.5"]  # fmt: skip
DATA = ["--data", "digits", "--num-workers", "0"]


def qvw(*arguments):
    """Exit code of a command, as the shell would see it."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code
