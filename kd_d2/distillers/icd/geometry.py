"""Positions of feature levels in images padded to a common size.

Shape suffixes: B images, L positions over all levels, H W map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .encoding import sine_waves

POSITION_EPS = 1e-6

Size = tuple[int, int]
"""Height and width."""


@dataclass
class LevelGeometry:
    """
    Attributes:
        shapes: sizes of the levels in cells.
        extents: per level, the rows and columns (B, 2) of each image that are not padding.
        is_valid: (B, L) bool, false at padding; None if no image is padded.
    """

    shapes: list[Size]
    extents: list[Tensor]
    is_valid: Tensor | None

    @classmethod
    def of(cls, maps: list[Tensor], image_sizes: list[Size], padded_size: Size) -> LevelGeometry:
        """
        Args:
            maps: the levels (B, C, H, W).
            image_sizes: sizes of the images in pixels, without padding.
            padded_size: padded size of the batch in pixels.
        """
        shapes = [tuple(m.shape[-2:]) for m in maps]
        extents = [[_valid_cells(size, shape, padded_size) for size in image_sizes] for shape in shapes]
        is_padded = any(extent != shape for level, shape in zip(extents, shapes, strict=True) for extent in level)
        # Computed on the host to avoid synchronizing the device.
        extents = [torch.tensor(level).to(maps[0].device, non_blocking=True) for level in extents]
        masks = [_mask(extent, shape) for extent, shape in zip(extents, shapes, strict=True)] if is_padded else []
        return cls(shapes, extents, torch.cat(masks, 1) if is_padded else None)

    def row_waves(self, num_waves: int) -> list[Tensor]:
        """Return the sine embedding of each row of each level, (B, H, 2 * num_waves)."""
        return [_waves(H, extent[:, 0], num_waves) for (H, _), extent in zip(self.shapes, self.extents, strict=True)]

    def column_waves(self, num_waves: int) -> list[Tensor]:
        """Return the sine embedding of each column of each level, (B, W, 2 * num_waves)."""
        return [_waves(W, extent[:, 1], num_waves) for (_, W), extent in zip(self.shapes, self.extents, strict=True)]


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


def _waves(length: int, num_valid_B: Tensor, num_waves: int) -> Tensor:
    """Embed positions, which count from 1, as fractions of the valid length; sines and cosines alternate."""
    number = torch.arange(1, length + 1, device=num_valid_B.device)
    waves = sine_waves(number / (num_valid_B[:, None] + POSITION_EPS), num_waves)
    return torch.stack(waves, -1).flatten(-2)
