"""The included training loop on a live network, for those who have none of their own."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from quant import batches
from quant.batchnorm import batchnorms
from quant.bit_plan import BitPlan
from quant.config import QATConfig
from quant.distill import distillation_loss
from quant.errors import InputError, first_line
from quant.insertion import is_prepared
from quant.network import Network
from quant.prepare import prepare_qat_
from quant.train import run_training

_LOGITS = ("logits", "out")


def train_qat(
    net: Network | nn.Module,
    plan: BitPlan | None,
    data: Iterable[Any],
    *,
    config: QATConfig | None = None,
    task: Any = None,
    teacher: nn.Module | Literal["self"] | None = "self",
    validation: Iterable[Any] | None = None,
    calibration: Iterable[Any] | None = None,
    checkpoints: str | Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Train a network with a plan, in place; yields the rows of its history as they come.

    `net` is a `Network`, or a model that is traced on the first batch; it is prepared by `prepare_qat_` unless it is
    already, with scales from `calibration` (default: the first `config.calibration_images` samples of `data`). Without
    a plan it is trained in floating point, the fair ceiling of a quantized one. `data` is an iterable of batches of any
    structure, iterated once for each of `config.epochs`, or until `config.steps`; batch sizes are those of the data
    (`config.batch_size` and augmentation settings do not apply). `task` is an `analysis.Task` with a `loss`; by default
    the output is class logits and the target a class index. `teacher` is distilled: the float network itself, another
    model, or None; with a task of your own its `divergence` takes the place of the KL. `checkpoints` is a folder from
    which an interrupted training resumes, to the same weights on the CPU.

    A row is a dictionary: step, epoch, images (samples seen), split (train or val), seconds, loss, one entry per term
    (task, kd, obr_distance, obr_variance, ...), their gradient norms (grad_task, ...), score (and top1 in
    classification), lr. The model is in evaluation mode when the last row has come. Built on `parameter_groups`, LSQ
    (Esser et al., ICLR 2020, arXiv:1902.08153), distillation (arXiv:1503.02531) and oscillation regularization (Huang
    et al., TMLR 2024, arXiv:2307.00331).

    Raises InputError for data that can be read only once, a task without loss, a model that cannot be trained, and
    where the loss diverges.

    >>> from quant.config import QATConfig
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> data = [(torch.randn(16, 3, 2, 2), torch.randint(2, (16,))) for _ in range(4)]
    >>> rows = list(train_qat(model, None, data, config=QATConfig(epochs=2)))
    >>> rows[-1]["step"], rows[-1]["split"]
    (8, 'train')
    """
    config = config or QATConfig()
    data = batches.checked_data(data)
    forward = batches.forward if task is None else task.forward
    if task is not None and task.loss is None:
        raise InputError(f"the task {task.name!r} has no `loss`: there is nothing to learn. Give it one.")
    net = net if isinstance(net, Network) else Network(net, batches.first_batch(data), forward=forward)
    model = net.model
    if not (config.task_weight or config.kd_weight):
        raise InputError("`task_weight` and `kd_weight` are both 0: nothing is learned from the data. Raise one.")
    if isinstance(teacher, str):
        if teacher != "self":
            raise InputError(f"`teacher` is {teacher!r}; expected a model, 'self' or None.")
        if is_prepared(model) and config.kd_weight:
            raise InputError("the model is prepared already: give the float model as `teacher`, or None.")
        teacher = copy.deepcopy(model).eval() if config.kd_weight else None
    scaled = _first_samples(calibration or data, config.calibration_images, net)
    if plan is not None and not is_prepared(model):
        prepare_qat_(
            net, plan, scaled, estimator=config.estimator, gradient_scale=config.gradient_scale,
            compiled=config.compile, reestimate_batchnorm=config.reestimate_batchnorm,
        )  # fmt: skip
    per_epoch = len(data) if isinstance(data, Sized) else sum(1 for _ in data)
    if not per_epoch:
        raise InputError("`data` holds no batch. Give at least one.")
    answers = _TaskAnswers(task, forward, teacher.eval() if isinstance(teacher, nn.Module) else None, config)
    loader = _Loader(net, data, config.steps or config.epochs * per_epoch)
    return _rows(net, answers, loader, config, per_epoch, validation, scaled, checkpoints)


def _rows(
    net: Network,
    answers: "_TaskAnswers",
    loader: "_Loader",
    config: QATConfig,
    per_epoch: int,
    validation: Iterable[Any] | None,
    calibration: list[Any],
    checkpoints: str | Path | None,
) -> Iterator[dict[str, Any]]:
    accelerator = Accelerator(cpu=net.device.type == "cpu", device_placement=False)

    def validate(model: nn.Module) -> dict[str, float]:
        return {} if validation is None else answers.validated(model.eval(), validation, net)

    reports = run_training(
        net.model, answers, config=config, total=loader.total, per_epoch=per_epoch, batches=loader.after,
        images_at=lambda _step: loader.seen, validate=validate, calibration=calibration, accelerator=accelerator,
        checkpoints=None if checkpoints is None else Path(checkpoints),
        forward=lambda batch: answers.forward(net.model, batch),
    )  # fmt: skip
    try:
        for report in reports:
            yield from report.history
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # the model and the task are the user's
        raise InputError(
            f"{type(net.model).__name__} cannot be trained: {type(error).__name__}: {first_line(error)}."
        ) from error


