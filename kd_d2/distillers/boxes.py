"""Losses of paired boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import in_float32

MIN_IOU = 1e-6
MIN_AREA = 1e-7  # pixels


@in_float32
def giou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """Compute 1 - GIoU (Rezatofighi et al. 2019) of paired boxes (..., 4) without GPU synchronization."""
    shared, union = _shared_and_union(boxes, targets)
    hull = _area(torch.minimum(boxes[..., :2], targets[..., :2]), torch.maximum(boxes[..., 2:], targets[..., 2:]))
    return 1 - shared / union.clamp(min=MIN_AREA) + (hull - union) / hull.clamp(min=MIN_AREA)


@in_float32
def iou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """Compute -log(IoU) of paired boxes (..., 4). Empty boxes have no overlap."""
    shared, union = _shared_and_union(boxes, targets)
    return -(shared / union.clamp(min=MIN_AREA)).clamp(min=MIN_IOU).log()


def _shared_and_union(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.maximum(boxes[..., :2], targets[..., :2]), torch.minimum(boxes[..., 2:], targets[..., 2:])
    shared = _area(low, high)
    return shared, sum(_area(x[..., :2], x[..., 2:]) for x in (boxes, targets)) - shared


def _area(low: Tensor, high: Tensor) -> Tensor:
    width, height = (high - low).clamp(min=0).unbind(-1)
    return width * height
