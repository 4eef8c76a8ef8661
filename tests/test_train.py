"""The training loop: it learns, resumes where it stopped to the same bits, and stops before it spoils anything."""

import copy
import hashlib
import json
import math
import re
import resource
import shutil
import time

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from accelerate import Accelerator
from torch import nn

from analysis.training.training_rows import TrainingRows
from quant.batchnorm import reestimate_batchnorm_
from quant.checkpoints import last_step, save_checkpoint
from quant.config import QATConfig
from quant.errors import InputError
from quant.insertion import attach_quantizers_, latent_weights
from quant.optimizer import make_optimizer
from quant.oscillation import OscillationTracker
from quant.quantizer import LSQQuantizer
from quant.train import DivergedError, StepReport, logged_steps, total_steps, train_images
from tests.test_prepare import opened
from tests.test_sensitivity import model_of

GENERATOR = torch.Generator().manual_seed(7)
LABELS = torch.arange(64) % 4
IMAGES = torch.randn(4, 3, 32, 32, generator=GENERATOR)[LABELS] + 0.7 * torch.randn(64, 3, 32, 32, generator=GENERATOR)


def load(sampler):
    """The batches of a sampler, from memory."""
    for keys in sampler:
        chosen = [index for _, index in keys]
        yield IMAGES[chosen], LABELS[chosen]


def validate(model):
    """Loss and top-1 on all images."""
    with torch.no_grad():
        logits = model.eval()(IMAGES)
    return {"loss": nn.functional.cross_entropy(logits, LABELS).item(),
            "top1": (logits.argmax(dim=1) == LABELS).float().mean().item()}  # fmt: skip


def dropping_vit():
    """A small ViT with dropout and stochastic depth, whose masks are drawn at every step."""
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=10,
        proj_drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.2,
    ).eval()  # fmt: skip


