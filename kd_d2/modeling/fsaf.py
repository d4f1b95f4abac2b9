"""FSAF: the feature selective anchor-free branch (Zhu et al. 2019), with RetinaNet's architecture.

Shape suffixes: B images, K classes, R positions of an image over all levels, N instances of an image, P positives or
candidates of all images, L levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes, Instances, pairwise_ioa
from detectron2.structures.boxes import matched_pairwise_iou
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn

from ..distributed import count_of
from ..keys import Above
from ..transfer import on_device
from .assignment import BACKGROUND, IGNORED, Positives
from .dense import DenseKeys, FocalAlpha, FocalGamma, SingleAnchorDetector, dense_arguments

DISTANCE_UNIT = 4.0  # strides
MIN_CELL_SHARE = 0.01
"""A position is in a region that covers more than this fraction of its cell, so small regions have positions too."""
MIN_IOU = 1e-6


@dataclass(frozen=True)
class FSAFKeys(DenseKeys):
    norm: Annotated[str | None, "Normalization layers of the head's towers; '' for none."] = ""
    nms_thresh_test: Annotated[float, "IoU threshold of the NMS."] = 0.5
    effective_scale: Annotated[
        float, Above(0), "Effective region of a box, as a fraction of its sides; positions in it may predict the box."
    ] = 0.2
    ignoring_scale: Annotated[
        float,
        Above(0),
        "Ignoring region of a box, as a fraction of its sides; unassigned positions in it have no loss for its class. The paper uses "
        "0.5; the default is MMDetection's, with which the thesis trained.",
    ] = 0.2
    focal_loss_alpha: FocalAlpha = 0.25
    focal_loss_gamma: FocalGamma = 2.0
    box_loss_weight: Annotated[float, "Weight of the IoU loss of the boxes."] = 1.0


class FSAFHead(RetinaNetHead):
    """RetinaNet's head with one prediction per position: the distances to the sides of the box."""

    def __init__(self, **arguments: Any):
        super().__init__(num_anchors=1, **arguments)
        nn.init.constant_(
            self.bbox_pred.bias, 1 / DISTANCE_UNIT
        )  # a box with sides of two strides, so that the ReLU has a gradient

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Map levels (B, C, H, W) to logits (B, K, H, W) and left, top, right, bottom (B, 4, H, W) in strides."""
        logits, distances = super().forward(features)
        return logits, [DISTANCE_UNIT * F.relu(level) for level in distances]


@META_ARCH_REGISTRY.register()
class FSAF(SingleAnchorDetector):
    """Anchor-free: positions in the effective region of an instance predict it, on the level with the smallest loss."""

    @configurable
    def __init__(
        self,
        *,
        effective_scale: float = 0.2,
        ignoring_scale: float = 0.2,
        box_loss_weight: float = 1.0,
        **arguments: Any,
    ):
        """
        Args:
            effective_scale: see MODEL.FSAF.EFFECTIVE_SCALE.
            ignoring_scale: see MODEL.FSAF.IGNORING_SCALE.
            arguments: arguments of `SingleAnchorDetector`, except its box transform, dims and anchor scale.
        """
        dims = [arguments["num_classes"], 4]
        super().__init__(box2box_transform=Box2BoxTransformLinear(), dims=dims, anchor_scale=1.0, **arguments)
        self.effective_scale = effective_scale
        self.ignoring_scale = ignoring_scale
        self.box_loss_weight = box_loss_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        detector, head = dense_arguments(cfg, "FSAF", FSAFKeys)
        return {**detector, "head": FSAFHead(**head)}

    @torch.no_grad()
    def assign(self, anchors: list[Boxes], predictions: list[list[Tensor]], targets: list[Instances]) -> Tensor:
        """Select the level with the smallest mean loss for each instance, and ignore its candidates on other levels.

        As in `losses`, classes that are ignored at a candidate have no loss.
        """
        cells = Boxes.cat(anchors)
        candidates = [smallest_box(in_middle(cells, t.gt_boxes, self.effective_scale), t.gt_boxes) for t in targets]
        assignment_BR = torch.stack(candidates)
        positives = Positives.of(assignment_BR)
        class_P, _ = positives.ground_truth(targets)
        ignored_PK = self._ignored(cells, positives, class_P, targets)[positives.image, positives.anchor]
        logits_PK = positives.pick(predictions[0]).float()
        focal_PK = sigmoid_focal_loss(
            logits_PK,
            F.one_hot(class_P, self.num_classes).to(logits_PK),
            alpha=self.focal_loss_alpha,
            gamma=self.focal_loss_gamma,
        )
        loss_P = focal_PK.masked_fill(ignored_PK, 0).sum(1) + self._box_losses(cells, predictions, positives, targets)
        ends_L = on_device([len(level) for level in anchors], cells.device).cumsum(0)
        level_P = torch.bucketize(positives.anchor, ends_L, right=True)
        instance_P = positives.among_all(targets)
        best_N = best_level(loss_P, instance_P, level_P, sum(map(len, targets)), len(anchors))
        chosen_P = torch.where(level_P == best_N[instance_P], positives.instance, IGNORED)
        return assignment_BR.index_put_((positives.image, positives.anchor), chosen_P)

    def _box_losses(
        self, cells: Boxes, predictions: list[list[Tensor]], positives: Positives, targets: list[Instances]
    ) -> Tensor:
        """Compute the IoU loss of the boxes (P,)."""
        _, box_P4 = positives.ground_truth(targets)
        predicted_P4 = self.box2box_transform.apply_deltas(
            positives.pick(predictions[1]).float(), cells.tensor[positives.anchor]
        )
        overlap_P = matched_pairwise_iou(Boxes(predicted_P4), Boxes(box_P4))
        return -overlap_P.clamp(min=MIN_IOU).log()

    def losses(
        self, anchors: list[Boxes], predictions: list[list[Tensor]], assignment_BR: Tensor, targets: list[Instances]
    ) -> dict[str, Tensor]:
        """Compute the focal loss of all positions and classes that are not ignored, and the positives' IoU loss."""
        cells, logits = Boxes.cat(anchors), predictions[0]
        positives = Positives.of(assignment_BR)
        class_P, _ = positives.ground_truth(targets)
        num_positives = count_of(class_P)
        with torch.autocast(logits[0].device.type, enabled=False):
            ignored_BRK = self._ignored(cells, positives, class_P, targets)
            classification = self.focal_loss(logits, positives, class_P).masked_fill(ignored_BRK, 0).sum()
            box_P = self._box_losses(cells, predictions, positives, targets)
        return {
            "loss_fsaf_cls": classification / num_positives,
            "loss_fsaf_box": self.box_loss_weight * box_P.sum() / num_positives,
        }

    def _ignored(self, cells: Boxes, positives: Positives, class_P: Tensor, targets: list[Instances]) -> Tensor:
        """Return where (B, R, K) a class is ignored: near its instances (`_near`), unless it is the positive's class."""
        ignored_BRK = torch.stack([self._near(cells, target) for target in targets])
        ignored_BRK[positives.image, positives.anchor, class_P] = False
        return ignored_BRK

    def _near(self, cells: Boxes, target: Instances) -> Tensor:
        """Return where (R, K) the effective and ignoring regions of a class's instances are."""
        near_NR = in_middle(cells, target.gt_boxes, self.effective_scale)
        near_NR |= covers_cell(cells, target.gt_boxes, self.ignoring_scale)
        is_class_NK = F.one_hot(target.gt_classes, self.num_classes)
        return near_NR.float().T @ is_class_NK.float() > 0


