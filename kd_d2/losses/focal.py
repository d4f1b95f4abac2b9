"""Focal weights inside and outside boxes, and errors weighted by attention, for FGD (Yang et al. 2022)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

CHUNK = 2**22
"""Elements of the largest tensor in `foreground_weights`."""


@torch.no_grad()
def foreground_weights(boxes: Tensor, height: int, width: int) -> Tensor:
    """Compute weights (B, H, W): at each position the largest 1 / area of the boxes that contain it, 0 if none does.

    A box contains the positions from floor of its first to ceil of its second corner, inclusive; its area is their
    number, even outside the map. There is no GPU synchronization, and memory does not grow with the boxes.

    Args:
        boxes: (B, N, 4) as x1, y1, x2, y2 in cells of the map; padding boxes are to the left of or above it.
        height, width: size of the map.
    """
    B, N = boxes.shape[:2]
    low_BN2, high_BN2 = boxes[..., :2].floor(), boxes[..., 2:].ceil()
    value_BN = (high_BN2 - low_BN2 + 1).prod(-1).reciprocal()
    columns, rows = (torch.arange(n, device=boxes.device) for n in (width, height))
    in_columns_BNW, in_rows_BNH = (
        (low_BN2[..., axis, None] <= cells) & (cells <= high_BN2[..., axis, None])
        for axis, cells in enumerate((columns, rows))
    )
    value_BNH = value_BN[..., None] * in_rows_BNH
    step = max(1, CHUNK // (B * height * width))
    chunks = (slice(first, first + step) for first in range(0, N, step))
    largest = ((value_BNH[:, n, :, None] * in_columns_BNW[:, n, None]).amax(1) for n in chunks)
    return functools.reduce(torch.maximum, largest) if N else boxes.new_zeros(B, height, width)


@torch.no_grad()
def background_weights(foreground: Tensor) -> Tensor:
    """Compute weights (B, H, W): outside all boxes, 1 over the number of such positions in the image; else 0.

    Args:
        foreground: (B, H, W), see `foreground_weights`.
    """
    outside = (foreground == 0).to(foreground.dtype)
    return outside / outside.sum((1, 2), keepdim=True).clamp(min=1)


def attended_error(student: Tensor, teacher: Tensor, channels: Tensor) -> Tensor:
    """Compute the sum over channels of attention * (F_S - F_T)^2, (B, H, W).

    Args:
        student, teacher: (B, C, H, W); gradients flow only to the student.
        channels: attention (B, C, 1, 1).
    """
    return attended_square(student - teacher.detach(), channels)


def attended_square(difference: Tensor, channels: Tensor) -> Tensor:
    """Compute `attended_error` from F_S - F_T."""
    return torch.linalg.vector_norm(difference * channels.sqrt(), dim=1).square()
