"""Focal weights inside and outside boxes, and errors weighted by attention, for FGD (Yang et al. 2022).

Shape suffixes: B images, C channels, H W map, N boxes, S levels, L positions of all levels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .flat_levels import FlatLevels
from .shapes import check_same_shape

CHUNK = 2**22
"""Elements of the largest tensor in `foreground_of_levels`."""


def foreground_weights(boxes: Tensor, height: int, width: int) -> Tensor:
    """Compute weights (B, H, W): at each position the largest 1 / area of the boxes that contain it, 0 if none does.

    A box contains the positions from floor of its first to ceil of its second corner, inclusive; its area is their
    number, even outside the map. There is no GPU synchronization, and memory does not grow with the boxes.

    Args:
        boxes: (B, N, 4) as x1, y1, x2, y2 in cells of the map; padding boxes are to the left of or above it.
        height, width: size of the map.
    """
    return foreground_of_levels(boxes[None], [(height, width)]).unflatten(1, (height, width))


@torch.no_grad()
def foreground_of_levels(boxes: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Compute `foreground_weights` of S levels, (B, L), from boxes (S, B, N, 4) in cells of each level."""
    _, B, N, _ = boxes.shape
    if not N:
        return boxes.new_zeros(B, sum(height * width for height, width in sizes))
    low_SBN2, high_SBN2 = boxes[..., :2].floor(), boxes[..., 2:].ceil()
    value_SBN = (high_SBN2 - low_SBN2 + 1).prod(-1).reciprocal()
    rows, columns = (torch.arange(max(lengths), device=boxes.device) for lengths in zip(*sizes, strict=True))
    in_columns_SBNW, in_rows_SBNH = (
        (low_SBN2[..., axis, None] <= cells) & (cells <= high_SBN2[..., axis, None])
        for axis, cells in enumerate((columns, rows))
    )
    value_SBNH = value_SBN[..., None] * in_rows_SBNH

    def of_level(height: int, width: int, value_BNH: Tensor, in_columns_BNW: Tensor) -> Tensor:
        step = max(1, CHUNK // (B * height * width))
        chunks = (slice(first, first + step) for first in range(0, N, step))
        largest = (
            (value_BNH[:, n, :height, None] * in_columns_BNW[:, n, None, :width]).amax(1).flatten(1) for n in chunks
        )
        return functools.reduce(torch.maximum, largest)

    return torch.cat([of_level(*size, *of) for size, *of in zip(sizes, value_SBNH, in_columns_SBNW, strict=True)], 1)


def background_weights(foreground: Tensor) -> Tensor:
    """Compute weights (B, H, W): outside all boxes, 1 over the number of such positions in the image; else 0.

    Computed in at least float32.

    Args:
        foreground: (B, H, W), see `foreground_weights`.
    """
    levels = FlatLevels.of([foreground])
    return background_of_levels(foreground.flatten(1), levels).view_as(foreground)


@torch.no_grad()
def background_of_levels(foreground_BL: Tensor, levels: FlatLevels) -> Tensor:
    """Compute `background_weights` of all levels, (B, L)."""
    outside_BL = (foreground_BL == 0).to(levels.member_SL.dtype)
    count_BS = levels.sum(outside_BL[:, None]).squeeze(2)
    return outside_BL / levels.expand(count_BS.clamp(min=1))


def attended_error(student: Tensor, teacher: Tensor, channels: Tensor) -> Tensor:
    """Compute the sum over channels of attention * (F_S - F_T)^2, (B, H, W).

    Args:
        student, teacher: (B, C, H, W); gradients flow only to the student.
        channels: attention (B, C, 1, 1).

    Raises:
        ValueError: the maps differ in shape.
    """
    check_same_shape(student, teacher)
    return (channels * (student - teacher.detach()).square()).sum(1)


def attended_square(difference_BCL: Tensor, channels_BSC: Tensor, levels: FlatLevels) -> Tensor:
    """Compute `attended_error` of all levels, (B, L), from F_S - F_T and the attention of each level."""
    return levels.select(channels_BSC @ difference_BCL.square())
