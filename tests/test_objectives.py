"""What a plan keeps small: measured changes, their upper bounds, proxies, the user's own scores."""

import numpy as np
import pandas as pd
import pytest

from analysis.planning.objectives import scored
from analysis.runs import Run
from quant.errors import InputError

ROWS = pd.DataFrame(
    [
        {"module": m, "tensor": t, "bit_width": b, "divergence": 1.0 / b, "divergence_se": 0.1 / b,
         "delta_loss": 2.0 / b,
         "delta_loss_se": np.nan, "delta_top1": -0.3 / b, "top1_se": 0.01, "logit_nmse": 0.5, "kind": "conv",
         "order": 0, "granularity": "per_tensor", "estimator": "mse", "signed": True, "offset": False,
         "batchnorm": "stored"}
        for m in ("a", "b") for t in ("weight", "input") for b in (2, 4)
    ]
)  # fmt: skip


def test_a_measured_change_is_to_be_small(tmp_path):
    """KL and loss as they are, top-1 by what is lost."""
    run = Run(tmp_path)
    for objective, column, sign in (("kl", "divergence", 1), ("loss", "delta_loss", 1), ("top1", "delta_top1", -1)):
        found = scored(run, ROWS, objective, robust=False, scores=None)
        assert (found["score"] == sign * ROWS[column]).all()


def test_robust_scores_are_the_upper_end_of_the_interval(tmp_path):
    """1.645 standard errors above; what has no error is refused."""
    found = scored(Run(tmp_path), ROWS, "top1", robust=True, scores=None)
    np.testing.assert_allclose(found["score"], 0.3 / ROWS["bit_width"] + 1.6449 * 0.01)
    for objective in ("loss", "logit_nmse"):
        with pytest.raises(InputError, match="no standard error"):
            scored(Run(tmp_path), ROWS, objective, robust=True, scores=None)


def test_a_proxy_is_read_from_its_table(tmp_path):
    """Its own rows, by site and bit-width; sites without a score are left out."""
    table = ROWS[["module", "tensor", "bit_width"]].assign(
        proxy="fit", score=np.arange(8.0), granularity="per_tensor", estimator="mse", note=""
    )
    run = Run(tmp_path)
    run.write_table("proxies", pd.concat([table.iloc[1:], table.assign(proxy="noise", score=-1.0)]))
    found = scored(run, ROWS, "fit", robust=False, scores=None)
    assert found["score"].tolist() == list(np.arange(1.0, 8.0))
    with pytest.raises(InputError, match="no scores of fisher"):
        scored(run, ROWS, "fisher", robust=False, scores=None)
    with pytest.raises(InputError, match="--robust needs a standard error"):
        scored(run, ROWS, "fit", robust=True, scores=None)
    with pytest.raises(InputError, match=r"proxies\.parquet.*--proxies"):
        scored(Run(tmp_path / "empty"), ROWS, "fit", robust=False, scores=None)
    with pytest.raises(InputError, match="'speed' is unknown; choose from divergence, kl"):
        scored(run, ROWS, "speed", robust=False, scores=None)


def test_own_scores_may_be_at_any_bit_width(tmp_path):
    """A CSV file takes the place of the sweep's figures; the scheme of each site is that of the sweep."""
    path = tmp_path / "mine.csv"
    path.write_text("module,tensor,bit_width,score,remark\na,weight,3,0.5,x\na,weight,5,0.25,\nb,input,2,1e-3,\n")
    found = scored(Run(tmp_path), ROWS, "kl", robust=False, scores=path)
    assert found[["module", "tensor", "bit_width", "score"]].to_numpy().tolist() == [
        ["a", "weight", 3, 0.5], ["a", "weight", 5, 0.25], ["b", "input", 2, 0.001]
    ]  # fmt: skip
    assert (found["granularity"] == "per_tensor").all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("module,tensor,bit_width\na,weight,2\n", "has no column 'score'"),
        ("module,tensor,bit_width,score\na,weight,2,low\n", "line 2: bit_width must be a whole, score a finite"),
        ("module,tensor,bit_width,score\na,weight,2,inf\n", "line 2: bit_width must be a whole, score a finite"),
        ("module,tensor,bit_width,score\na,weight,2,1\na,weight,2,1\n", "line 3 scores a site and bit-width for"),
        ("module,tensor,bit_width,score\na,wieght,2,1\n", "no site a:wieght; the nearest is a:weight"),
        ("", "cannot be read"),
    ],
)
def test_a_wrong_table_of_scores_is_told(tmp_path, text, message):
    """One message that names the file, and the line where there is one."""
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        scored(Run(tmp_path), ROWS, "kl", robust=False, scores=path)
