"""A diffusion model of feature maps, which denoises other maps (Huang et al. 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import in_float32
from .batch_norm import BatchNormOverAllRanks

TIMES = 1000
"""Number of times t of the diffusion; at 0 the maps have almost no noise, at the last one almost nothing else."""


def signal_shares() -> Tensor:
    """Return the share of the maps' variance in noisy maps by time, (TIMES,): the products of 1 - beta, with linear beta (Ho et al. 2020)."""
    return (1 - torch.linspace(1e-4, 0.02, TIMES)).cumprod(0)


class Denoiser(nn.Module):
    """Diffusion model of maps of one level, and denoising by it with DDIM (Song et al. 2021).

    Args:
        channels: channels of the maps.
        steps: number of denoising steps, equally spaced in the first half of the times.
    """

    def __init__(self, channels: int, steps: int):
        super().__init__()
        self.noise = NoisePredictor(channels)
        self.share = SignalShare(channels)
        interval = TIMES // (2 * steps)
        self.times = [interval * step for step in reversed(range(steps))]
        shares = signal_shares()
        self.register_buffer("signal_shares", shares, persistent=False)
        before = [shares[time - interval].item() if time else 1.0 for time in self.times]
        self.coefficients = [*zip((shares[time].item() for time in self.times), before, strict=True)]

    def forward(self, maps: Tensor) -> Tensor:
        """Denoise maps (B, C, H, W).

        Noise is added first, in a proportion that the maps determine, so that they have the noise of the first step.
        """
        share = self.share(maps)[:, None, None, None]
        noisy = share * maps + (1 - share) * normal(maps)
        for time, (now, before) in zip(self.times, self.coefficients, strict=True):
            noise = self.noise(noisy, torch.full((len(maps),), time, device=maps.device))
            clean = (noisy - (1 - now) ** 0.5 * noise) / now**0.5
            noisy = before**0.5 * clean + (1 - before) ** 0.5 * noise
        return noisy

    def loss(self, clean: Tensor) -> Tensor:
        """Compute the mean squared error of the noise that the model predicts in maps (B, C, H, W) at random times."""
        times = (TIMES * torch.rand(len(clean), device=clean.device)).long()
        shares = self.signal_shares[times][:, None, None, None]
        noise = normal(clean)
        noisy = shares.sqrt() * clean + (1 - shares).sqrt() * noise
        return mean_squared_error(self.noise(noisy, times), noise)


mean_squared_error = in_float32(F.mse_loss)


def normal(maps: Tensor) -> Tensor:
    """Return random numbers of the standard normal distribution in the shape of maps."""
    return torch.randn(*maps.shape, dtype=maps.dtype, device=maps.device)


class NoisePredictor(nn.Module):
    """Predicts the noise in noisy maps: two bottleneck blocks and a 1x1 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.time_embedding = nn.Embedding(TIMES, channels)
        self.layers = nn.Sequential(
            Bottleneck(channels, reduction=4),
            Bottleneck(channels, reduction=4),
            nn.Conv2d(channels, channels, 1, bias=False),
            BatchNormOverAllRanks(channels),
        )

    def forward(self, noisy: Tensor, times: Tensor) -> Tensor:
        """Return the noise (B, C, H, W) in maps (B, C, H, W) at times (B,)."""
        return self.layers(noisy + self.time_embedding(times)[:, :, None, None])


class SignalShare(nn.Module):
    """Predicts from maps (B, C, H, W) in which proportion (B,) they are mixed with noise (adaptive noise matching)."""

    def __init__(self, channels: int):
        super().__init__()
        self.block = Bottleneck(channels, reduction=8)
        self.logits = nn.Linear(channels, 2)

    def forward(self, maps: Tensor) -> Tensor:
        return self.logits(self.block(maps).mean((2, 3))).softmax(1)[:, 0]


class Bottleneck(nn.Module):
    """Residual block of a 1x1, a 3x3 and a 1x1 convolution, each with batch normalization."""

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        inner = max(channels // reduction, 1)
        self.block = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False),
            BatchNormOverAllRanks(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            BatchNormOverAllRanks(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, channels, 1, bias=False),
            BatchNormOverAllRanks(channels),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.block(maps)
