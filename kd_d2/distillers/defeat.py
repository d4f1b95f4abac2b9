"""DeFeat: foreground and background features imitated apart."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor

from ..adapters import DetectorOutputs, DetectorSpec
from ..distributed import mean_count_across_ranks
from ..losses import masked_squared_error
from .adaptation import ADAPTATION_KERNELS, AdaptationLayers
from .base import DISTILLER_REGISTRY, Distiller, check_choice, check_number
from .masks import inside_boxes


@DISTILLER_REGISTRY.register()
class DeFeat(Distiller):
    """Decoupled features (Guo et al. 2021, equations 2 and 3): of the neck outputs.

    L = WEIGHT * mean over levels of sum over foreground and background of their weight / (2 * N) * sum of (phi(F_S) - F_T)^2, N being
    the elements of each. Foreground is the inside of the ground-truth boxes.
    """

    needs = frozenset({"features", "targets"})
    loss_names = ("loss_defeat_foreground", "loss_defeat_background")
    CONFIG_NODE = "DEFEAT"

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        node.FOREGROUND_WEIGHT = 3.0
        node.BACKGROUND_WEIGHT = 12.0
        # phi, between student and teacher features: "none", "1x1" or "3x3".
        node.ADAPTATION = "3x3"

    @classmethod
    def validate_config(cls, node: CfgNode) -> None:
        check_choice(cls.CONFIG_NODE, "ADAPTATION", node.ADAPTATION, ADAPTATION_KERNELS)
        for key in ("FOREGROUND_WEIGHT", "BACKGROUND_WEIGHT"):
            check_number(cls.CONFIG_NODE, key, node[key], 0)

    @configurable
    def __init__(
        self, *, adaptation: AdaptationLayers, foreground_weight: float = 3.0, background_weight: float = 12.0
    ):
        """
        Args:
            adaptation: the layers phi; its strides are the levels that are compared.
            foreground_weight, background_weight: of the two losses.
        """
        super().__init__()
        self.adaptation = adaptation
        self.weights = foreground_weight, background_weight

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> dict:
        node = cfg.MODEL.KD.DEFEAT
        return {
            "adaptation": AdaptationLayers.from_node(cls.CONFIG_NODE, node, student, teacher),
            "foreground_weight": node.WEIGHT * node.FOREGROUND_WEIGHT,
            "background_weight": node.WEIGHT * node.BACKGROUND_WEIGHT,
        }

    def forward(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[str, Tensor]:
        pairs = self.adaptation.pairs(student, teacher)
        foreground = inside_boxes(student, targets, self.adaptation.strides)
        losses = []
        for weight, masks in zip(self.weights, (foreground, [1 - mask for mask in foreground]), strict=True):
            counts_L = mean_count_across_ranks(torch.stack([mask.sum() for mask in masks]))
            totals_L = torch.stack([masked_squared_error(s, t, m) for (s, t), m in zip(pairs, masks, strict=True)])
            losses.append(weight * (totals_L / (2 * counts_L)).mean())
        return dict(zip(self.loss_names, losses, strict=True))
