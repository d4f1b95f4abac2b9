"""FeatureImitation: mean squared error between the feature maps of student and teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from detectron2.structures import Instances

from ..adapters import DetectorOutputs
from .adaptation import Adaptation, AdaptationLayers
from .base import DISTILLER_REGISTRY, Distiller, Losses, in_float32
from .pair import Pair


@DISTILLER_REGISTRY.register()
class FeatureImitation(Distiller):
    """Squared error between adapted student and teacher neck outputs (FitNet, Romero et al. 2015).

    L = WEIGHT * mean over levels of mean over (B, C, H, W) of (phi(F_S) - F_T)^2
    """

    needs = frozenset({"features"})
    loss_names = ("loss_feature_imitation",)
    CONFIG_NODE = "FEATURE_IMITATION"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        adaptation: Adaptation = "none"

    def __init__(self, config: Config, pair: Pair):
        super().__init__(config, pair)
        self.adaptation = AdaptationLayers.build(config.adaptation, pair, self.CONFIG_NODE)

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        losses = [mean_squared_error(s, t) for s, t in self.adaptation.pairs(student, teacher)]
        return {"loss_feature_imitation": sum(losses) / len(losses)}


mean_squared_error = in_float32(F.mse_loss)
