"""Anchors of a detector's anchor generator, computed on the device of its feature maps."""

from __future__ import annotations

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes
from torch import Tensor, nn


@torch.no_grad()
def grid_anchors(generator: nn.Module, maps: list[Tensor]) -> list[Boxes]:
    """Return the same anchors as `generator(maps)`.

    `DefaultAnchorGenerator` computes positions on the CPU and copies them to the GPU, which synchronizes the device.
    Here they are computed on the device of the maps. Other generators are called directly.
    """
    if type(generator) is not DefaultAnchorGenerator:
        return generator(maps)
    anchors = []
    for level, stride, cell_A4 in zip(maps, generator.strides, generator.cell_anchors, strict=True):
        start = generator.offset * stride
        rows_H, columns_W = (
            torch.arange(start, side * stride, step=stride, dtype=torch.float32, device=level.device)
            for side in level.shape[-2:]
        )
        y_HW, x_HW = torch.meshgrid(rows_H, columns_W, indexing="ij")
        position_L14 = torch.stack([x_HW, y_HW, x_HW, y_HW], dim=-1).view(-1, 1, 4)
        anchors.append(Boxes((position_L14 + cell_A4).reshape(-1, 4)))
    return anchors


@torch.no_grad()
def first_anchors(generator: nn.Module, strides: list[int]) -> dict[int, Tensor]:
    """Return the anchors (A, 4) of each level's first position by stride, in pixels, to compare sizes and positions."""
    cells = [torch.empty(1, 1, 1, 1) for _ in strides]
    return {stride: anchors.tensor for stride, anchors in zip(strides, generator(cells), strict=True)}
