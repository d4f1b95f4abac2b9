"""StructuralKD: normalised feature maps compared by l1, l2, smooth l1 or structural similarity (de Rijk 2022)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor

from ..detectors import DetectorOutputs, DetectorSpec
from ..errors import UserError
from ..losses import min_max_normalize, ssim_loss
from ..losses.normalization import SCOPES
from .base import (
    ADAPTATION_KERNELS,
    DISTILLER_REGISTRY,
    AdaptationLayers,
    Distiller,
    check_choice,
    check_number,
    in_float32,
)

MapLoss = Callable[[Tensor, Tensor], Tensor]


def _ssim(node: CfgNode) -> MapLoss:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return ssim_loss(student, teacher, min(node.WINDOW_SIZE, 2 * min(student.shape[-2:]) - 1))

    return loss


MAP_LOSSES: dict[str, Callable[[CfgNode], MapLoss]] = {
    "l1": lambda node: F.l1_loss,
    "l2": lambda node: F.mse_loss,
    "smooth_l1": lambda node: lambda s, t: F.smooth_l1_loss(s, t, beta=node.SMOOTH_L1_BETA),
    "ssim": _ssim,
}
"""By the name in MODEL.KD.STRUCTURAL.LOSS: from the node to a mean loss of two normalised maps (B, C, H, W)."""


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
        # l: "l1", "l2", "smooth_l1" or "ssim".
        node.LOSS = "ssim"
        # Side of the SSIM window in cells, odd; smaller maps take min(this, 2 * min(H, W) - 1).
        node.WINDOW_SIZE = 11
        # Where smooth l1 turns from square to line.
        node.SMOOTH_L1_BETA = 0.1
        # Range that nu maps to [0, 1]: of the "sample", of each "channel", of teacher and student "joint", or "none".
        node.NORMALIZATION = "sample"
        # phi, between student and teacher features: "none", "1x1" or "3x3".
        node.ADAPTATION = "none"

    @classmethod
    def validate_config(cls, node: CfgNode) -> None:
        check_choice(cls.CONFIG_NODE, "LOSS", node.LOSS, MAP_LOSSES)
        check_choice(cls.CONFIG_NODE, "NORMALIZATION", node.NORMALIZATION, SCOPES)
        check_choice(cls.CONFIG_NODE, "ADAPTATION", node.ADAPTATION, ADAPTATION_KERNELS)
        check_number(cls.CONFIG_NODE, "SMOOTH_L1_BETA", node.SMOOTH_L1_BETA, 0, exclusive=True)
        if node.WINDOW_SIZE < 1 or node.WINDOW_SIZE % 2 == 0:
            raise UserError(
                f"MODEL.KD.{cls.CONFIG_NODE}.WINDOW_SIZE is {node.WINDOW_SIZE}; it must be odd and positive."
            )

    @configurable
    def __init__(self, *, weight: float, map_loss: MapLoss, normalization: str, adaptation: AdaptationLayers):
        """
        Args:
            weight: lambda.
            map_loss: l, a mean over two normalised maps (B, C, H, W).
            normalization: scope of nu, see `min_max_normalize`.
            adaptation: the layers phi; its strides are the levels that are compared.
        """
        super().__init__()
        self.weight = weight
        self.map_loss = map_loss
        self.normalization = normalization
        self.adaptation = adaptation

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> dict:
        node = cfg.MODEL.KD.STRUCTURAL
        weight = node.WEIGHT
        if weight is None:
            weight = 4.0 if student.family == "one-stage" else 2.0
        return {
            "weight": weight,
            "map_loss": MAP_LOSSES[node.LOSS](node),
            "normalization": node.NORMALIZATION,
            "adaptation": AdaptationLayers.from_node(cls.CONFIG_NODE, node, student, teacher),
        }

    def forward(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[str, Tensor]:
        losses = [self.level_loss(s, t) for s, t in self.adaptation.pairs(student, teacher)]
        return {"loss_structural": self.weight * sum(losses)}

    @in_float32
    def level_loss(self, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """The loss of one level, unweighted."""
        return self.map_loss(*min_max_normalize(student_BCHW, teacher_BCHW, self.normalization))
