"""GFL: generalized focal loss (Li et al. 2020).

Shape suffixes: B images, K classes, R anchors of an image over all levels, P positives of all images, D distances in
the distribution of a side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes, Instances
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from ..distributed import count_of, mean_count_across_ranks
from ..keys import AtLeast
from .assignment import Positives
from .dense import AdaptiveDetector, AdaptiveKeys, adaptive_arguments


@dataclass(frozen=True)
class GFLKeys(AdaptiveKeys):
    reg_max: Annotated[
        int,
        AtLeast(1),
        "Maximum distance of a side from the position, in strides; the distribution of a side covers 0 to REG_MAX.",
    ] = 16
    beta: Annotated[float, "Exponent of the quality focal loss."] = 2.0
    box_loss_weight: Annotated[float, "Weight of the GIoU loss of the boxes."] = 2.0
    distribution_loss_weight: Annotated[float, "Weight of the distribution focal loss."] = 0.25


class GFLHead(RetinaNetHead):
    """RetinaNet's head with one anchor per position, distributions as box sides, and a learned scale per level.

    Args:
        reg_max: the distribution of a side covers 0, 1, ..., reg_max strides.
        arguments: arguments of `RetinaNetHead`, except num_anchors.
    """

    def __init__(self, *, reg_max: int, conv_dims: list[int], **arguments: Any):
        super().__init__(num_anchors=1, conv_dims=conv_dims, **arguments)
        self.bbox_pred = nn.Conv2d(self.bbox_pred.in_channels, 4 * (reg_max + 1), kernel_size=3, padding=1)
        nn.init.normal_(self.bbox_pred.weight, std=0.01)
        nn.init.zeros_(self.bbox_pred.bias)
        self.scales = nn.Parameter(torch.ones(self._num_features))

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Map levels (B, C, H, W) to joint score logits (B, K, H, W) and side logits (B, 4 * D, H, W) by level."""
        logits, distributions = super().forward(features)
        return logits, [level * scale for level, scale in zip(distributions, self.scales, strict=True)]


class DistributionTransform:
    """Box transform for sides given as distributions over distances from the anchor's center.

    Args:
        anchor_scale: side of the anchors, in strides.
        reg_max: maximum distance, in strides.
    """

    def __init__(self, anchor_scale: float, reg_max: int):
        self.anchor_scale = anchor_scale
        self.reg_max = reg_max

    def get_distances(self, anchors: Tensor, boxes: Tensor) -> Tensor:
        """Return the distances (P, 4) of the left, top, right and bottom side from the anchor's center, in strides."""
        center = (anchors[:, :2] + anchors[:, 2:]) / 2
        return torch.cat([center - boxes[:, :2], boxes[:, 2:] - center], 1) / self._stride(anchors)

    def apply_deltas(self, logits: Tensor, anchors: Tensor) -> Tensor:
        """Return the boxes (P, 4) at the expected distances of distributions with logits (P, 4 * D)."""
        probabilities = logits.unflatten(-1, (4, self.reg_max + 1)).softmax(-1)
        distances = probabilities @ torch.arange(self.reg_max + 1, device=logits.device, dtype=logits.dtype)
        before, behind = (distances * self._stride(anchors)).chunk(2, -1)
        center = (anchors[:, :2] + anchors[:, 2:]) / 2
        return torch.cat([center - before, center + behind], -1)

    def _stride(self, anchors: Tensor) -> Tensor:
        return (anchors[:, 2:3] - anchors[:, 0:1]) / self.anchor_scale


@META_ARCH_REGISTRY.register()
class GFL(AdaptiveDetector):
    """GFL: ATSS label assignment, quality focal loss of a joint class and quality score, and box side distributions."""

    @configurable
    def __init__(
        self,
        *,
        reg_max: int = 16,
        beta: float = 2.0,
        box_loss_weight: float = 2.0,
        distribution_loss_weight: float = 0.25,
        anchor_scale: float = 8.0,
        **arguments: Any,
    ):
        """
        Args:
            arguments: arguments of `AdaptiveDetector`, except its box transform and dims.
        """
        super().__init__(
            box2box_transform=DistributionTransform(anchor_scale, reg_max),
            dims=[arguments["num_classes"], 4 * (reg_max + 1)],
            anchor_scale=anchor_scale,
            **arguments,
        )
        self.beta = beta
        self.box_loss_weight = box_loss_weight
        self.distribution_loss_weight = distribution_loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        detector, head = adaptive_arguments(cfg, "GFL", GFLKeys)
        return {**detector, "head": GFLHead(reg_max=detector["reg_max"], **head)}

    def losses(
        self, anchors: list[Boxes], predictions: list[list[Tensor]], assignment_BR: Tensor, targets: list[Instances]
    ) -> dict[str, Tensor]:
        """Compute the QFL of all anchors, and the GIoU loss and DFL of the positives, weighted by their scores."""
        logits, distributions = predictions
        positives = Positives.of(assignment_BR)
        class_P, box_P4 = positives.ground_truth(targets)
        anchor_P4 = Boxes.cat(anchors).tensor[positives.anchor]
        num_positives = count_of(class_P)
        with torch.autocast(logits[0].device.type, enabled=False):
            sides = positives.pick(distributions).float()
            predicted_P4 = self.box2box_transform.apply_deltas(sides, anchor_P4)
            quality_P = matched_pairwise_iou(Boxes(predicted_P4.detach()), Boxes(box_P4))
            weight_P = positives.pick(logits).detach().float().sigmoid().amax(1)
            logits_BRK = torch.cat(logits, 1).float()
            quality_BRK = torch.zeros_like(logits_BRK)
            quality_BRK[positives.image, positives.anchor, class_P] = quality_P
            classification = quality_focal_loss(logits_BRK, quality_BRK, self.beta).sum()
            box = (generalized_box_iou_loss(predicted_P4, box_P4) * weight_P).sum()
            distances_P4 = self.box2box_transform.get_distances(anchor_P4, box_P4)
            spread = (distribution_focal_loss(sides.unflatten(1, (4, -1)), distances_P4).mean(1) * weight_P).sum()
        divisor = mean_count_across_ranks(weight_P.sum())
        return {
            "loss_gfl_quality": classification / num_positives,
            "loss_gfl_box": self.box_loss_weight * box / divisor,
            "loss_gfl_distribution": self.distribution_loss_weight * spread / divisor,
        }


def quality_focal_loss(logits: Tensor, quality: Tensor, beta: float = 2.0) -> Tensor:
    """Quality focal loss (Li et al. 2020, equation 2): |quality - p|^beta times BCE, with p = sigmoid(logits).

    Args:
        logits, quality: tensors of the same shape; quality in [0, 1], 0 for background and for other classes.

    Returns:
        Elementwise loss of the same shape.
    """
    difference = quality - logits.sigmoid()
    return difference.abs() ** beta * F.binary_cross_entropy_with_logits(logits, quality, reduction="none")


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Distribution focal loss (Li et al. 2020, equation 3): cross-entropy with the two integers around the distance.

    Args:
        logits: (..., D), logits of the distances 0 to D - 1.
        distances: (...), clamped to [0, D - 1.1], as by the authors.

    Returns:
        Loss of shape (...).
    """
    distances = distances.clamp(0, logits.shape[-1] - 1.1)
    below = distances.floor()
    log_probability = logits.log_softmax(-1)
    share_above = distances - below
    at_below = log_probability.gather(-1, below.long()[..., None])[..., 0]
    at_above = log_probability.gather(-1, below.long()[..., None] + 1)[..., 0]
    return -(1 - share_above) * at_below - share_above * at_above
