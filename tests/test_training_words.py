"""What `qvw train` says: of its extent, its outcome, and the strength of its terms."""

import numpy as np
import pandas as pd
import pytest

from analysis.terminal.console import progress
from analysis.training.training_messages import extent, outcome, strengths
from quant.config import QATConfig
from quant.loss_terms import TERMS


def history(losses, **norms):
    """Validations with these losses, and rows of two batches with gradient norms."""
    rows = [{"step": 7 * i, "split": "val", "loss": loss, "top1": 0.5 + i / 10} for i, loss in enumerate(losses)]
    rows += [
        {"step": 1 + i, "split": "train", **{f"grad_{term}": norm for term, norm in norms.items()}} for i in (0, 1)
    ]
    columns = ["step", "split", "loss", "top1", *(f"grad_{term}" for term in TERMS)]
    return pd.DataFrame(rows, columns=columns).sort_values("step")


@pytest.mark.parametrize(("after", "harm"), [(1.0, False), (1.19, False), (1.21, True), (0.5, False)])
def test_harm_is_a_loss_that_rose_beyond_two_standard_errors(after, harm):
    """A rise within the noise of the validation is no finding; the words have both ends and the errors."""
    words, worse = outcome(history([1.0, 3.0, after]), loss_se=0.1, top1_se=0.02)
    assert worse is harm
    assert "14 steps took top-1 from 50.00 to 70.00 % (± 2.00)" in words
    assert f"from 1 to {after:.4g} (± 0.1)" in words


def test_a_weak_term_is_named():
    """Norms are told as shares of the strongest; below a thousandth a term is said to do nothing."""
    told = strengths(history([1.0], task=2.0, kd=1.0, obr_variance=1e-4))
    assert told == "pull of each term: task 1, kd 0.5, obr_variance 5e-05; obr_variance hardly moved a weight"
    assert "hardly" not in strengths(history([1.0], task=2.0, kd=1.0))
    assert strengths(history([1.0], task=2.0)) == ""
    assert strengths(history([1.0], task=0.0, kd=0.0)) == ""


def test_what_an_epoch_leaves_out_is_told():
    """An epoch is whole batches; crops are counted as crops."""
    assert extent(QATConfig(batch_size=64), 7, 500, 100).endswith(
        "; 52 of 500 images are left out of each epoch, others in each"
    )
    assert "left out" not in extent(QATConfig(batch_size=50), 10, 500, 100)
    assert "7 steps of 64 crops, 4 an image" in extent(QATConfig(batch_size=64, crops_per_image=4), 7, 448, 100)


def test_progress_in_a_file_is_whole_lines(capsys):
    """Where standard error is no terminal there is a line a minute, without bars; short work leaves none."""
    with progress(240, "sensitivity", "row", quiet=False) as bar:
        bar.update(40)
        assert capsys.readouterr().err == ""
        bar.display()
        line = capsys.readouterr().err
    assert line.startswith("sensitivity: 40 of 240 rows after 00:0")
    assert line.endswith("to go\n")
    assert capsys.readouterr().err == ""
    assert np.isfinite(bar.n)
