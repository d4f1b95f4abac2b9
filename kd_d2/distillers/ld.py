"""LD: distillation of the distributions of box sides.

Shape suffixes: B images, N boxes of an image, R anchors of an image over all levels, P selected anchors of all images,
D bins of a side's distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..adapters import DensePredictions, DetectorOutputs, Positives
from ..distributed import count_of, mean_count_across_ranks
from ..errors import UserError
from ..keys import Above, AtLeast
from ..losses import softmax_divergence
from ..modeling.assignment import adaptive_thresholds
from .base import DISTILLER_REGISTRY, Distiller, Losses
from .matching import check_same_anchors
from .pair import Pair

MAIN, VALUABLE, CLASS = "loss_ld", "loss_ld_valuable", "loss_ld_class"
LOWEST_VALUABLE = 0.25
"""Fraction of a box's threshold at which the valuable region starts."""


@DISTILLER_REGISTRY.register()
class LD(Distiller):
    """Localization distillation (Zheng et al. 2022) between detectors with distributions of box sides, such as GFL.

    For a region of anchors, with weights q, and every side of their boxes:

        L = sum of q * TEMPERATURE^2 * (mean over bins of KL(p_T || p_S)) / (4 * max(1, sum of q over all ranks))

    The main region is the positives of the student's label assignment, q its largest class probability there. Optional:
    the valuable localization region around the boxes, which may include positives, with the IoU as q (see
    `valuable_region`); and the divergence of the softmax over class logits at the positives, averaged over classes and
    positives.
    """

    needs = frozenset({"dense", "distributions", "targets"})
    loss_names = (MAIN, VALUABLE, CLASS)
    CONFIG_NODE = "LD"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        temperature: Annotated[
            float, Above(0), "Temperature of the softmax over bins; the loss is multiplied by its square."
        ] = 10.0
        main_weight: Annotated[float, AtLeast(0), "Weight of the main region."] = 0.25
        valuable_weight: Annotated[
            float, AtLeast(0), "Weight of the valuable localization region (authors: 0.25); 0 disables it."
        ] = 0.0
        class_weight: Annotated[
            float, AtLeast(0), "Weight of the class logits at positives (authors: 10); 0 disables them."
        ] = 0.0
        class_temperature: Annotated[float, Above(0), "Temperature of the softmax over class logits."] = 2.0
        candidates: Annotated[
            int,
            AtLeast(1),
            "Anchors per level near a box whose overlaps determine its threshold in the valuable region, as in ATSS.",
        ] = 9

    def __init__(self, config: Config, pair: Pair):
        super().__init__(config, pair)
        weights = config.main_weight, config.valuable_weight, config.class_weight
        self.weights = self.weigh_losses(*weights, optional=(VALUABLE, CLASS))
        student, teacher = pair.student, pair.teacher
        if config.class_weight and student.num_classes == 1:
            raise UserError(
                f"MODEL.KD.LD.CLASS_WEIGHT is {config.class_weight}, but with one class the softmax over class logits is constant: "
                "set it to 0."
            )
        if student.num_bins and teacher.num_bins:
            check_same_anchors("LD", student, teacher)
            if student.num_bins != teacher.num_bins:
                raise UserError(
                    f"LD compares distributions bin by bin, but those of the student ({student.name}) have {student.num_bins} "
                    f"bins and those of the teacher ({teacher.name}) {teacher.num_bins}: their REG_MAX must be the same."
                )

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        config, ours, theirs, positives = self.config, student.dense, teacher.dense, student.dense.positives
        probability_P = positives.pick(ours.logits.values()).detach().float().sigmoid().amax(1)
        losses = {MAIN: self._of_region(ours, theirs, positives, probability_P)}
        if VALUABLE in self.weights:
            levels = list(ours.anchors.values())
            weight_BR = torch.stack([valuable_region(levels, t.gt_boxes, config.candidates) for t in targets])
            image, anchor = weight_BR.nonzero(as_tuple=True)
            region = Positives(image, anchor, torch.full_like(anchor, -1))
            losses[VALUABLE] = self._of_region(ours, theirs, region, weight_BR[image, anchor])
        if CLASS in self.weights:
            logits = (positives.pick(dense.logits.values()) for dense in (ours, theirs))
            divergence_P = softmax_divergence(*logits, config.class_temperature)
            num_classes = next(iter(ours.logits.values())).shape[-1]
            losses[CLASS] = (divergence_P / num_classes).sum() / count_of(probability_P)
        return {name: weight * losses[name] for name, weight in self.weights.items()}

    def _of_region(
        self, student: DensePredictions, teacher: DensePredictions, region: Positives, weight_P: Tensor
    ) -> Tensor:
        sides = (region.pick(x.box_regression.values()).unflatten(1, (4, -1)) for x in (student, teacher))
        ours_P4D, theirs_P4D = sides
        mean_P4 = softmax_divergence(ours_P4D, theirs_P4D, self.config.temperature) / ours_P4D.shape[-1]
        return (weight_P[:, None] * mean_P4).sum() / (4 * mean_count_across_ranks(weight_P.sum()))


@torch.no_grad()
def valuable_region(anchors: list[Boxes], gt_boxes: Boxes, candidates: int = 9) -> Tensor:
    """Return the valuable localization region (Zheng et al. 2022, algorithm 1): 0.25 * t <= DIoU with a box < t.

    t is the box's threshold in ATSS, see `adaptive_thresholds`.

    Args:
        anchors: anchors by level.
        gt_boxes: N boxes.
        candidates: candidate anchors per level and box.

    Returns:
        (R,) the anchor's largest IoU with a box for which it is valuable; 0 for other anchors.
    """
    if len(gt_boxes) == 0:
        return anchors[0].tensor.new_zeros(sum(map(len, anchors)))
    overlap_NR, _, threshold_N1 = adaptive_thresholds(anchors, gt_boxes, candidates)
    distance_NR = overlap_NR - center_penalty(gt_boxes, Boxes.cat(anchors))
    is_valuable_NR = (distance_NR >= LOWEST_VALUABLE * threshold_N1) & (distance_NR < threshold_N1)
    return overlap_NR.where(is_valuable_NR, 0).amax(0)


def center_penalty(boxes: Boxes, others: Boxes) -> Tensor:
    """Compute DIoU's penalty (N, R): squared center distance over squared diagonal of the smallest enclosing box."""
    offset_NR2 = boxes.get_centers()[:, None] - others.get_centers()
    low_NR2 = torch.minimum(boxes.tensor[:, None, :2], others.tensor[:, :2])
    high_NR2 = torch.maximum(boxes.tensor[:, None, 2:], others.tensor[:, 2:])
    return offset_NR2.square().sum(-1) / (high_NR2 - low_NR2).square().sum(-1).clamp(min=1e-6)