def learning_resnet():
    """A small ResNet as it is before training, its BatchNorm statistics those of the images."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 16, 16, 16), stem_width=8, num_classes=10,
                              zero_init_last=False)  # fmt: skip
    with torch.no_grad():
        for _ in range(20):
            model.train()(IMAGES)
    return model.eval()


def prepared(model, bits=3):
    """The model with every site quantized, and its floating-point teacher."""
    teacher = copy.deepcopy(model)
    net, quantizers = opened(model, bits=bits, images=IMAGES[:16])
    attach_quantizers_(net, quantizers)
    return model, teacher


def reports(model, teacher, config, folder):
    """The generator of a training into `folder`."""
    return train_images(
        model, teacher, config=config, images=len(IMAGES), load=load, validate=validate,
        accelerator=Accelerator(cpu=True), checkpoints=folder,
        calibration=[IMAGES],
    )  # fmt: skip


def rows_of(done):
    """History and oscillation rows of reports, times aside."""
    history = [{k: v for k, v in row.items() if k != "seconds"} for report in done for row in report.history]
    return history, [row for report in done for row in report.oscillation]


def test_training_recovers_what_two_bits_destroyed(tmp_path):
    """From near chance the 2-bit network comes close to its labels; the teacher and its hooks are untouched."""
    model, teacher = prepared(learning_resnet(), bits=2)
    before = copy.deepcopy(teacher.state_dict())
    config = QATConfig(epochs=16, batch_size=16, learning_rate=3e-3, scale_learning_rate=1e-3, kd_weight=0)
    history, _ = rows_of(list(reports(model, teacher, config, tmp_path)))
    val = [row["top1"] for row in history if row["split"] == "val"]
    assert val[0] < 0.5
    assert val[-1] > 0.9
    assert len(val) == 17  # the start, and every epoch
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not model.training
    for weight, quantizer in latent_weights(model).values():
        assert len(quantizer(weight).unique()) <= 2**2 * quantizer.groups


def test_a_step_in_parts_is_the_step(tmp_path):
    """Without BatchNorm and dropout four parts one after another give the weights and rows of the whole batch."""
    ended = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model, teacher = prepared(timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=10
        ).eval())  # fmt: skip
        config = QATConfig(steps=6, batch_size=16, accumulate=parts, log_every=1, obr_weight=0.01, ramp_start=0,
                           optimizer="sgd", learning_rate=0.05)  # fmt: skip
        history, _ = rows_of(list(reports(model, teacher, config, tmp_path / str(parts))))
        ended.append((model.state_dict(), pd.DataFrame(history)[["loss", "task", "kd", "obr_distance", "top1"]]))
    (whole, rows), (in_parts, their_rows) = ended
    for key, value in whole.items():
        torch.testing.assert_close(in_parts[key], value, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(their_rows, rows, rtol=1e-4, atol=1e-5)


def test_parts_that_do_not_divide_a_step_are_refused():
    """A batch of 16 has no 5 equal parts."""
    with pytest.raises(InputError, match=r"batch_size=16 .*accumulate=5: it must be a multiple of 5"):
        total_steps(QATConfig(batch_size=16, accumulate=5), 64)


def test_a_teacher_that_is_the_model_teaches_nothing(tmp_path):
    """Distilling a floating-point network from itself starts at a loss and a gradient of 0."""
    model = dropping_vit().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ == "DropPath":
            module.p = module.drop_prob = 0.0
    for block in model.blocks:
        block.attn.attn_drop.p = 0.0
    teacher = copy.deepcopy(model)
    config = QATConfig(steps=1, task_weight=0, gradient_norms_every=1, weight_decay=0)
    history, oscillation = rows_of(list(reports(model, teacher, config, tmp_path)))
    train = next(row for row in history if row["split"] == "train")
    assert train["kd"] == pytest.approx(0, abs=1e-6)
    assert train["grad_kd"] == pytest.approx(0, abs=1e-5)
    assert "task" not in train
    assert oscillation == []  # nothing is quantized


@pytest.mark.parametrize("make", [dropping_vit, lambda: model_of("resnet")], ids=["vit", "resnet"])
def test_a_stopped_training_ends_with_the_same_bits(make, tmp_path):
    """Stopped twice between checkpoints and started again, weights, scales, statistics and rows are the same."""
    config = QATConfig(epochs=3, batch_size=16, checkpoint_every=2, log_every=1, gradient_norms_every=3, obr_weight=0.1,
                       dampening_weight=0.1, kurtosis_weight=0.1, learning_rate=1e-3, oscillation_window=4)  # fmt: skip
    whole, teacher = prepared(make())
    expected = rows_of(list(reports(whole, teacher, config, tmp_path / "whole")))

    history, oscillation = [], []
    for stop in (5, 9, 99):
        model, teacher = prepared(make())
        first = last_step(tmp_path / "parts")
        history = [row for row in history if row["step"] <= first]
        oscillation = [row for row in oscillation if row["step"] <= first]
        if not first:
            history, oscillation = [], []
        for report in reports(model, teacher, config, tmp_path / "parts"):
            new = rows_of([report])
            history, oscillation = history + new[0], oscillation + new[1]
            if report.step == stop:
                break
    assert last_step(tmp_path / "parts") == 10
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in whole.state_dict().items())
    assert history == expected[0]
    assert oscillation == expected[1]


def test_terms_are_logged_by_name_and_add_up(tmp_path):
    """Every weighted term has a column, the loss is their sum, each has the norm of its own gradient."""
    model, teacher = prepared(model_of("vit"))
    config = QATConfig(epochs=2, batch_size=16, obr_weight=0.3, dampening_weight=0.2, kurtosis_weight=0.1, log_every=1,
                       gradient_norms_every=1)  # fmt: skip
    history, oscillation = rows_of(list(reports(model, teacher, config, tmp_path)))
    rows = [row for row in history if row["split"] == "train"]
    terms = ("task", "kd", "obr_distance", "obr_variance", "dampening", "kurtosis")
    for row in rows:
        assert row["loss"] == pytest.approx(sum(row[term] for term in terms), rel=1e-5)
    assert rows[0]["obr_distance"] == rows[1]["obr_distance"] == rows[1]["grad_obr_distance"] == 0  # before 25 %
    assert all(row["obr_distance"] > 0 and row["grad_obr_distance"] > 0 for row in rows[3:])
    assert all(row[f"grad_{name}"] > 0 for row in rows for name in ("task", "kd", "kurtosis"))
    weights = {(row["module"], row["tensor"]): row["weights"] for row in oscillation}
    assert weights[("blocks.0.attn.qkv", "weight.query")] == 32 * 32
    assert {row["step"] for row in oscillation} == set(range(9))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rates_rise_to_their_peak_and_fall_to_nothing(schedule, tmp_path):
    """Warm-up from 0 to the peak, then cosine or a line towards 0, which the last step has not reached, or constant."""
    model, teacher = prepared(model_of("resnet"))
    config = QATConfig(steps=20, batch_size=16, schedule=schedule, warmup=0.2, learning_rate=0.01, log_every=1)
    history, _ = rows_of(list(reports(model, teacher, config, tmp_path)))
    rates = [row["lr"] for row in history if row["split"] == "train"]
    assert rates[:3] == pytest.approx([0.0025, 0.005, 0.0075])  # steps 1 to 3 of 4
    fall = [k / 17 for k in range(17)]
    expected = {"cosine": [0.005 * (1 + math.cos(math.pi * t)) for t in fall], "linear": [0.01 * (1 - t) for t in fall],
                "constant": [0.01] * len(fall)}[schedule]  # fmt: skip
    assert rates[3:] == pytest.approx(expected)


def test_scales_have_a_rate_of_their_own_and_only_weights_decay():
    """Position embeddings, class token, tables of relative positions, biases, norms and scales do not decay."""
    for name, excepted in (("vit", {"pos_embed", "cls_token"}), ("swin", {"relative_position_bias_table"})):
        model, _ = prepared(model_of(name))
        model.patch_embed.proj.bias.requires_grad_(False)
        config = QATConfig(weight_decay=0.05, scale_learning_rate=1e-5)
        decayed, others, *scales = make_optimizer(model, config, 10)[0].param_groups
        names = {id(p): n for n, p in model.named_parameters()}
        assert decayed["weight_decay"] == 0.05
        assert {group["weight_decay"] for group in (others, *scales)} == {0}
        initial = {
            id(p): q.initial_scale for q in model.modules() if isinstance(q, LSQQuantizer) for p in q.parameters()
        }
        for group in scales:  # a share of where each scale starts, to a factor of sqrt(2)
            for p in group["params"]:
                assert 0.7 < group["lr"] / (1e-5 * initial[id(p)]) < 1.42
        assert all(names[id(p)].endswith("weight") and p.ndim > 1 for p in decayed["params"])
        assert excepted <= {names[id(p)].rpartition(".")[2] for p in others["params"]}
        counted = sum(len(group["params"]) for group in (decayed, others, *scales))
        assert counted == len(list(model.parameters())) - 1  # all but the frozen one


def test_no_scale_leaps(tmp_path):
    """At 8 bits, where scales are small, no step moves one by more than a few percent of its start."""
    model, teacher = prepared(model_of("vit"), bits=8)
    quantizers = [m for m in model.modules() if isinstance(m, LSQQuantizer)]
    before, largest = [q.scale.detach().clone() for q in quantizers], 0.0
    for _ in reports(model, teacher, QATConfig(epochs=4, batch_size=16, warmup=0), tmp_path):
        now = [q.scale.detach().clone() for q in quantizers]
        moved = max(
            ((a - b).abs().mean() / q.initial_scale).item() for a, b, q in zip(now, before, quantizers, strict=True)
        )
        largest, before = max(largest, moved), now
    assert 0.001 < largest < 0.05


def test_batchnorm_ends_with_the_statistics_of_the_calibration_images(tmp_path):
    """After the last step they are taken again, unless the configuration says no."""
    ends = {}
    for again in (True, False):
        model, teacher = prepared(learning_resnet())
        config = QATConfig(steps=4, batch_size=16, learning_rate=3e-3, reestimate_batchnorm=again)
        history, _ = rows_of(list(reports(model, teacher, config, tmp_path / str(again))))
        ends[again] = (model, history[-1]["loss"])
        reestimate_batchnorm_(model, [IMAGES])
        assert (validate(model)["loss"] == history[-1]["loss"]) == again
    assert ends[True][1] < ends[False][1]


def test_a_frozen_parameter_stays_as_it_is(tmp_path):
    """What the user has frozen is not trained, and the norms of the gradients do not stumble over it."""
    model, teacher = prepared(model_of("resnet"))
    model.fc.bias.requires_grad_(False)
    model.conv1._parameters["weight"].requires_grad_(False)
    before = model.conv1._parameters["weight"].clone()
    list(reports(model, teacher, QATConfig(steps=3, batch_size=16, gradient_norms_every=1), tmp_path))
    assert torch.equal(model.conv1._parameters["weight"], before)


def test_bin_regularization_draws_the_weights_to_the_grid(tmp_path):
    """With the term the weights end nearer to their codes' values than without it."""
    distances = {}
    for weight in (0.0, 10.0):
        model, teacher = prepared(model_of("vit"))
        config = QATConfig(epochs=8, batch_size=16, obr_weight=weight, learning_rate=1e-3)
        list(reports(model, teacher, config, tmp_path / str(weight)))
        with torch.no_grad():
            parts = latent_weights(model).values()
            distances[weight] = sum(((q(w) - w) / q.scale.mean()).square().mean().item() for w, q in parts)
    assert distances[10.0] < 0.8 * distances[0.0]


