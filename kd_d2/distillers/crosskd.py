"""CrossKD: distillation through the teacher's head, applied to the student's features.

Shape suffixes: B images, A anchors per position, H W map, D box regression outputs per anchor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..adapters import IGNORED, DensePredictions, DetectorOutputs, towers_at
from ..distributed import mean_count_across_ranks, sum_across_ranks
from ..errors import UserError
from ..keys import AtLeast
from ..losses import quality_focal_loss, softmax_divergence, with_statistics_of
from .base import DISTILLER_REGISTRY, Distiller, Losses, in_float32
from .boxes import giou_loss, iou_loss
from .matching import check_same_anchors
from .pair import Pair

CLASS, BOX, CENTERNESS = (f"loss_crosskd_{part}" for part in ("class", "box", "centerness"))
MIN_SIDE = 1e-6  # pixels


@DISTILLER_REGISTRY.register()
class CrossKD(Distiller):
    """Cross-head knowledge distillation (Wang et al. 2024) between dense heads with two convolutional towers.

    The student's features after convolution SPLIT of each tower, before the activation, are aligned per channel with
    the teacher's mean and deviation and passed through the rest of its frozen head. Times WEIGHT:

    - classes: sum over non-ignored anchors and classes of |p_T - p|^1 * BCE(p, p_T) / n;
    - boxes: sum over the same anchors, weighted by the teacher's largest class probability. Distributions: divergence
      summed over bins, mean over sides, divided by the sum of weights. Others: GIoU loss of decoded boxes, or -log(IoU)
      for point-based detectors, divided by n;
    - centerness: BCE with the teacher's, averaged over positives.

    n is the number of positives, for FCOS the sum of their centerness. The teacher's head determines the divisor and
    the type of box loss. Positives are from the student's label assignment. Divisors are totals over all ranks, at
    least 1.
    """

    needs = frozenset({"dense", "targets", "towers"})
    loss_names = (CLASS, BOX, CENTERNESS)
    CONFIG_NODE = "CROSSKD"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        split: Annotated[
            int | None,
            AtLeast(0),
            "Convolution of each tower after which the student's features are taken, 0 for the neck outputs; None means the second to "
            "last, or the middle one for point-based detectors (FCOS, FSAF), like the authors' 3 and 2 of 4.",
        ] = None
        class_weight: Annotated[
            float | None, AtLeast(0), "Class loss weight; None means 0.4 (point-based detectors) or 1."
        ] = None
        box_weight: Annotated[
            float | None, AtLeast(0), "Box loss weight; None means 4 (distributions), 0.75 (point-based) or 1."
        ] = None
        centerness_weight: Annotated[
            float | None,
            AtLeast(0),
            "Centerness loss weight; None means 1 for anchor-based detectors with a centerness, 0 for others.",
        ] = None

    def __init__(self, config: Config, pair: Pair):
        super().__init__(config, pair)
        teacher = pair.teacher
        has_centerness, at_points = "quality" in teacher.provides, "points" in teacher.provides
        if config.centerness_weight and not has_centerness:
            raise UserError(
                f"MODEL.KD.CROSSKD.CENTERNESS_WEIGHT is {config.centerness_weight}, but the teacher ({teacher.name}) has no centerness."
            )
        self.is_normalized_by_centerness = has_centerness and at_points
        self.box_loss = "distributions" if teacher.num_bins else "iou" if at_points else "giou"
        published = (
            0.4 if at_points else 1.0,
            {"distributions": 4.0, "giou": 1.0, "iou": 0.75}[self.box_loss],
            1.0 if has_centerness and not at_points else 0.0,
        )
        keys = config.class_weight, config.box_weight, config.centerness_weight
        weights = (default if key is None else key for key, default in zip(keys, published, strict=True))
        self.weights = self.weigh_losses(*weights, optional=(CENTERNESS,))
        if pair.student.tower_channels and teacher.tower_channels:  # KDMetaArch rejects other pairs
            check_same_anchors("CrossKD", pair.student, teacher)
            self.split = self._split(config.split, pair, at_points)
            self.needs = frozenset({"dense", "targets", towers_at(self.split)})

    @staticmethod
    def _split(asked: int | None, pair: Pair, at_points: bool) -> int:
        """Return the convolution after which both heads are split, or raise a UserError if that is impossible."""
        student, teacher = pair.student, pair.teacher
        depths = len(student.tower_channels) - 1, len(teacher.tower_channels) - 1
        depth = min(depths)
        split = (depth // 2 if at_points else depth - 1) if asked is None else asked
        if split > depth:
            raise UserError(
                f"MODEL.KD.CROSSKD.SPLIT is {split}, but the towers of the student ({student.name}) have {depths[0]} convolutions and "
                f"those of the teacher ({teacher.name}) {depths[1]}."
            )
        channels = student.tower_channels[split], teacher.tower_channels[split]
        if channels[0] != channels[1]:
            raise UserError(
                f"CrossKD passes the student's features to the teacher's head, but at MODEL.KD.CROSSKD.SPLIT {split} the student "
                f"({student.name}) has {channels[0]} channels and the teacher ({teacher.name}) {channels[1]}."
            )
        return split

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        crossed, expected = self._crossed(student, teacher), teacher.dense
        is_positive_BR = student.dense.assignment >= 0
        num_positives = mean_count_across_ranks(is_positive_BR.sum().float())
        total = num_positives
        if self.is_normalized_by_centerness:
            total = mean_count_across_ranks((is_positive_BR * centerness_of_assigned(student.dense, targets)).sum())
        classes = sum(
            quality_focal_loss(crossed.logits[s], expected.logits[s], (assignment != IGNORED)[..., None], power=1.0)
            for s, assignment in student.dense.assignment_by_level.items()
        )
        largest_BR = torch.cat([logits.amax(2) for logits in expected.logits.values()], 1)
        weights_BR = largest_BR.float().sigmoid() * (student.dense.assignment != IGNORED)
        boxes, box_weights = (weights_BR * self._box_losses(crossed, expected)).sum(), weights_BR.sum()
        divisor = mean_count_across_ranks(box_weights) if self.box_loss == "distributions" else total
        losses = {CLASS: classes / total, BOX: boxes / divisor}
        if CENTERNESS in self.weights:
            picked = (
                student.dense.positives.pick(dense.quality[stride] for stride in student.dense.logits)
                for dense in (crossed, expected)
            )
            losses[CENTERNESS] = _centerness_loss(*picked) / num_positives
        return {name: weight * losses[name] for name, weight in self.weights.items()}

    def _crossed(self, student: DetectorOutputs, teacher: DetectorOutputs) -> DensePredictions:
        """Return the predictions of the teacher's head for the student's features."""
        ours, theirs = student.towers[self.split], teacher.towers[self.split]
        strides = list(theirs.class_features)
        maps = (
            [features[stride] for features in (towers.class_features, towers.box_features) for stride in strides]
            for towers in (ours, theirs)
        )
        aligned = with_statistics_of(*maps, total=sum_across_ranks)
        halves = aligned[: len(strides)], aligned[len(strides) :]
        return theirs.finish(*(dict(zip(strides, half, strict=True)) for half in halves))

    def _box_losses(self, crossed: DensePredictions, expected: DensePredictions) -> Tensor:
        """Return the box losses (B, R)."""
        if self.box_loss == "distributions":
            sides = (
                torch.cat([*dense.box_regression.values()], 1).unflatten(2, (4, -1)) for dense in (crossed, expected)
            )
            return softmax_divergence(*sides).mean(2)
        loss = giou_loss if self.box_loss == "giou" else iou_loss
        return loss(*(torch.cat([*dense.boxes.values()], 1) for dense in (crossed, expected)))


def centerness_of_assigned(dense: DensePredictions, targets: list[Instances]) -> Tensor:
    """Compute the centerness (Tian et al. 2019, equation 3) of each anchor in its box (B, R); arbitrary without a box."""
    points_R2 = Boxes.cat([*dense.anchors.values()]).get_centers()
    return torch.stack(
        [
            _centerness(points_R2, target.gt_boxes.tensor[assigned_R.clamp(min=0)])
            if len(target)
            else points_R2.new_zeros(len(points_R2))
            for assigned_R, target in zip(dense.assignment, targets, strict=True)
        ]
    )


def _centerness(points_R2: Tensor, boxes_R4: Tensor) -> Tensor:
    low, high = points_R2 - boxes_R4[:, :2], boxes_R4[:, 2:] - points_R2
    ratios = torch.minimum(low, high) / torch.maximum(low, high).clamp(min=MIN_SIDE)
    return ratios.clamp(min=0).prod(1).sqrt()


@in_float32
def _centerness_loss(logits: Tensor, target_logits: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target_logits.sigmoid(), reduction="sum")