def covers_cell(cells: Boxes, gt_boxes: Boxes, scale: float) -> Tensor:
    """Return whether a box, scaled by `scale` around its center, covers enough of a position's cell (N, R)."""
    center, half = gt_boxes.get_centers(), (gt_boxes.tensor[:, 2:] - gt_boxes.tensor[:, :2]) * (scale / 2)
    return pairwise_ioa(Boxes(torch.cat([center - half, center + half], 1)), cells) > MIN_CELL_SHARE


def in_middle(cells: Boxes, gt_boxes: Boxes, scale: float) -> Tensor:
    """Return whether a position is in a scaled box (`covers_cell`) and its center in the unscaled one (N, R)."""
    x, y = cells.get_centers().unbind(1)
    x1, y1, x2, y2 = gt_boxes.tensor[:, :, None].unbind(1)
    return covers_cell(cells, gt_boxes, scale) & (x > x1) & (x < x2) & (y > y1) & (y < y2)


def smallest_box(is_inside_NR: Tensor, gt_boxes: Boxes) -> Tensor:
    """Return the index (R,) of the smallest box that contains a position, or `BACKGROUND`."""
    if len(gt_boxes) == 0:
        return torch.full(is_inside_NR.shape[1:], BACKGROUND, device=is_inside_NR.device)
    area_NR = torch.where(is_inside_NR, gt_boxes.area()[:, None], torch.inf)
    area_R, index_R = area_NR.min(0)
    return index_R.masked_fill(area_R.isinf(), BACKGROUND)


def best_level(loss_P: Tensor, instance_P: Tensor, level_P: Tensor, num_instances: int, num_levels: int) -> Tensor:
    """Return the level (N,) with the smallest mean loss of an instance's candidates (Zhu et al. 2019, equation 3)."""
    slot_P = instance_P * num_levels + level_P
    total, count = loss_P.new_zeros(2, num_instances * num_levels)
    total.index_add_(0, slot_P, loss_P)
    count.index_add_(0, slot_P, torch.ones_like(loss_P))
    mean = torch.where(count > 0, total / count, torch.inf)
    return mean.view(num_instances, num_levels).argmin(1)