def test_a_diverging_training_stops_and_keeps_its_checkpoint(tmp_path):
    """It says the step and the checkpoint that is kept, and leaves finite weights in that checkpoint."""
    model, teacher = prepared(model_of("resnet"))
    done = reports(model, teacher, QATConfig(steps=4, batch_size=16, checkpoint_every=2), tmp_path)
    for report in done:
        if report.step == 3:
            break
    assert last_step(tmp_path) == 2
    config = QATConfig(steps=40, batch_size=16, learning_rate=1e12)
    model, teacher = prepared(model_of("resnet"))
    with pytest.raises(DivergedError, match=r"diverged at step \d+: .* step 2 is kept .*learning_rate"):
        list(reports(model, teacher, config, tmp_path))
    assert last_step(tmp_path) == 2


def test_a_label_loss_beyond_all_bounds_is_a_divergence(tmp_path):
    """Finite, but a thousand nats: stopped all the same."""
    model = model_of("resnet")
    with torch.no_grad():
        model.fc.weight.mul_(1e6)
    with pytest.raises(DivergedError, match=r"diverged at step 1: the term task is .*No checkpoint was written yet"):
        list(reports(model, None, QATConfig(steps=2, batch_size=16), tmp_path))


def test_a_loss_of_nan_is_a_divergence(tmp_path):
    """A network that answers with NaN is stopped before the step: no other weight is corrupt."""
    model = model_of("resnet")
    with torch.no_grad():
        model.fc.bias[3] = math.nan
    before = model.conv1.weight.detach().clone()
    with pytest.raises(DivergedError, match=r"diverged at step 1: the term task is nan\. No checkpoint was") as caught:
        list(reports(model, None, QATConfig(steps=2, batch_size=16, precision="bf16"), tmp_path))
    assert torch.equal(model.conv1.weight, before)
    # No learning rate has been at work: that one is too high would be a wrong trail.
    assert re.search(r"first step, so no .* at fault: look at the images .*precision", str(caught.value))
    assert "Lower" not in str(caught.value)


