"""DeFeat: separate imitation of foreground and background features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from detectron2.structures import Instances

from ..adapters import DetectorOutputs
from ..distributed import mean_count_across_ranks
from ..keys import AtLeast
from ..losses import masked_squared_error
from .adaptation import Adaptation, AdaptationLayers
from .base import DISTILLER_REGISTRY, Distiller, Losses
from .masks import inside_boxes
from .pair import Pair


@DISTILLER_REGISTRY.register()
class DeFeat(Distiller):
    """Decoupled feature distillation (Guo et al. 2021, equations 2 and 3) of the neck outputs.

    L = WEIGHT * mean over levels of sum over foreground and background of weight / (2 * N) * sum of (phi(F_S) - F_T)^2,
    where N is the region's number of elements. Foreground is the inside of the ground-truth boxes.
    """

    needs = frozenset({"features", "targets"})
    loss_names = ("loss_defeat_foreground", "loss_defeat_background")
    CONFIG_NODE = "DEFEAT"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        foreground_weight: Annotated[float, AtLeast(0), "Weight of the loss inside the ground-truth boxes."] = 3.0
        background_weight: Annotated[float, AtLeast(0), "Weight of the loss outside the ground-truth boxes."] = 12.0
        adaptation: Adaptation = "3x3"

    def __init__(self, config: Config, pair: Pair):
        super().__init__(config, pair)
        self.adaptation = AdaptationLayers.build(config.adaptation, pair, self.CONFIG_NODE)

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        pairs = self.adaptation.pairs(student, teacher)
        foreground = inside_boxes(student, targets, self.adaptation.strides)
        weights = self.config.foreground_weight, self.config.background_weight
        losses = []
        for weight, masks in zip(weights, (foreground, [1 - mask for mask in foreground]), strict=True):
            counts_L = mean_count_across_ranks(torch.stack([mask.sum() for mask in masks]))
            totals_L = torch.stack([masked_squared_error(s, t, m) for (s, t), m in zip(pairs, masks, strict=True)])
            losses.append(weight * (totals_L / (2 * counts_L)).mean())
        return dict(zip(self.loss_names, losses, strict=True))
