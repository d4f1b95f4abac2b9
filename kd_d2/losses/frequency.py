"""Haar wavelets, and the loss of FreeKD (Zhang et al. 2024), which compares details of feature maps.

Shape suffixes: B images, C channels, H W map, h w map of a scale, 3 orientations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import check_same_shape


def haar_transform(maps_BCHW: Tensor, scales: int) -> tuple[Tensor, list[Tensor]]:
    """Compute the discrete wavelet transform with the orthonormal Haar wavelet, where maps of odd size end with a zero.

    Returns:
        the approximation (B, C, h, w) at the coarsest scale, and the details (B, C, 3, h, w) of each scale from the
        finest on: differences of rows, of columns, and of both. Each scale halves the size, rounded up.
    """
    approximation, details = maps_BCHW, []
    for _ in range(scales):
        height, width = approximation.shape[-2:]
        if height % 2 or width % 2:
            approximation = F.pad(approximation, (0, width % 2, 0, height % 2))
        above, below = approximation[..., 0::2, :], approximation[..., 1::2, :]
        low_and_high = torch.stack([above + below, above - below], 2) / 2
        left, right = low_and_high[..., 0::2], low_and_high[..., 1::2]
        sums, differences = left + right, left - right
        approximation = sums[:, :, 0]
        details.append(torch.cat([sums[:, :, 1:], differences], 2))
    return approximation, details


def inverse_haar_transform(approximation: Tensor, details: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Compute the maps (B, C, H, W) of which `haar_transform` makes the approximation and details.

    Args:
        size: H and W.
    """
    for number in reversed(range(len(details))):
        height, width = details[number - 1].shape[-2:] if number else size
        rows, columns, both = details[number].unbind(2)
        low = _interleave((approximation + columns) / 2, (approximation - columns) / 2, -1)
        high = _interleave((rows + both) / 2, (rows - both) / 2, -1)
        approximation = _interleave(low + high, low - high, -2)[..., :height, :width]
    return approximation


def _interleave(even: Tensor, odd: Tensor, dim: int) -> Tensor:
    return torch.stack([even, odd], dim).flatten(dim - 1, dim)


def detail_loss(student_BCHW: Tensor, teacher_BCHW: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Compute the mean absolute difference of the maps' details, each multiplied by a mask, and its sum over scales.

    Gradients flow only to the student's features. Computed in at least float32.

    Args:
        masks: (B, 1, h, w) for each scale of `haar_transform`.

    Raises:
        ValueError: the features differ in shape.
    """
    check_same_shape(student_BCHW, teacher_BCHW)
    dtype = torch.promote_types(student_BCHW.dtype, torch.float32)
    _, details = haar_transform(student_BCHW.to(dtype) - teacher_BCHW.detach().to(dtype), len(masks))
    return sum(
        (mask.detach().to(dtype).unsqueeze(2) * difference.abs()).mean()
        for mask, difference in zip(masks, details, strict=True)
    )
