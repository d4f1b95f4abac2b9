"""StructuralKD: L1, L2, smooth L1 or structural similarity of normalized feature maps (de Rijk 2022)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor

from ..adapters import DetectorOutputs
from ..errors import UserError
from ..keys import Above, AtLeast, Condition, OneOf
from ..losses import fitting_window, min_max_normalize, ms_ssim_loss, spatial_attention, ssim_loss
from ..losses.normalization import SCOPES
from .adaptation import Adaptation, AdaptationLayers
from .base import DISTILLER_REGISTRY, Distiller, Losses, in_float32
from .pair import Pair

L1_SHARE = 0.15  # weight of l1 in l1_ms_ssim
ODD = Condition("odd and positive", lambda size: size > 0 and size % 2 == 1)


def _pointwise(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return loss(student, teacher)
    return (weight * loss(student, teacher, reduction="none")).mean()


def _ssim(config: StructuralKD.Config, student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
    window = fitting_window(student, config.window_size)
    return ssim_loss(student, teacher, window, exponents=config.ssim_exponents, weight=weight)


def _ms_ssim(config: StructuralKD.Config, student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
    return ms_ssim_loss(student, teacher, fitting_window(student, config.ms_ssim_window_size), weight=weight)


def _l1_ms_ssim(config: StructuralKD.Config, *maps: Tensor | None) -> Tensor:
    return L1_SHARE * _pointwise(F.l1_loss, *maps) + (1 - L1_SHARE) * _ms_ssim(config, *maps)


MAP_LOSSES: dict[str, Callable[..., Tensor]] = {
    "l1": lambda config, *maps: _pointwise(F.l1_loss, *maps),
    "l2": lambda config, *maps: _pointwise(F.mse_loss, *maps),
    "smooth_l1": lambda config, *maps: _pointwise(partial(F.smooth_l1_loss, beta=config.smooth_l1_beta), *maps),
    "ssim": _ssim,
    "ms_ssim": _ms_ssim,
    "l1_ms_ssim": _l1_ms_ssim,
}
"""By value of LOSS: (config, normalized student, teacher (B, C, H, W), position weights or None) -> mean loss."""


@DISTILLER_REGISTRY.register()
class StructuralKD(Distiller):
    """Structural distillation of the neck outputs (de Rijk 2022, equations 1 and 5).

    L = WEIGHT * sum over levels of 1/N * sum over (h, w, c) of l( nu(phi(F_S)), nu(F_T) )
    """

    needs = frozenset({"features"})
    loss_names = ("loss_structural",)
    CONFIG_NODE = "STRUCTURAL"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        weight: Annotated[
            float | None, AtLeast(0), "Loss weight (lambda); None means 4 for one-stage students and 2 for others."
        ] = None
        loss: Annotated[
            str,
            OneOf(*MAP_LOSSES),
            "Loss between two normalized maps (l); 'l1_ms_ssim' is 0.15 * l1 + 0.85 * ms_ssim.",
        ] = "ssim"
        window_size: Annotated[int, ODD, "Window size of ssim in cells; at most 2 * min(H, W) - 1 on small maps."] = 11
        ms_ssim_window_size: Annotated[
            int, ODD, "Window size of ms_ssim in cells; at most 2 * min(H, W) - 1 on small maps."
        ] = 33
        ssim_exponents: Annotated[
            tuple[float, float, float],
            AtLeast(0),
            "Exponents of luminance, contrast and structure in 'ssim'; 0 disables a component.",
        ] = (1.0, 1.0, 1.0)
        smooth_l1_beta: Annotated[float, Above(0), "Difference at which smooth L1 becomes linear."] = 0.1
        normalization: Annotated[
            str,
            OneOf(*SCOPES),
            "What is normalized to [0, 1] together: each sample, each channel of a sample, teacher and student jointly, or none.",
        ] = "sample"
        adaptation: Adaptation = "none"
        spatial_attention: Annotated[
            bool, "Whether positions are weighted by the attention of teacher and student (Zhang and Ma 2021)."
        ] = False
        attention_temperature: Annotated[
            float | None,
            Above(0),
            "Temperature of the attention softmax; None means 0.5 for one-stage students and 0.1 for others.",
        ] = None

        def check(self, name: str) -> None:
            exponents = self.ssim_exponents
            if not any(exponents):
                raise UserError(f"{name}.SSIM_EXPONENTS is {exponents!r}: at least one exponent must be above 0.")
            if self.loss != "ssim" and exponents != (1, 1, 1):
                raise UserError(
                    f"{name}.SSIM_EXPONENTS is {exponents!r}, which only LOSS 'ssim' uses; LOSS is {self.loss!r}."
                )

    def __init__(self, config: Config, pair: Pair):
        is_one_stage = pair.student.family == "one-stage"
        super().__init__(config, pair, default_weight=4.0 if is_one_stage else 2.0)
        self.adaptation = AdaptationLayers.build(config.adaptation, pair, self.CONFIG_NODE)
        published = 0.5 if is_one_stage else 0.1
        temperature = published if config.attention_temperature is None else config.attention_temperature
        self.attention_temperature = temperature if config.spatial_attention else None

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        losses = [self.level_loss(s, t) for s, t in self.adaptation.pairs(student, teacher)]
        return {"loss_structural": sum(losses)}

    @torch.enable_grad()
    def loss_maps(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[int, Tensor]:
        """Compute the mean of l over channels at every position (B, H, W), by stride, without lambda."""
        maps = {}
        for stride, (s, t) in zip(self.adaptation.strides, self.adaptation.pairs(student, teacher), strict=True):
            # The loss is linear in the position weights: its gradient in a weight is that position's contribution.
            weight = s.new_ones((len(s), 1, *s.shape[-2:]), dtype=torch.float32, requires_grad=True)
            (part,) = torch.autograd.grad(self.level_loss(s.detach(), t.detach(), weight), weight)
            maps[stride] = part[:, 0] * weight.numel()
        return maps

    @in_float32
    def level_loss(self, student_BCHW: Tensor, teacher_BCHW: Tensor, weight: Tensor | None = None) -> Tensor:
        """Compute the loss of one level, without lambda; `weight` (B, 1, H, W) is that of the positions."""
        if self.attention_temperature is not None:
            attention = spatial_attention(student_BCHW, teacher_BCHW, self.attention_temperature)
            weight = attention if weight is None else weight * attention
        maps = min_max_normalize(student_BCHW, teacher_BCHW, self.config.normalization)
        return MAP_LOSSES[self.config.loss](self.config, *maps, weight)