def test_a_teacher_of_nan_is_named(tmp_path):
    """The labels are answered well at the first step, the teacher is not: it is where to look."""
    model, teacher = prepared(model_of("resnet"))
    with torch.no_grad():
        teacher.fc.bias[3] = math.nan
    with pytest.raises(DivergedError, match=r"at step 1: the term kd is nan\. .* look at the teacher and `kd_temp"):
        list(reports(model, teacher, QATConfig(steps=2, batch_size=16), tmp_path))


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, "Lower `learning_rate` or `scale_learning_rate`"),
        ({"learning_rate": 1e-5}, "learning_rate=1e-05 is below its default, 0.0002, already: try .*clip_grad_norm"),
        ({"learning_rate": 1e-5, "scale_learning_rate": 0.1}, "Lower `scale_learning_rate`"),
        ({"scale_learning_rate": 1e-3}, "Lower `learning_rate`"),
    ],
)
def test_a_low_rate_is_not_to_be_lowered(settings, advice, tmp_path):
    """After the first step the rates are to blame, unless they are low already."""

    def corrupt(sampler):
        for number, (images, labels) in enumerate(load(sampler)):
            yield images * (math.nan if number == 1 else 1), labels

    model, _ = prepared(model_of("resnet"))
    done = train_images(
        model, None, config=QATConfig(steps=3, batch_size=16, **settings), images=len(IMAGES), load=corrupt,
        validate=validate, accelerator=Accelerator(cpu=True), checkpoints=tmp_path, calibration=[IMAGES],
    )  # fmt: skip
    with pytest.raises(DivergedError, match=rf"at step 2: the term task is nan\..*{advice}.*from scratch"):
        list(done)


