"""Every number that changes a quantization-aware training."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from quant.choices import Estimator, GradientScale

NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]  # above it products of two leave 64 bits


@dataclass(frozen=True, kw_only=True)
class QATConfig:
    """How a quantized network is trained; checked by pydantic where it is read, saved beside the result.

    The loss is task_weight * cross-entropy + kd_weight * distillation + the ramped regularizers; a weight of 0 leaves
    its term out. Loss terms are in nats; the regularizers are sums over weights.

    obr_weight is the paper's lambda at the end of its ramp, times the sum over all weights of at most 4 bits of squared
    distances to the grid, and over all bins of variances, as in the paper's formula. The pull on one weight, mostly
    2 lambda (w - w_q), is then the same in every network, while the value grows with the number of weights: how strong
    the term is, its gradient tells (`grad_obr_distance` beside `grad_task` in history.parquet). The authors' code takes
    the mean over each tensor in place of the sum, at 0.01: a pull that is thousands of times weaker.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    epochs: Count = 1  # each of as many crops as there are images, whatever crops_per_image
    steps: Count | None = None  # optimizer steps in all; given, it takes the place of epochs
    batch_size: Count = 64  # images of one optimizer step, over all processes; crops, where an image gives several
    accumulate: Count = 1  # parts of a step that go through the network one after another, to save memory
    crops_per_image: Count = 1  # views of an image in one step (Shen and Xing, ECCV 2022, arXiv:2112.01528)
    optimizer: str = "adamw"  # timm's name
    learning_rate: Positive = 2e-4  # peak; for 4 bits and more, where 1e-3 undoes what was learned; 2 bits want 1e-3
    scale_learning_rate: Positive = 1e-2  # peak, of scales and offsets, as a share of the scale that each starts at
    gradient_scale: GradientScale = "lsq"  # of weights' scales, 1/sqrt(N Q_P); module: 1/sqrt(Q_P ||w||_1), TMLR 2024
    weight_decay: NotNegative = 1e-4  # of weights; biases, norms and scales have none
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warm-up; the first two go down to 0
    warmup: Share = 0.05  # share of the steps in which the rates rise from 0
    clip_grad_norm: Positive | None = None
    task_weight: NotNegative = 1.0  # cross-entropy with the labels
    kd_weight: NotNegative = 1.0  # distillation from the teacher or its stored labels (arXiv:1503.02531, 2112.01528)
    kd_temperature: Positive = 1.0
    obr_weight: NotNegative = 1e-3  # oscillation-aware bin regularization (Huang et al., TMLR 2024, arXiv:2307.00331)
    dampening_weight: NotNegative = 0.0  # Nagel et al., ICML 2022, arXiv:2203.11086
    kurtosis_weight: NotNegative = 0.0  # Chmiel et al., NeurIPS 2020, arXiv:2002.07686; a mean over layers, not ramped
    ramp_start: Annotated[float, Field(ge=0, lt=1)] = 0.25  # share of the training before OBR and dampening set in
    crop_area: Annotated[float, Field(gt=0, le=1)] = 1.0  # smallest share of an image that a random crop keeps
    horizontal_flip: Share = 0.0  # probability; photographs: 0.5, while digits, text and signs must not be mirrored
    precision: Literal["fp32", "bf16"] = "fp32"  # autocast; scales and quantization stay in float32
    compile: bool = False  # fake quantization by torch.compile; a minute at the start, and the same but for last bits
    calibration_images: Count = 256  # set the start of the scales, and BatchNorm's statistics
    estimator: Estimator = "mse"  # of the start of the scales
    reestimate_batchnorm: bool = True  # on the calibration images, after the last step
    oscillation_window: Count = 200  # steps
    log_every: Count = 10  # steps; the first and the last are logged too
    gradient_norms_every: Count = 50  # steps; each term takes a backward pass of its own
    checkpoint_every: Count = 100  # steps
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # order of images, augmentation, dropout
