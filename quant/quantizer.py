"""Quantizers: a scheme with its scale and offset, fixed by calibration or learned in training."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.choices import GradientScale
from quant.functional import fake_quantize, is_traced, quantize, scale_gradient, to_groups
from quant.scheme import QuantScheme

MIN_SCALE_RATIO = 1e-3
"""A learned scale stays above this share of its start: at 0 every code would be lost, and no gradient leads back."""


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """Fake-quantizes a tensor with fixed scales.

    `scale` and `offset` have one float32 value a group; `axis` and `groups` are those of
    `quant.functional.to_groups`. `degenerate` counts groups whose scale was borrowed from the others.
    """

    scheme: QuantScheme
    scale: Tensor
    offset: Tensor | None
    axis: int
    groups: int
    degenerate: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """`x` on the grid, in its own shape and type; the arithmetic is float32."""
        grouped = to_groups(x, self.axis, self.groups).float()
        scheme = self.scheme
        return fake_quantize(grouped, self.scale, self.offset, scheme.bit_width, scheme.signed).reshape(x.shape).to(x)


class ScaleWatch:
    """What the quantizers of one model share, beside their parameters: who keeps their scales within bounds.

    `attached` counts what clamps scales after each step, such as `attach_`; where there is none, a scale that left its
    bounds is warned about once. `tracker` counts oscillations (an `OscillationTracker`) and `step` the optimizer steps
    that it has seen. A copy of the model has a watch of its own, with the counts so far and nothing attached.
    """

    def __init__(self) -> None:
        self.attached, self.warned = 0, False
        self.tracker: Any = None
        self.step = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"tracker": self.tracker, "step": self.step}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.attached, self.warned = 0, False
        self.tracker, self.step = state["tracker"], state["step"]


class LSQQuantizer(nn.Module):
    """Learned step size quantization (Esser et al., ICLR 2020, arXiv:1902.08153), with LSQ+'s offset where planned.

    `scale` is the paper's step size s, `offset` LSQ+'s beta (Bhalgat et al., CVPRW 2020, arXiv:2004.09576); both have
    one float32 value a group, start at those of a calibrated quantizer, and have their gradient multiplied by
    1 / sqrt(N Q_P), or with `gradient_scale="module"`, for weights, by 1 / sqrt(Q_P ||x||_1) of the group's values as
    they are at each step (Huang et al., TMLR 2024, arXiv:2307.00331; 0 where they are all 0). `elements_per_scale` is
    the paper's N, how many elements share one scale, of one image. `compiled` may be changed at any time: it is that
    of `quant.functional.fake_quantize`. `watch` is shared by the quantizers of a model.
    """

    watch: Any  # ScaleWatch; to a type checker nn.Module's attributes are tensors and modules

    def __init__(
        self,
        start: Quantizer,
        *,
        elements_per_scale: int,
        gradient_scale: GradientScale = "lsq",
        compiled: bool = False,
        watch: ScaleWatch | None = None,
    ) -> None:
        super().__init__()
        if not (torch.isfinite(start.scale) & (start.scale > 0)).all():
            raise ValueError(f"A scale must start finite and above 0, got a minimum of {start.scale.min().item():g}.")
        if elements_per_scale < 1:
            raise ValueError(f"`elements_per_scale` must be at least 1, got {elements_per_scale}.")
        self.scheme, self.axis, self.groups = start.scheme, start.axis, start.groups
        self.scale = nn.Parameter(start.scale.detach().float().clone())
        self.offset = None if start.offset is None else nn.Parameter(start.offset.detach().float().clone())
        self.register_buffer("min_scale", MIN_SCALE_RATIO * self.scale.detach())
        self.elements_per_scale, self.gradient_scale, self.compiled = elements_per_scale, gradient_scale, compiled
        self.watch = watch or ScaleWatch()

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid, in its own shape and type; the arithmetic is float32, under autocast too."""
        grouped, scheme = to_groups(x, self.axis, self.groups).float(), self.scheme
        learning = torch.is_grad_enabled()
        if learning and self.training and not is_traced() and not (self.watch.attached or self.watch.warned):
            self._warn_out_of_bounds()
        factor = self.gradient_factor(grouped.detach()) if learning else 1.0
        scale = scale_gradient(self.scale, factor)
        offset = None if self.offset is None else scale_gradient(self.offset, factor)
        quantized = fake_quantize(grouped, scale, offset, scheme.bit_width, scheme.signed, compiled=self.compiled)
        return quantized.reshape(x.shape).to(x.dtype)

    def gradient_factor(self, grouped: Tensor) -> float | Tensor:
        """What the gradients of scale and offset are multiplied by, for values in canonical form; a tensor by group."""
        if self.gradient_scale == "lsq":
            return (self.elements_per_scale * self.scheme.quant_max) ** -0.5
        norm = torch.linalg.vector_norm(grouped, ord=1, dim=(0, 2))
        return torch.where(norm > 0, (self.scheme.quant_max * norm).rsqrt(), 0.0)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The integer codes of `x`, in canonical form (outer, groups, inner), as float32."""
        grouped = to_groups(x, self.axis, self.groups).float()
        return quantize(grouped, self.scale, self.offset, self.scheme.bit_width, self.scheme.signed)

    @property
    def initial_scale(self) -> float:
        """The mean scale that training started from."""
        return self.get_buffer("min_scale").mean().item() / MIN_SCALE_RATIO

    @torch.no_grad()
    def clamp_scale_(self) -> None:
        """Hold the scale above `MIN_SCALE_RATIO` of its start; the training loop calls it after each optimizer step."""
        self.scale.copy_(torch.maximum(self.scale, self.get_buffer("min_scale")))

    def _warn_out_of_bounds(self) -> None:
        """Tell a training loop, once, that its steps have moved a scale below its bound."""
        if (self.scale.detach() < self.get_buffer("min_scale")).any():
            self.watch.warned = True
            warnings.warn(
                f"A scale was moved below its bound, {MIN_SCALE_RATIO:g} of its start, where codes are lost. Call "
                "quant.attach_(optimizer, model) once before training: it keeps scales within bounds after each step. "
                "If it was called, lower scale_learning_rate of quant.parameter_groups.",
                UserWarning,
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        """The scheme, as print(model) shows it."""
        sign = "signed" if self.scheme.signed else "unsigned"
        plus = " with offset" if self.scheme.offset else ""
        return f"{self.scheme.bit_width} bit {sign}{plus}, {self.scheme.granularity}: {self.groups} scales"
