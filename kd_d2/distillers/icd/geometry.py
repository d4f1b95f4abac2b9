"""Positions of feature levels in images padded to a common size.

Shape suffixes: B images, L positions over all levels, H W map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

POSITION_EPS = 1e-6

Size = tuple[int, int]
"""Height and width."""


@dataclass
class LevelGeometry:
    """
    Attributes:
        shapes: sizes of the levels in cells.
        rows, columns: positions of the rows and columns of all levels, (B, sum of H) and (B, sum of W), which count from 1,
            as fractions of the rows and columns of each image that are not padding.
        is_valid: (B, L) bool, false at padding; None if no image is padded.
    """

    shapes: list[Size]
    rows: Tensor
    columns: Tensor
    is_valid: Tensor | None

    @classmethod
    def of(cls, maps: list[Tensor], image_sizes: list[Size], padded_size: Size) -> LevelGeometry:
        """
        Args:
            maps: the levels (B, C, H, W).
            image_sizes: sizes of the images in pixels, without padding.
            padded_size: padded size of the batch in pixels.
        """
        shapes, device = [tuple(m.shape[-2:]) for m in maps], maps[0].device
        extents = [[_valid_cells(size, shape, padded_size) for size in image_sizes] for shape in shapes]
        is_padded = any(extent != shape for level, shape in zip(extents, shapes, strict=True) for extent in level)
        # Computed on the host to avoid synchronizing the device.
        extents = [torch.tensor(level) for level in extents]
        fractions = (
            torch.cat([_fractions(s[axis], e[:, axis]) for s, e in zip(shapes, extents, strict=True)], 1)
            for axis in (0, 1)
        )
        rows, columns = (x.to(device, non_blocking=True) for x in fractions)
        if not is_padded:
            return cls(shapes, rows, columns, None)
        masks = [_mask(e.to(device, non_blocking=True), shape) for e, shape in zip(extents, shapes, strict=True)]
        return cls(shapes, rows, columns, torch.cat(masks, 1))

    def by_level(self, of_rows: Tensor, of_columns: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Split values of `rows` (B, sum of H, ...) and `columns` by level."""
        heights, widths = zip(*self.shapes, strict=True)
        return list(of_rows.split(heights, 1)), list(of_columns.split(widths, 1))


def _valid_cells(image_size: Size, shape: Size, padded_size: Size) -> Size:
    """Return the number of rows and of columns whose first pixel is in the image."""
    axes = zip(image_size, shape, padded_size, strict=True)
    return tuple(-(-pixels * cells // whole) for pixels, cells, whole in axes)


def _mask(extents_B2: Tensor, shape: Size) -> Tensor:
    """Return whether each position is valid, (B, H * W)."""
    rows, columns = (
        torch.arange(length, device=extents_B2.device) < extents_B2[:, axis, None] for axis, length in enumerate(shape)
    )
    return (rows[:, :, None] & columns[:, None]).flatten(1)


def _fractions(length: int, num_valid_B: Tensor) -> Tensor:
    return torch.arange(1, length + 1) / (num_valid_B[:, None] + POSITION_EPS)
