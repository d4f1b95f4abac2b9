"""ATSS: adaptive training sample selection (Zhang et al. 2020).

Shape suffixes: B images, K classes, R anchors of an image over all levels, P positives of all images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from ..distributed import count_of, mean_count_across_ranks
from .assignment import Positives
from .dense import AdaptiveDetector, AdaptiveKeys, FocalAlpha, FocalGamma, adaptive_arguments
from .fcos import FCOSHead


@dataclass(frozen=True)
class ATSSKeys(AdaptiveKeys):
    focal_loss_alpha: FocalAlpha = 0.25
    focal_loss_gamma: FocalGamma = 2.0
    box_loss_weight: Annotated[float, "Weight of the GIoU loss of the boxes."] = 2.0


@META_ARCH_REGISTRY.register()
class ATSS(AdaptiveDetector):
    """ATSS: one anchor per position, adaptive label assignment, and focal, GIoU and centerness losses."""

    @configurable
    def __init__(
        self,
        *,
        box_loss_weight: float = 2.0,
        **arguments,
    ):
        """
        Args:
            arguments: arguments of `AdaptiveDetector`, except its box transform and dims.
        """
        transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
        super().__init__(box2box_transform=transform, dims=[arguments["num_classes"], 4, 1], **arguments)
        self.box_loss_weight = box_loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        detector, head = adaptive_arguments(cfg, "ATSS", ATSSKeys)
        return {**detector, "head": FCOSHead(level_scales=True, **head)}

    def losses(
        self, anchors: list[Boxes], predictions: list[list[Tensor]], assignment_BR: Tensor, targets: list[Instances]
    ) -> dict[str, Tensor]:
        """Compute the focal loss of all anchors, and centerness and centerness-weighted GIoU loss of the positives."""
        logits, deltas, centerness = predictions
        positives = Positives.of(assignment_BR)
        class_P, box_P4 = positives.ground_truth(targets)
        anchor_P4 = Boxes.cat(anchors).tensor[positives.anchor]
        num_positives = count_of(class_P)
        with torch.autocast(logits[0].device.type, enabled=False):
            classification = self.focal_loss(logits, positives, class_P).sum()
            target_P = centerness_of(anchor_P4, box_P4)
            predicted_P4 = self.box2box_transform.apply_deltas(positives.pick(deltas).float(), anchor_P4)
            box = (generalized_box_iou_loss(predicted_P4, box_P4) * target_P).sum()
            quality = F.binary_cross_entropy_with_logits(
                positives.pick(centerness)[:, 0].float(), target_P, reduction="sum"
            )
        return {
            "loss_atss_cls": classification / num_positives,
            "loss_atss_box": self.box_loss_weight * box / mean_count_across_ranks(target_P.sum()),
            "loss_atss_centerness": quality / num_positives,
        }

    def scores(self, predictions: list[list[Tensor]]) -> list[Tensor]:
        """Return sqrt(class probability * centerness) by level, as in FCOS."""
        logits, _, centerness = predictions
        return [(x.sigmoid() * y.sigmoid()).sqrt() for x, y in zip(logits, centerness, strict=True)]


def centerness_of(anchor_P4: Tensor, box_P4: Tensor) -> Tensor:
    """Return the centerness (P,) of anchor centers (Tian et al. 2019, equation 3): 1 at the box center, 0 at a side."""
    center_P2 = (anchor_P4[:, :2] + anchor_P4[:, 2:]) / 2
    before, behind = center_P2 - box_P4[:, :2], box_P4[:, 2:] - center_P2
    return (torch.minimum(before, behind) / torch.maximum(before, behind)).prod(1).sqrt()
