"""FGFI: feature imitation near objects, where anchors overlap them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from ..adapters import DetectorOutputs
from ..distributed import mean_count_across_ranks
from ..keys import AtLeast, Below
from ..losses import masked_squared_error
from .adaptation import Adaptation, AdaptationLayers
from .base import DISTILLER_REGISTRY, Distiller, Losses, Weight
from .matching import check_anchors_at
from .pair import Pair


@DISTILLER_REGISTRY.register()
class FGFI(Distiller):
    """Fine-grained feature imitation (Wang et al. 2019, equations 1 to 3).

    L = WEIGHT * 1 / (2 * N) * sum over levels, N mask positions and channels of (phi(F_S) - F_T)^2. A position is in
    the mask if an anchor's IoU with a ground-truth box exceeds THRESHOLD times the box's largest IoU on that level.
    """

    needs = frozenset({"features", "anchors", "targets"})
    loss_names = ("loss_fgfi",)
    CONFIG_NODE = "FGFI"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        weight: Weight = 0.01  # the authors' value; the loss is summed over channels
        threshold: Annotated[
            float, AtLeast(0), Below(1), "Fraction of a box's largest IoU that an anchor's IoU must exceed (psi)."
        ] = 0.5
        adaptation: Adaptation = "3x3"

    def __init__(self, config: Config, pair: Pair):
        super().__init__(config, pair)
        self.adaptation = AdaptationLayers.build(config.adaptation, pair, self.CONFIG_NODE)
        check_anchors_at("FGFI", "student", pair.student, pair.strides)

    @property
    def needs_of_teacher(self) -> frozenset[str]:
        return frozenset({"features"})

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        masks, total = [], 0
        for stride, (s, t) in zip(self.adaptation.strides, self.adaptation.pairs(student, teacher), strict=True):
            mask = near_objects(student.anchors[stride], s.shape[-2:], targets, self.config.threshold)
            total = total + s.shape[1] * masked_squared_error(s, t, mask)
            masks.append(mask)
        count = mean_count_across_ranks(sum(mask.sum() for mask in masks))
        return {"loss_fgfi": total / (2 * count)}


@torch.no_grad()
def near_objects(anchors: Boxes, shape: tuple[int, int], targets: list[Instances], threshold: float) -> Tensor:
    """Return masks (B, H, W), 1 where an anchor's IoU with a box exceeds `threshold` times the box's largest, else 0.

    Args:
        anchors: anchors of a level, HWA in order of row, column, anchor.
        shape: H, W.
    """
    masks = []
    for target in targets:
        overlap_NR = pairwise_iou(target.gt_boxes, anchors)
        is_near_R = (overlap_NR > threshold * overlap_NR.amax(1, keepdim=True)).any(0)
        masks.append(is_near_R.view(*shape, -1).any(-1))
    return torch.stack(masks).float()
