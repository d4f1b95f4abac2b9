"""What an instance query says: its class, roughly where and roughly how large; never its exact box."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .queries import InstanceQueries

TEMPERATURE = 10000.0
SIZE_BINS = 5
SMALLEST_BIN_LOG2 = 5  # sides below 64 px are in the first bin, from 512 px in the last


def sine_waves(position: Tensor, num_waves: int) -> tuple[Tensor, Tensor]:
    """Sines and cosines of 2 pi * position at `num_waves` wavelengths from 1 to TEMPERATURE (Vaswani et al. 2017).

    Args:
        position: any shape, in parts of the image.

    Returns:
        sines and cosines, (..., num_waves) each.
    """
    scale = TEMPERATURE ** -(torch.arange(num_waves, device=position.device, dtype=torch.float32) / num_waves)
    angle = position.float()[..., None] * (2 * math.pi) * scale
    return angle.sin(), angle.cos()


def size_bins(pixels: Tensor) -> Tensor:
    """Bins of box sides in pixels: below 64, 128, 256, 512, and from 512 on."""
    exponents = torch.floor(torch.log2(pixels)) - SMALLEST_BIN_LOG2
    return exponents.clamp(0, SIZE_BINS - 1).long()


class InstanceEncoder(nn.Module):
    """Turns instance queries into vectors (ICD's E).

    Args:
        num_classes: K.
        dim: of the vectors; the center's sine embedding has as many.
    """

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.num_classes = num_classes
        self.dim = dim
        self.mlp = mlp(num_classes + dim + 2 * SIZE_BINS, dim, dim)

    def describe(self, queries: InstanceQueries) -> Tensor:
        """(B, Q, K + dim + 10): one-hot class, embedding of the jittered center (x, then y), one-hot bins of width and height."""
        num_waves = self.dim // 4
        x, y = (sine_waves(queries.centers[..., i], num_waves) for i in (0, 1))
        pixels = queries.boxes[..., 2:] * queries.image_sizes.flip(1)[:, None]
        bins = F.one_hot(size_bins(pixels), SIZE_BINS).flatten(-2)
        return torch.cat([F.one_hot(queries.classes, self.num_classes), *x, *y, bins], -1)

    def forward(self, queries: InstanceQueries) -> Tensor:
        """(B, Q, dim)."""
        return self.mlp(self.describe(queries))


def mlp(dim_in: int, dim: int, dim_out: int) -> nn.Sequential:
    """Three linear layers with ReLU between."""
    return nn.Sequential(linear(dim_in, dim), nn.ReLU(), linear(dim, dim), nn.ReLU(), linear(dim, dim_out))


def linear(dim_in: int, dim_out: int) -> nn.Linear:
    """With Xavier's weights and zero bias."""
    layer = nn.Linear(dim_in, dim_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
