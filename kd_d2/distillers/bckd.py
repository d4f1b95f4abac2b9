"""BCKD: class probabilities as binary classifications, and boxes by their overlap (Yang et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from detectron2.structures import Instances
from torch import Tensor

from ..adapters import IGNORED, DetectorOutputs
from ..distributed import mean_count_across_ranks
from ..keys import AtLeast
from ..losses import quality_focal_loss
from .base import DISTILLER_REGISTRY, Distiller, Losses
from .boxes import giou_loss
from .matching import check_same_anchors
from .pair import Pair

CLASS, BOX = "loss_bckd_class", "loss_bckd_box"


@DISTILLER_REGISTRY.register()
class BCKD(Distiller):
    """Distillation of dense heads with the protocol of their detection losses (Yang et al. 2023).

    Times WEIGHT, over the anchors that are not ignored, divided by the number n of positives of all ranks, at least 1:

    - classes: sum over anchors and classes of |p_T - p_S| * BCE(p_S, p_T), where gradients also flow through |p_T - p_S|;
    - boxes: sum over anchors of (1 - GIoU of both boxes), weighted by the largest |p_T - p_S| of a class, without its
      gradient.

    The authors' program leaves out levels without positives, which the paper does not.
    """

    needs = frozenset({"dense", "targets"})
    loss_names = (CLASS, BOX)
    CONFIG_NODE = "BCKD"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        class_weight: Annotated[float, AtLeast(0), "Class loss weight."] = 1.0
        box_weight: Annotated[float, AtLeast(0), "Box loss weight."] = 4.0

    def __init__(self, config: Config, pair: Pair):
        super().__init__(config, pair)
        self.weights = self.weigh_losses(config.class_weight, config.box_weight, optional=(BOX,))
        check_same_anchors("BCKD", pair.student, pair.teacher)

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        ours, theirs = student.dense, teacher.dense
        count = mean_count_across_ranks((ours.assignment >= 0).sum().float())
        losses = {
            CLASS: sum(
                quality_focal_loss(ours.logits[stride], theirs.logits[stride], (assigned != IGNORED)[..., None])
                for stride, assigned in ours.assignment_by_level.items()
            )
        }
        if BOX in self.weights:
            boxes = (torch.cat([*dense.boxes.values()], 1) for dense in (ours, theirs))
            losses[BOX] = (self._box_weights(student, teacher) * giou_loss(*boxes)).sum()
        return {name: weight * losses[name] / count for name, weight in self.weights.items()}

    @torch.no_grad()
    def _box_weights(self, student: DetectorOutputs, teacher: DetectorOutputs) -> Tensor:
        """Return the largest difference of a class probability (B, R), 0 for ignored anchors."""
        ours, theirs = student.dense.probabilities, teacher.dense.probabilities
        largest = torch.cat([(theirs[stride] - ours[stride]).abs().amax(2) for stride in ours], 1)
        return largest * (student.dense.assignment != IGNORED)
