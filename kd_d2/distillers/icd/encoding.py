"""Encoding of instance queries: class, approximate location and approximate size, but never the exact box."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .queries import InstanceQueries

TEMPERATURE = 10000.0
SIZE_BINS = 5
SMALLEST_BIN_LOG2 = 5  # sides below 64 px are in the first bin, those of at least 512 px in the last


def sine_waves(position: Tensor, num_waves: int) -> Tensor:
    """Embed positions in sines and cosines of 2 pi * position at `num_waves` wavelengths, 1 to TEMPERATURE.

    See Vaswani et al. 2017.

    Args:
        position: any shape, as fractions of the image.

    Returns:
        Sine and cosine of each wavelength, (..., num_waves, 2).
    """
    scale = TEMPERATURE ** -(torch.arange(num_waves, device=position.device, dtype=torch.float32) / num_waves)
    angle = position.float()[..., None] * (2 * math.pi) * scale
    return torch.stack([angle.sin(), angle.cos()], -1)


def size_bins(pixels: Tensor) -> Tensor:
    """Return the bins of box sides in pixels: below 64, 128, 256, 512, and at least 512."""
    exponents = torch.floor(torch.log2(pixels)) - SMALLEST_BIN_LOG2
    return exponents.clamp(0, SIZE_BINS - 1).long()


class InstanceEncoder(nn.Module):
    """Encodes instance queries as vectors (ICD's E).

    Args:
        num_classes: K.
        dim: dimension of the vectors, and of the sine embedding of the center.
    """

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.num_classes = num_classes
        self.dim = dim
        self.mlp = mlp(num_classes + dim + 2 * SIZE_BINS, dim, dim)

    def describe(self, queries: InstanceQueries) -> Tensor:
        """Return one-hot class, embedding of jittered x, then y, and one-hot size bins (w, h): (B, Q, K + dim + 10)."""
        centers = sine_waves(queries.centers, self.dim // 4).transpose(-2, -1).flatten(-3)
        pixels = queries.boxes[..., 2:] * queries.image_sizes.flip(1)[:, None]
        bins = F.one_hot(size_bins(pixels), SIZE_BINS).flatten(-2)
        return torch.cat([F.one_hot(queries.classes, self.num_classes), centers, bins], -1)

    def forward(self, queries: InstanceQueries) -> Tensor:
        """Return encoded queries (B, Q, dim)."""
        return self.mlp(self.describe(queries))


def mlp(dim_in: int, dim: int, dim_out: int) -> nn.Sequential:
    """Build three linear layers with ReLU in between."""
    return nn.Sequential(linear(dim_in, dim), nn.ReLU(), linear(dim, dim), nn.ReLU(), linear(dim, dim_out))


def linear(dim_in: int, dim_out: int) -> nn.Linear:
    """Build a linear layer with Xavier-initialized weights and zero bias."""
    layer = nn.Linear(dim_in, dim_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
