"""Anchors of torchvision's detectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling import ANCHOR_GENERATOR_REGISTRY
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes
from torch import Tensor


@ANCHOR_GENERATOR_REGISTRY.register()
class TorchvisionAnchorGenerator(DefaultAnchorGenerator):
    """Anchors of torchvision's detectors, with integer coordinates and strides that depend on the size of the image.

    The stride of a feature map is the side of the padded image divided by that of the map, rounded down: with a side of
    800 pixels, a map of 13 cells has a stride of 61 pixels instead of 64.
    """

    def generate_cell_anchors(
        self, sizes: Sequence[float] = (32, 64, 128, 256, 512), aspect_ratios: Sequence[float] = (0.5, 1, 2)
    ) -> Tensor:
        return super().generate_cell_anchors(sizes, aspect_ratios).round()

    def forward(self, features: list[Tensor]) -> list[Boxes]:
        """Return the anchors of each feature map; the first one must have its nominal stride."""
        height, width = (side * self.strides[0] for side in features[0].shape[-2:])
        anchors = []
        for feature, cell in zip(features, self.cell_anchors, strict=True):
            rows, columns = feature.shape[-2:]
            y = torch.arange(rows, dtype=torch.float32, device=cell.device) * (height // rows)
            x = torch.arange(columns, dtype=torch.float32, device=cell.device) * (width // columns)
            y, x = torch.meshgrid(y, x, indexing="ij")
            corners = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
            anchors.append(Boxes((corners + cell).reshape(-1, 4)))
        return anchors