class _Loader:
    """The batches of a training: the data again and again, the same after a restart."""

    def __init__(self, net: Network, data: Iterable[Any], total: int) -> None:
        self.net, self.data, self.total = net, data, total
        self.seen = 0

    def after(self, first: int) -> Iterator[Any]:
        """The batches after step `first`; those before are read and passed over."""
        step, alone = 0, bool(batchnorms(self.net.model))
        while step < self.total:
            before = step
            for batch in self.data:
                step += 1
                count = self.net.samples(batch)
                if count < 2 and alone:
                    raise InputError("BatchNorm cannot be trained on a batch of one sample. Use drop_last=True.")
                self.seen += count
                if step > first:
                    yield batch
                if step == self.total:
                    return
            if step == before:
                raise InputError("`data` held no batch when it was iterated again.")


class _TaskAnswers:
    """Terms and figures of batches of any structure, by a task or as class logits."""

    def __init__(
        self, task: Any, forward: Callable[[nn.Module, Any], Any], teacher: nn.Module | None, config: QATConfig
    ) -> None:
        self.task, self.forward, self.teacher, self.config = task, forward, teacher, config

    def parts(self, batch: Any, count: int) -> list[Any]:
        """The batch in at most `count` parts of samples."""
        if count == 1:
            return [batch]
        samples = batches.samples(batch)
        size = -(-samples // count)
        return [batches.take(batch, start, start + size) for start in range(0, samples, size)]

    def terms(self, trained: nn.Module, part: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The task's loss and the distillation, weighted; and the score."""
        config = self.config
        output = self.forward(trained, part)
        device = next(batches.tensors(output)).device.type
        with torch.no_grad():
            of_teacher = None if self.teacher is None or not config.kd_weight else self.forward(self.teacher, part)
        with torch.autocast(device, enabled=False):
            output, of_teacher = (batches.mapped(x, _single) for x in (output, of_teacher))
            terms = {}
            if config.task_weight:
                terms["task"] = config.task_weight * self._loss(output, part)
            if of_teacher is not None:
                terms["kd"] = config.kd_weight * self._distilled(output, of_teacher)
            figures = self._figures(output, part)
        return terms, figures

    def validated(self, model: nn.Module, data: Iterable[Any], net: Network) -> dict[str, float]:
        """Loss and score over all samples, the model in evaluation mode."""
        sums: dict[str, float] = {}
        count = 0
        with torch.no_grad():
            for batch in data:
                moved = batches.to_device(batch, net.device)
                output = batches.mapped(self.forward(model, moved), _single)
                figures = {"loss": self._loss(output, moved), **self._figures(output, moved)}
                samples = net.samples(moved)
                count += samples
                for name, value in figures.items():
                    sums[name] = sums.get(name, 0.0) + float(value) * samples
        return {name: value / count for name, value in sums.items()}

    def _loss(self, output: Any, batch: Any) -> Tensor:
        if self.task is None:
            return F.cross_entropy(_logits(output), _labels(output, batch))
        values = self.task.loss(output, batch)
        known = values[~values.isnan()]
        if not len(known):
            raise InputError("a batch has no label: there is no loss. Leave unlabelled samples out.")
        return known.mean().float()

    def _distilled(self, output: Any, of_teacher: Any) -> Tensor:
        if self.task is None or self.task.name == "classification":
            return distillation_loss(output, of_teacher, temperature=self.config.kd_temperature)
        value = self.task.divergence(output, of_teacher).mean().float()
        if not value.requires_grad and torch.is_grad_enabled():
            raise InputError(
                f"the divergence of task {self.task.name!r} cannot be differentiated, so that it cannot be distilled. "
                "Train with teacher=None."
            )
        return value

    def _figures(self, output: Any, batch: Any) -> dict[str, Tensor]:
        if self.task is None:
            hits = (_logits(output).argmax(dim=1) == _labels(output, batch)).float().mean()
            return {"score": hits, "top1": hits}
        if self.task.score is None:
            return {}
        values = self.task.score(output, batch).float()
        score = values.nanmean()
        return {"score": score, "top1": score} if self.task.name == "classification" else {"score": score}


def _first_samples(data: Iterable[Any], count: int, net: Network) -> list[Any]:
    """The first batches with at least `count` samples in all, on the model's device."""
    found, seen = [], 0
    for batch in batches.checked_data(data):
        found.append(batches.to_device(batch, net.device))
        seen += net.samples(batch)
        if seen >= count:
            break
    return found


def _single(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    for key in _LOGITS:
        found = output.get(key) if hasattr(output, "get") else getattr(output, key, None)
        if isinstance(found, Tensor):
            return found
    raise InputError(f"the output is a {type(output).__name__}, not class logits. Give a `task` with a loss.")


def _labels(output: Any, batch: Any) -> Tensor:
    _, labels = batches.inputs_and_targets(batch)
    logits = _logits(output)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != logits.argmax(dim=1).shape:
        kind = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise InputError(
            f"the targets are {kind}, the output {tuple(logits.shape)}: no class index a sample. Give a `task` with a "
            "loss."
        )
    return labels
