"""PKD: scale-invariant correlation of the student's channels with the teacher's (Cao et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import Tensor

from ..adapters import DetectorOutputs
from ..distributed import mean_across_ranks, mean_across_ranks_with_local_gradient
from ..keys import AtLeast
from ..losses import channel_means, channel_moments, pearson_loss_of_moments
from .adaptation import Adaptation, AdaptationLayers
from .base import DISTILLER_REGISTRY, Distiller, Losses, in_float32
from .pair import Pair


@DISTILLER_REGISTRY.register()
class PKD(Distiller):
    """Distillation by Pearson correlation (Cao et al. 2022), designed for detectors of different families.

    L = WEIGHT * sum over levels of 1/2 * mean over (B, C, H, W) of (F^_S - F^_T)^2, where F^ is standardized per
    channel over the batch of all ranks (see `pearson_loss`). Levels are paired by stride.
    """

    needs = frozenset({"features"})
    loss_names = ("loss_pkd",)
    CONFIG_NODE = "PKD"
    resizes = True

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        weight: Annotated[
            float | None,
            AtLeast(0),
            "Weight of the method's losses; None means 10 for one-stage students and 6 for others.",
        ] = None
        resize: Annotated[
            Literal["student", "teacher"],
            "Whose maps are resized to the other's size if maps of one stride have different sizes.",
        ] = "student"
        adaptation: Adaptation = None

    def __init__(self, config: Config, pair: Pair):
        super().__init__(config, pair, default_weight=10.0 if pair.student.family == "one-stage" else 6.0)
        self.adaptation = AdaptationLayers.build(config.adaptation, pair, self.CONFIG_NODE)

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        pairs = [self._of_one_size(s, t) for s, t in self.adaptation.pairs(student, teacher)]
        channels = [t.shape[1] for _, t in pairs]
        # Two all-reduces for all levels: one for the means, one for the moments about the means of all ranks.
        means = mean_across_ranks(torch.cat([channel_means(s, t) for s, t in pairs], 1))
        moments = torch.cat(
            [channel_moments(s, t, mean) for (s, t), mean in zip(pairs, means.split(channels, 1), strict=True)], 1
        )
        levels = mean_across_ranks_with_local_gradient(moments).split(channels, 1)
        counts = [comm.get_world_size() * t[:, 0].numel() for _, t in pairs]
        losses = [pearson_loss_of_moments(level, count) for level, count in zip(levels, counts, strict=True)]
        return {"loss_pkd": sum(losses)}

    def _of_one_size(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        if student.shape[-2:] == teacher.shape[-2:]:
            return student, teacher
        if self.config.resize == "student":
            return resize(student, teacher.shape[-2:]), teacher
        return student, resize(teacher, student.shape[-2:])


resize = in_float32(partial(F.interpolate, mode="bilinear", align_corners=False))