def test_a_high_temperature_is_no_divergence(tmp_path):
    """Distillation grows with the square of the temperature: 900 times the logarithm of the classes is chance."""
    model, teacher = prepared(model_of("resnet"))
    config = QATConfig(steps=1, batch_size=16, kd_temperature=30.0, learning_rate=1e-6)
    rows = [row for report in reports(model, teacher, config, tmp_path) for row in report.history]
    assert max(row.get("kd", 0.0) for row in rows) > 1000


def test_a_regularizer_of_nan_is_a_divergence(tmp_path):
    """A term on the weights has no bound of its own: it shows in its gradient, and its weight is what to lower."""
    model, teacher = prepared(model_of("vit"))
    config = QATConfig(steps=4, batch_size=16, kurtosis_weight=1e38, learning_rate=1e-9, clip_grad_norm=1.0)
    with pytest.raises(DivergedError, match=r"at step 1: the .*term kurtosis is (inf|nan)\. .*kurtosis_weight"):
        list(reports(model, teacher, config, tmp_path))


@pytest.mark.parametrize("damage", ["cut", "missing", "no manifest", "no digests", "another step", "no seconds"])
def test_a_damaged_checkpoint_is_told_before_anything_is_loaded(damage, tmp_path):
    """A file cut short or gone, a manifest that is none: the folder is named, and where the training would resume."""
    model, teacher = prepared(model_of("resnet"))
    for report in reports(model, teacher, QATConfig(steps=6, batch_size=16, checkpoint_every=2), tmp_path):
        if report.step == 5:
            break
    newest = tmp_path / "step_00000004"
    if damage == "cut":
        path = newest / "optimizer.pt"
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "another step":
        shutil.rmtree(newest)
        shutil.copytree(tmp_path / "step_00000002", newest)
    elif damage in ("no digests", "no seconds"):
        path = newest / "manifest.json"
        changes = {"sha256": {}} if damage == "no digests" else {"seconds": math.nan}
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    else:
        (newest / ("model.safetensors" if damage == "missing" else "manifest.json")).unlink()
    with pytest.raises(InputError, match=r"step_00000004 is damaged or cut short.*Delete this folder .*from step 2"):
        last_step(tmp_path)


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (self.target, "w"))


@pytest.mark.parametrize("file", ["optimizer.pt", "random_0.pt"])
def test_loading_a_checkpoint_runs_no_code(file, tmp_path):
    """A pickle that would run code is refused, its digest notwithstanding."""
    model, teacher = prepared(model_of("resnet"))
    config = QATConfig(steps=6, batch_size=16, checkpoint_every=2)
    for report in reports(model, teacher, config, tmp_path / "run"):
        if report.step == 3:
            break
    path = tmp_path / "run" / "step_00000002"
    torch.save(Payload(str(tmp_path / "pwned")), path / file)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sha256"][file] = hashlib.sha256((path / file).read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"cannot be loaded \(Weights only load failed\): it is of another training"):
        list(reports(*prepared(model_of("resnet")), config, tmp_path / "run"))
    assert not (tmp_path / "pwned").exists()


