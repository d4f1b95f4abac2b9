"""FeatureImitation: the student's feature maps follow the teacher's in mean squared error."""

from __future__ import annotations

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor

from ..adapters import DetectorOutputs, DetectorSpec
from .adaptation import ADAPTATION_KERNELS, AdaptationLayers
from .base import DISTILLER_REGISTRY, Distiller, check_choice, in_float32


@DISTILLER_REGISTRY.register()
class FeatureImitation(Distiller):
    """Squared error between adapted student and teacher neck outputs (FitNet, Romero et al. 2015).

    L = WEIGHT * mean over levels of mean over (B, C, H, W) of (phi(F_S) - F_T)^2
    """

    needs = frozenset({"features"})
    loss_names = ("loss_feature_imitation",)
    CONFIG_NODE = "FEATURE_IMITATION"

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # Layer between student and teacher features: "none", "1x1" or "3x3".
        node.ADAPTATION = "none"

    @classmethod
    def validate_config(cls, node: CfgNode) -> None:
        check_choice(cls.CONFIG_NODE, "ADAPTATION", node.ADAPTATION, ADAPTATION_KERNELS)

    @configurable
    def __init__(self, *, weight: float, adaptation: AdaptationLayers):
        """
        Args:
            weight: multiplies the loss.
            adaptation: the layers phi; its strides are the levels that are compared.
        """
        super().__init__()
        self.weight = weight
        self.adaptation = adaptation

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> dict:
        node = cfg.MODEL.KD.FEATURE_IMITATION
        return {
            "weight": node.WEIGHT,
            "adaptation": AdaptationLayers.from_node(cls.CONFIG_NODE, node, student, teacher),
        }

    def forward(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[str, Tensor]:
        losses = [mean_squared_error(s, t) for s, t in self.adaptation.pairs(student, teacher)]
        return {"loss_feature_imitation": self.weight * sum(losses) / len(losses)}


mean_squared_error = in_float32(F.mse_loss)
