"""Gaussian blur of feature maps as products with matrices."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from kornia.filters import get_gaussian_kernel1d
from torch import Tensor

NEGLIGIBLE = 1e-16
"""Weights that even float64's rounding swallows are zero: in float32 some would be denormal numbers, which CPUs multiply slowly."""


def gaussian_blur(maps: Tensor, window_size: int, sigma: float) -> Tensor:
    """Maps (..., H, W) blurred by a Gaussian window, borders reflected (kornia's kernel and padding).

    Args:
        window_size: side of the window in cells, odd, at most 2 * min(H, W) - 1.
        sigma: in cells.
    """
    rows, columns = (blur_matrix(side, window_size, sigma, maps.dtype, maps.device) for side in maps.shape[-2:])
    return rows @ maps @ columns.T


@lru_cache(maxsize=512)
@torch.inference_mode(False)  # it is kept, perhaps for a training after this
def blur_matrix(side: int, window_size: int, sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The blur of a line of `side` cells with reflected ends as a (side, side) matrix; its transpose is the adjoint."""
    kernel = get_gaussian_kernel1d(window_size, sigma, dtype=torch.float64)
    kernel.masked_fill_(kernel < NEGLIGIBLE, 0)
    half = window_size // 2
    impulses = torch.eye(side, dtype=torch.float64)[:, None]
    responses = F.conv1d(F.pad(impulses, (half, half), mode="reflect"), kernel[None])
    return responses[:, 0].T.to(device, dtype).contiguous()
