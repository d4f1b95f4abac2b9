"""PKD: scale-invariant correlation of the student's channels with the teacher's (Cao et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor

from ..adapters import DetectorOutputs
from ..distributed import sum_across_ranks
from ..keys import AtLeast
from ..losses import pearson_loss_of_levels
from .adaptation import Adaptation, AdaptationLayers
from .base import DISTILLER_REGISTRY, Distiller, Losses, in_float32
from .pair import NumLevels, Pair


@DISTILLER_REGISTRY.register()
class PKD(Distiller):
    """Distillation by Pearson correlation (Cao et al. 2022), designed for detectors of different families.

    L = WEIGHT * sum over levels of 1/2 * mean over (B, C, H, W) of (F^_S - F^_T)^2, where F^ is standardized per
    channel over the batch of all ranks (see `pearson_loss_of_levels`). Levels are paired by stride.
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
        num_levels: NumLevels = None
        adaptation: Adaptation = None

    def __init__(self, config: Config, pair: Pair):
        super().__init__(config, pair, default_weight=10.0 if pair.student.family == "one-stage" else 6.0)
        self.adaptation = AdaptationLayers.build(
            config.adaptation, pair.with_levels(config.num_levels), self.CONFIG_NODE
        )

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        pairs = [self._of_one_size(s, t) for s, t in self.adaptation.pairs(student, teacher)]
        return {"loss_pkd": pearson_loss_of_levels(*zip(*pairs, strict=True), total=sum_across_ranks)}

    def _of_one_size(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        if student.shape[-2:] == teacher.shape[-2:]:
            return student, teacher
        if self.config.resize == "student":
            return resize(student, teacher.shape[-2:]), teacher
        return student, resize(teacher, student.shape[-2:])


resize = in_float32(partial(F.interpolate, mode="bilinear", align_corners=False))