def test_another_number_of_processes_is_refused(tmp_path):
    """Each process has images and random numbers of its own: another number is another training."""
    model, teacher = prepared(model_of("resnet"))
    config = QATConfig(steps=6, batch_size=16, checkpoint_every=2)
    for report in reports(model, teacher, config, tmp_path):
        if report.step == 3:
            break
    path = tmp_path / "step_00000002"
    shutil.copy(path / "random_0.pt", path / "random_1.pt")
    manifest = json.loads((path / "manifest.json").read_text()) | {"processes": 2}
    manifest["sha256"]["random_1.pt"] = manifest["sha256"]["random_0.pt"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="written by 2 processes, these are 1"):
        list(reports(*prepared(model_of("resnet")), config, tmp_path))


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    """Its tensors do not fit: one message, no traceback of a loader."""
    config = QATConfig(steps=6, batch_size=16, checkpoint_every=2)
    for report in reports(*prepared(model_of("resnet")), config, tmp_path):
        if report.step == 3:
            break
    with pytest.raises(InputError, match=r"step_00000002 cannot be loaded \(Error.*from scratch"):
        list(reports(*prepared(model_of("vit")), config, tmp_path))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    """Also where the optimizer's state, larger than the weights, is what has no room: told, nothing half-written."""
    model = nn.Linear(100, 100)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    state = {"model": model, "tracker": OscillationTracker({}), "optimizer": optimizer, "seconds": 1.0,
             "accelerator": Accelerator(cpu=True)}  # fmt: skip
    save_checkpoint(tmp_path, 1, **state)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))  # the weights take 40,400 bytes
    try:
        with pytest.raises(InputError, match=r"checkpoint of step 2 cannot be written .*ile too large.*Free some"):
            save_checkpoint(tmp_path, 2, **state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert last_step(tmp_path) == 1


def test_a_training_of_many_steps_costs_nothing_to_begin(tmp_path):
    """A billion steps would take minutes to go through one by one."""
    started = time.monotonic()
    TrainingRows(tmp_path).keep(0, QATConfig(), 10**9)
    assert time.monotonic() - started < 1
    assert logged_steps(QATConfig(), 10**9, 25) == [1, 10, 20]
    assert logged_steps(QATConfig(log_every=20, gradient_norms_every=30), 65, 10**9) == [1, 20, 30, 40, 60, 65]


@pytest.mark.parametrize("lost", ["history", "oscillation", "bins"])
@pytest.mark.parametrize("how", ["gone", "empty"])
def test_a_log_that_is_gone_is_told_on_resuming(lost, how, tmp_path):
    """A table of a training that resumes has the rows of all its steps; a float training has history alone."""
    config = QATConfig(steps=6, batch_size=16, log_every=1)
    for name, rows in (("low", True), ("float", False)):
        done = TrainingRows(tmp_path / name)
        done.keep(0, config, 6)
        for step in range(4):
            row = {"step": step, "split": "train" if step else "val"}
            done.append(StepReport(step, [row], [row] if rows else [], [row] if rows and step in (0, 3) else []))
        TrainingRows(tmp_path / name).keep(3, config, 6)
    path = tmp_path / "low" / f"{lost}.partial.jsonl"
    path.write_text("") if how == "empty" else path.unlink()
    with pytest.raises(InputError, match=r"lacks rows .* up to the checkpoint of step 3.*--overwrite"):
        TrainingRows(tmp_path / "low").keep(3, config, 6)


def test_batchnorm_refuses_single_images(tmp_path):
    """One image has no variance; a network without BatchNorm takes it."""
    model, teacher = prepared(model_of("resnet"))
    with pytest.raises(InputError, match=r"BatchNorm cannot be trained on one image at a time"):
        next(reports(model, teacher, QATConfig(steps=1, batch_size=1), tmp_path))
    vit, teacher = prepared(model_of("vit"))
    done = list(reports(vit, teacher, QATConfig(steps=1, batch_size=1), tmp_path))
    assert math.isfinite(done[-1].history[0]["loss"])


def test_more_images_than_there_are_is_an_error(tmp_path):
    """A batch larger than the data set is told."""
    with pytest.raises(InputError, match="batch_size=65, but there are 64 images"):
        next(reports(model_of("vit"), None, QATConfig(batch_size=65), tmp_path))


def test_bf16_keeps_scales_in_float32(tmp_path):
    """Under autocast the network learns, scales and latent weights stay float32."""
    model, teacher = prepared(model_of("vit"), bits=4)
    config = QATConfig(epochs=6, batch_size=16, precision="bf16", learning_rate=1e-3)
    history, _ = rows_of(list(reports(model, teacher, config, tmp_path)))
    val = [row["loss"] for row in history if row["split"] == "val"]
    assert val[-1] < val[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
