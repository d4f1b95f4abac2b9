"""Gaussian blur of feature maps as matrix products."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from kornia.filters import get_gaussian_kernel1d
from torch import Tensor

NEGLIGIBLE = 1e-16
"""Weights below it, lost in float64 rounding, are set to zero: some would be denormal in float32 and slow on CPUs."""


def gaussian_blur(maps: Tensor, window_size: int, sigma: float) -> Tensor:
    """Blur maps (..., H, W) with a Gaussian window and reflected borders (kornia's kernel and padding).

    Args:
        window_size: side of the window in cells, odd, at most 2 * min(H, W) - 1.
        sigma: standard deviation in cells.
    """
    rows, columns = (blur_matrix(side, window_size, sigma, maps.dtype, maps.device) for side in maps.shape[-2:])
    return rows @ maps @ columns.T


@lru_cache(maxsize=512)
@torch.inference_mode(False)  # the cached matrix may be used in training later
def blur_matrix(side: int, window_size: int, sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the (side, side) matrix that blurs a line with reflected ends; its transpose is the adjoint."""
    kernel = get_gaussian_kernel1d(window_size, sigma, dtype=torch.float64)
    kernel.masked_fill_(kernel < NEGLIGIBLE, 0)
    half = window_size // 2
    impulses = torch.eye(side, dtype=torch.float64)[:, None]
    responses = F.conv1d(F.pad(impulses, (half, half), mode="reflect"), kernel[None])
    return responses[:, 0].T.to(device, dtype).contiguous()
