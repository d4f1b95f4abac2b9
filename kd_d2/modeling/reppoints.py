"""RepPoints: objects as sets of points (Yang et al. 2019).

Shape suffixes: B images, K classes, R positions of an image over all levels, N instances of an image, P positives of all
images. Point sets are (..., 2 * points): alternating y and x offsets from the position, in strides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes, Instances, pairwise_iou
from fvcore.nn import smooth_l1_loss
from torch import Tensor, nn

from ..distributed import count_of
from ..keys import Above, AtLeast, Condition
from ..transfer import on_device
from .assignment import BACKGROUND, Positives, assign_by_iou
from .deformable import DeformableConv
from .dense import DenseKeys, FocalAlpha, FocalGamma, SingleAnchorDetector, dense_arguments

TRANSFER_LEARNING_RATE = 0.01
"""Fraction of the gradient that reaches the learned factor between standard deviation and half a box side."""
VARIANCE_EPS = 1e-6


ODD_SQUARE = Condition(
    "the square of an odd number above 1, such as 9 or 25",
    lambda number: number >= 9 and number % 2 == 1 and math.isqrt(number) ** 2 == number,
)


@dataclass(frozen=True)
class RepPointsKeys(DenseKeys):
    num_convs: Annotated[int, AtLeast(1), "Number of convolutions in each of the head's two towers."] = 3
    norm: Annotated[str | None, "Normalization layers of the head's towers; '' for none."] = ""
    nms_thresh_test: Annotated[float, "IoU threshold of the NMS."] = 0.5
    num_points: Annotated[int, ODD_SQUARE, "Number of points in a set."] = 9
    gradient_share: Annotated[
        float, "Fraction of the gradient that reaches the first points through the sampling positions of features."
    ] = 0.1
    base_scale: Annotated[
        float,
        Above(0),
        "Smallest instance size of a level, in strides; also the unit of the box losses.",
    ] = 4.0
    iou_thresholds: Annotated[
        list,
        "IoU thresholds of the first box with the ground truth: background below the first, foreground from the second, ignored "
        "in between.",
    ] = field(default_factory=lambda: [0.4, 0.5])
    focal_loss_alpha: FocalAlpha = 0.25
    focal_loss_gamma: FocalGamma = 2.0
    smooth_l1_beta: Annotated[float, "Difference at which the smooth L1 loss changes from quadratic to linear."] = 0.11
    init_loss_weight: Annotated[float, "Weight of the box loss of the first points."] = 0.5
    refine_loss_weight: Annotated[float, "Weight of the box loss of the refined points."] = 1.0


class RepPointsHead(RetinaNetHead):
    """RetinaNet's towers, followed by first points, and classes and refined points from features sampled at them.

    Args:
        num_points: number of points in a set.
        gradient_share: see MODEL.REPPOINTS.GRADIENT_SHARE.
        first_side: side of the square box of the initial first points, in strides. If all points start in one place, as
            in the authors' code, boxes take hundreds of iterations to grow.
        arguments: arguments of `RetinaNetHead`, except num_anchors.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        conv_dims: list[int],
        num_points: int,
        gradient_share: float,
        first_side: float,
        **arguments: Any,
    ):
        super().__init__(num_classes=num_classes, conv_dims=conv_dims, num_anchors=1, **arguments)
        del self.bbox_pred
        self.gradient_share = gradient_share
        side, channels = math.isqrt(num_points), conv_dims[-1]
        class_bias = self.cls_score.bias
        self.first_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.first_points = nn.Conv2d(channels, 2 * num_points, 1)
        self.class_conv = DeformableConv(channels, channels, side, padding=side // 2, bias=False)
        self.cls_score = nn.Conv2d(channels, num_classes, 1)
        self.refine_conv = DeformableConv(channels, channels, side, padding=side // 2, bias=False)
        self.refined_points = nn.Conv2d(channels, 2 * num_points, 1)
        for layer in (self.first_conv, self.class_conv, self.refine_conv):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        for layer in (self.first_points, self.cls_score, self.refined_points):
            nn.init.normal_(layer.weight, std=0.01)
        for layer in (self.first_conv, self.refined_points):
            nn.init.zeros_(layer.bias)
        self.cls_score.bias = class_bias
        self.moment_transfer = nn.Parameter(torch.zeros(2))
        lines = torch.arange(side, dtype=torch.float32) - side // 2
        grid = torch.stack(torch.meshgrid(lines, lines, indexing="ij"), -1)
        self.register_buffer("kernel_grid", grid.view(1, -1, 1, 1), persistent=False)
        with torch.no_grad():
            self.first_points.bias.copy_(grid.flatten() * (first_side / 2 / grid[..., 0].std()))

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Map levels (B, C, H, W) to logits (B, K, H, W), refined and first points (B, 2 * points, H, W) by level."""
        outputs = [self._level(level) for level in features]
        return tuple(list(levels) for levels in zip(*outputs, strict=True))

    def _level(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        class_features, point_features = self.cls_subnet(level), self.bbox_subnet(level)
        first = self.first_points(F.relu(self.first_conv(point_features)))
        sampled_at = first.detach().lerp(first, self.gradient_share) - self.kernel_grid
        logits = self.cls_score(F.relu(self.class_conv(class_features, sampled_at)))
        moves = self.refined_points(F.relu(self.refine_conv(point_features, sampled_at)))
        return logits, first.detach() + moves, first


class PointTransform:
    """Converts point sets to boxes: the mean is the center, and the deviation times a learned factor is half a side.

    Args:
        anchor_scale: side of the anchors, in strides.
        moment_transfer: (2,), logarithms of the horizontal and vertical factor.
    """

    def __init__(self, anchor_scale: float, moment_transfer: nn.Parameter):
        self.anchor_scale = anchor_scale
        self.moment_transfer = moment_transfer

    def apply_deltas(self, points: Tensor, anchors: Tensor) -> Tensor:
        """Return the boxes (P, 4) of point sets (P, 2 * points) around the centers of anchors (P, 4)."""
        point_Pn2 = torch.stack([points[..., 1::2], points[..., 0::2]], -1)  # x before y
        mean = point_Pn2.mean(-2)
        variance = (point_Pn2 - mean[..., None, :]).square().sum(-2) / (point_Pn2.shape[-2] - 1)
        deviation = (variance + VARIANCE_EPS).sqrt()
        transfer = self.moment_transfer.detach().lerp(self.moment_transfer, TRANSFER_LEARNING_RATE)
        half = deviation * transfer.exp()
        center = (anchors[:, :2] + anchors[:, 2:]) / 2
        stride = (anchors[:, 2:3] - anchors[:, 0:1]) / self.anchor_scale
        return torch.cat([center + (mean - half) * stride, center + (mean + half) * stride], -1)


@META_ARCH_REGISTRY.register()
class RepPoints(SingleAnchorDetector):
    """RepPoints: first points assigned by nearest position, refined points and classes by IoU of the first boxes."""

    @configurable
    def __init__(
        self,
        *,
        head: RepPointsHead,
        num_points: int = 9,
        base_scale: float = 4.0,
        iou_thresholds: list[float] = (0.4, 0.5),
        smooth_l1_beta: float = 0.11,
        init_loss_weight: float = 0.5,
        refine_loss_weight: float = 1.0,
        **arguments: Any,
    ):
        """
        Args:
            base_scale: see MODEL.REPPOINTS.BASE_SCALE.
            iou_thresholds: see MODEL.REPPOINTS.IOU_THRESHOLDS.
            arguments: arguments of `SingleAnchorDetector`, except its box transform, dims and anchor scale.
        """
        super().__init__(
            head=head,
            box2box_transform=PointTransform(base_scale, head.moment_transfer),
            dims=[arguments["num_classes"], 2 * num_points, 2 * num_points],
            anchor_scale=base_scale,
            **arguments,
        )
        self.matcher = Matcher(list(iou_thresholds), [0, -1, 1], allow_low_quality_matches=True)
        self.smooth_l1_beta = smooth_l1_beta
        self.init_loss_weight = init_loss_weight
        self.refine_loss_weight = refine_loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        detector, head = dense_arguments(cfg, "REPPOINTS", RepPointsKeys)
        points = RepPointsHead(
            num_points=detector["num_points"],
            gradient_share=detector.pop("gradient_share"),
            first_side=detector["base_scale"],
            **head,
        )
        return {**detector, "head": points}

    @torch.no_grad()
    def assign(self, anchors: list[Boxes], predictions: list[list[Tensor]], targets: list[Instances]) -> Tensor:
        """Assign by the IoU of the first points' boxes, as RetinaNet does with anchors.

        The best match of an instance has to overlap it: an instance that no box overlaps has no position.
        """
        cells = Boxes.cat(anchors).tensor
        first_BRn = torch.cat(predictions[2], 1).float()
        rows = []
        for points, target in zip(first_BRn, targets, strict=True):
            overlap_NR = pairwise_iou(target.gt_boxes, Boxes(self.box2box_transform.apply_deltas(points, cells)))
            rows.append(assign_by_iou(overlap_NR, self.matcher, touching=True))
        return torch.stack(rows)

    def losses(
        self, anchors: list[Boxes], predictions: list[list[Tensor]], assignment_BR: Tensor, targets: list[Instances]
    ) -> dict[str, Tensor]:
        """Compute the focal loss of positions not ignored, and smooth L1 of first and refined boxes in anchor sides."""
        logits, refined, first = predictions
        positives = Positives.of(assignment_BR)
        class_P, _ = positives.ground_truth(targets)
        num_positives = count_of(class_P)
        nearest_BR = torch.stack([assign_nearest(anchors, t.gt_boxes) for t in targets])
        with torch.autocast(logits[0].device.type, enabled=False):
            classification = self.focal_loss(logits, positives, class_P)
            asked_BR1 = (assignment_BR >= BACKGROUND)[..., None]
            return {
                "loss_reppoints_cls": (classification * asked_BR1).sum() / num_positives,
                "loss_reppoints_init": self.init_loss_weight
                * self._box_loss(anchors, first, Positives.of(nearest_BR), targets),
                "loss_reppoints_refine": self.refine_loss_weight * self._box_loss(anchors, refined, positives, targets),
            }

    def _box_loss(
        self, anchors: list[Boxes], points: list[Tensor], positives: Positives, targets: list[Instances]
    ) -> Tensor:
        _, box_P4 = positives.ground_truth(targets)
        anchor_P4 = Boxes.cat(anchors).tensor[positives.anchor]
        unit_P1 = anchor_P4[:, 2:3] - anchor_P4[:, 0:1]
        predicted_P4 = self.box2box_transform.apply_deltas(positives.pick(points).float(), anchor_P4)
        loss = smooth_l1_loss(predicted_P4 / unit_P1, box_P4 / unit_P1, beta=self.smooth_l1_beta, reduction="sum")
        return loss / count_of(box_P4)


@torch.no_grad()
def assign_nearest(anchors: list[Boxes], gt_boxes: Boxes) -> Tensor:
    """Assign each instance to the position nearest to its center, on the level with the largest anchors up to its size.

    Distances are relative to the instance's width and height. A position nearest to several takes the nearest.

    Args:
        anchors: anchors of each level, in order of size.
        gt_boxes: N boxes.

    Returns:
        (R,) int64: index of the box, or `BACKGROUND`.
    """
    everywhere = Boxes.cat(anchors)
    if len(gt_boxes) == 0:
        return torch.full((len(everywhere),), BACKGROUND, device=everywhere.device)
    extent_N2 = (gt_boxes.tensor[:, 2:] - gt_boxes.tensor[:, :2]).clamp(min=1e-6)
    side_L = torch.stack([level.tensor[0, 2] - level.tensor[0, 0] for level in anchors])
    level_N = (torch.bucketize(extent_N2.log2().mean(1), side_L.log2(), right=True) - 1).clamp(min=0)
    counts = on_device([len(level) for level in anchors], side_L.device)
    levels = torch.arange(len(anchors), device=side_L.device)
    level_R = torch.repeat_interleave(levels, counts, output_size=len(everywhere))
    offset_NR2 = (everywhere.get_centers() - gt_boxes.get_centers()[:, None]) / extent_N2[:, None]
    distance_NR = offset_NR2.norm(dim=-1).masked_fill(level_R != level_N[:, None], torch.inf)
    nearest_N1 = distance_NR.argmin(1, keepdim=True)
    taken_NR = torch.full_like(distance_NR, torch.inf).scatter_(1, nearest_N1, distance_NR.gather(1, nearest_N1))
    best_R, index_R = taken_NR.min(0)
    return index_R.masked_fill(best_R.isinf(), BACKGROUND)
