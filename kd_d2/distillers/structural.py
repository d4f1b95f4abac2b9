"""StructuralKD: normalised feature maps compared by l1, l2, smooth l1 or structural similarity (de Rijk 2022)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor

from ..adapters import DetectorOutputs, DetectorSpec
from ..errors import UserError
from ..losses import fitting_window, min_max_normalize, ms_ssim_loss, spatial_attention, ssim_loss
from ..losses.normalization import SCOPES
from .adaptation import ADAPTATION_KERNELS, AdaptationLayers
from .base import (
    DISTILLER_REGISTRY,
    Distiller,
    check_choice,
    check_number,
    in_float32,
)

MapLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(student, teacher, weight of each position or None) -> mean loss of two normalised maps (B, C, H, W)."""

L1_SHARE = 0.15  # of l1_ms_ssim


def _pointwise(loss: Callable[..., Tensor]) -> MapLoss:
    def mean(student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return loss(student, teacher)
        return (weight * loss(student, teacher, reduction="none")).mean()

    return mean


def _ssim(node: CfgNode) -> MapLoss:
    def loss(student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
        window = fitting_window(student, node.WINDOW_SIZE)
        return ssim_loss(student, teacher, window, exponents=node.SSIM_EXPONENTS, weight=weight)

    return loss


def _ms_ssim(node: CfgNode) -> MapLoss:
    def loss(student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
        return ms_ssim_loss(student, teacher, fitting_window(student, node.MS_SSIM_WINDOW_SIZE), weight=weight)

    return loss


def _l1_ms_ssim(node: CfgNode) -> MapLoss:
    l1, ms_ssim = _pointwise(F.l1_loss), _ms_ssim(node)
    return lambda *maps: L1_SHARE * l1(*maps) + (1 - L1_SHARE) * ms_ssim(*maps)


MAP_LOSSES: dict[str, Callable[[CfgNode], MapLoss]] = {
    "l1": lambda node: _pointwise(F.l1_loss),
    "l2": lambda node: _pointwise(F.mse_loss),
    "smooth_l1": lambda node: _pointwise(partial(F.smooth_l1_loss, beta=node.SMOOTH_L1_BETA)),
    "ssim": _ssim,
    "ms_ssim": _ms_ssim,
    "l1_ms_ssim": _l1_ms_ssim,
}
"""By the name in MODEL.KD.STRUCTURAL.LOSS: from the node to a MapLoss."""


@DISTILLER_REGISTRY.register()
class StructuralKD(Distiller):
    """Structural distillation of the neck outputs (de Rijk 2022, equations 1 and 5).

    L = WEIGHT * sum over levels of 1/N * sum over (h, w, c) of l( nu(phi(F_S)), nu(F_T) )
    """

    needs = frozenset({"features"})
    loss_names = ("loss_structural",)
    CONFIG_NODE = "STRUCTURAL"

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # lambda of the paper; None: 4 for one-stage detectors, 2 for the others.
        node.WEIGHT = None
        # l: "l1", "l2", "smooth_l1", "ssim", "ms_ssim", or "l1_ms_ssim": 0.15 of l1 and 0.85 of ms_ssim.
        node.LOSS = "ssim"
        # Side of the windows of ssim and of ms_ssim in cells, odd; smaller maps take min(this, 2 * min(H, W) - 1).
        node.WINDOW_SIZE = 11
        node.MS_SSIM_WINDOW_SIZE = 33
        # Of luminance, contrast and structure in "ssim"; 0 leaves one out.
        node.SSIM_EXPONENTS = (1.0, 1.0, 1.0)
        # Where smooth l1 turns from square to line.
        node.SMOOTH_L1_BETA = 0.1
        # Range that nu maps to [0, 1]: of the "sample", of each "channel", of teacher and student "joint", or "none".
        node.NORMALIZATION = "sample"
        # phi, between student and teacher features: "none", "1x1" or "3x3".
        node.ADAPTATION = "none"
        # Weigh positions by the attention of teacher and student (Zhang and Ma 2021).
        node.SPATIAL_ATTENTION = False
        # Of its softmax; None: 0.5 for one-stage detectors, 0.1 for the others.
        node.ATTENTION_TEMPERATURE = None

    @classmethod
    def weight_default(cls, node: CfgNode, student: DetectorSpec) -> float:
        return 4.0 if student.family == "one-stage" else 2.0

    @classmethod
    def validate_config(cls, node: CfgNode) -> None:
        check_choice(cls.CONFIG_NODE, "LOSS", node.LOSS, MAP_LOSSES)
        check_choice(cls.CONFIG_NODE, "NORMALIZATION", node.NORMALIZATION, SCOPES)
        check_choice(cls.CONFIG_NODE, "ADAPTATION", node.ADAPTATION, ADAPTATION_KERNELS)
        check_number(cls.CONFIG_NODE, "SMOOTH_L1_BETA", node.SMOOTH_L1_BETA, 0, exclusive=True)
        if node.ATTENTION_TEMPERATURE is not None:
            check_number(cls.CONFIG_NODE, "ATTENTION_TEMPERATURE", node.ATTENTION_TEMPERATURE, 0, exclusive=True)
        for key in ("WINDOW_SIZE", "MS_SSIM_WINDOW_SIZE"):
            if node[key] < 1 or node[key] % 2 == 0:
                raise UserError(f"MODEL.KD.{cls.CONFIG_NODE}.{key} is {node[key]}; it must be odd and positive.")
        exponents = node.SSIM_EXPONENTS
        if len(exponents) != 3:
            raise UserError(
                f"MODEL.KD.{cls.CONFIG_NODE}.SSIM_EXPONENTS is {exponents!r}; it must be three numbers: of luminance, contrast "
                "and structure."
            )
        for exponent in exponents:
            check_number(cls.CONFIG_NODE, "SSIM_EXPONENTS", exponent, 0)
        if not any(exponents):
            raise UserError(f"MODEL.KD.{cls.CONFIG_NODE}.SSIM_EXPONENTS is {exponents!r}: nothing is left of the loss.")
        if node.LOSS != "ssim" and tuple(exponents) != (1, 1, 1):
            raise UserError(
                f"MODEL.KD.{cls.CONFIG_NODE}.SSIM_EXPONENTS is {exponents!r}, which LOSS 'ssim' alone reads; LOSS is {node.LOSS!r}."
            )

    @configurable
    def __init__(
        self,
        *,
        weight: float,
        map_loss: MapLoss,
        normalization: str,
        adaptation: AdaptationLayers,
        attention_temperature: float | None = None,
    ):
        """
        Args:
            weight: lambda.
            map_loss: l, a mean over two normalised maps (B, C, H, W).
            normalization: scope of nu, see `min_max_normalize`.
            adaptation: the layers phi; its strides are the levels that are compared.
            attention_temperature: positions are weighed by `spatial_attention` with it; None for the same weight everywhere.
        """
        super().__init__()
        self.weight = weight
        self.map_loss = map_loss
        self.normalization = normalization
        self.adaptation = adaptation
        self.attention_temperature = attention_temperature

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> dict:
        node = cfg.MODEL.KD.STRUCTURAL
        weight = cls.weight_of(node, student)
        temperature = node.ATTENTION_TEMPERATURE
        if temperature is None:
            temperature = 0.5 if student.family == "one-stage" else 0.1
        return {
            "weight": weight,
            "map_loss": MAP_LOSSES[node.LOSS](node),
            "normalization": node.NORMALIZATION,
            "adaptation": AdaptationLayers.from_node(cls.CONFIG_NODE, node, student, teacher),
            "attention_temperature": temperature if node.SPATIAL_ATTENTION else None,
        }

    def forward(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[str, Tensor]:
        losses = [self.level_loss(s, t) for s, t in self.adaptation.pairs(student, teacher)]
        return {"loss_structural": self.weight * sum(losses)}

    @torch.enable_grad()
    def loss_maps(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[int, Tensor]:
        """Where the loss falls: by stride the mean of l over the channels at every position (B, H, W), without lambda."""
        maps = {}
        for stride, (s, t) in zip(self.adaptation.strides, self.adaptation.pairs(student, teacher), strict=True):
            # The loss is linear in the weights of the positions: its slope in a weight is that position's part.
            weight = s.new_ones((len(s), 1, *s.shape[-2:]), dtype=torch.float32, requires_grad=True)
            (part,) = torch.autograd.grad(self.level_loss(s.detach(), t.detach(), weight), weight)
            maps[stride] = part[:, 0] * weight.numel()
        return maps

    @in_float32
    def level_loss(self, student_BCHW: Tensor, teacher_BCHW: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of one level, without lambda; `weight` (B, 1, H, W) of the positions."""
        if self.attention_temperature is not None:
            attention = spatial_attention(student_BCHW, teacher_BCHW, self.attention_temperature)
            weight = attention if weight is None else weight * attention
        return self.map_loss(*min_max_normalize(student_BCHW, teacher_BCHW, self.normalization), weight)
