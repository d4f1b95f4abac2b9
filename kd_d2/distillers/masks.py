"""Masks on feature maps, by level (B, H, W) of zeros and ones.

Shape suffixes: B images, H W map, A anchors per position, R anchors of an image over all levels, N boxes of an image.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from detectron2.structures import Instances
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..adapters import DetectorOutputs


def whole_maps(student: DetectorOutputs, targets: list[Instances], strides: Iterable[int]) -> list[Tensor]:
    """Return masks of all positions."""
    maps = [student.features[stride] for stride in strides]
    return [x.new_ones(x.shape[0], *x.shape[-2:], dtype=torch.float32) for x in maps]


def positive_positions(student: DetectorOutputs, targets: list[Instances], strides: Iterable[int]) -> list[Tensor]:
    """Return masks of positions with a positive anchor in the student's label assignment."""
    levels = student.dense.assignment_by_level
    return [
        (levels[stride] >= 0).unflatten(1, (*student.features[stride].shape[-2:], -1)).any(-1).float()
        for stride in strides
    ]


def negative_positions(student: DetectorOutputs, targets: list[Instances], strides: Iterable[int]) -> list[Tensor]:
    """Return masks of positions without a positive anchor."""
    return [1 - mask for mask in positive_positions(student, targets, strides)]


def inside_boxes(student: DetectorOutputs, targets: list[Instances], strides: Iterable[int]) -> list[Tensor]:
    """Return masks of positions whose center is inside a ground-truth box."""
    boxes_BN4 = pad_sequence([target.gt_boxes.tensor for target in targets], batch_first=True)  # padding is empty
    x1, y1, x2, y2 = boxes_BN4.unsqueeze(-1).unbind(2)
    masks = []
    for stride in strides:
        H, W = student.features[stride].shape[-2:]
        center_H, center_W = ((torch.arange(n, device=boxes_BN4.device) + 0.5) * stride for n in (H, W))
        in_columns_BNW = (x1 < center_W) & (center_W < x2)
        in_rows_BNH = (y1 < center_H) & (center_H < y2)
        with torch.autocast(boxes_BN4.device.type, enabled=False):
            boxes_BHW = torch.einsum("bnh,bnw->bhw", in_rows_BNH.float(), in_columns_BNW.float())
        masks.append(boxes_BHW.clamp(max=1))
    return masks
