"""A diffusion model of feature maps, which denoises other maps (Huang et al. 2023)."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import in_float32
from .batch_norm import BatchNormWithoutState

TIMES = 1000
"""Number of times t of the diffusion; at 0 the maps have almost no noise, at the last one almost nothing else."""


def signal_shares() -> Tensor:
    """Return the share of the maps' variance in noisy maps by time, (TIMES,): the products of 1 - beta, with linear beta (Ho et al. 2020)."""
    return (1 - torch.linspace(1e-4, 0.02, TIMES)).cumprod(0)


def step_factors(now: float, before: float) -> tuple[float, float]:
    """Return the factors of noisy maps and of their noise in a step of DDIM (Song et al. 2021, equation 12 without random noise).

    The clean maps are (maps - sqrt(1 - now) * noise) / sqrt(now), and the result sqrt(before) * clean + sqrt(1 - before) * noise.

    Args:
        now, before: signal shares of the maps and of the result.
    """
    return (before / now) ** 0.5, (1 - before) ** 0.5 - (before * (1 - now) / now) ** 0.5


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
        shares = signal_shares()
        self.register_buffer("signal_shares", shares, persistent=False)
        interval = TIMES // (2 * steps)
        shares_by_step = [1.0, *shares[: interval * steps : interval].tolist()]
        self.factors = [step_factors(now, before) for before, now in pairwise(shares_by_step)][::-1]

    def forward(self, maps: Tensor) -> Tensor:
        """Denoise maps (B, C, H, W).

        Noise is added first, in a proportion that the maps determine, so that they have the noise of the first step.
        """
        share = self.share(maps)[:, None, None, None]
        noisy = share * maps + (1 - share) * normal(maps)
        for of_maps, of_noise in self.factors:
            noisy = torch.add(of_maps * noisy, self.noise(noisy), alpha=of_noise)
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
    """Predicts the noise in noisy maps: two bottleneck blocks and a 1x1 convolution.

    The embedding of a time is added to all positions. Batch normalization behind each convolution removes it if all images have
    the same time, so that it is needed only for different ones.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.time_embedding = nn.Embedding(TIMES, channels)
        self.layers = nn.Sequential(
            Bottleneck(channels, reduction=4),
            Bottleneck(channels, reduction=4),
            nn.Conv2d(channels, channels, 1, bias=False),
            BatchNormWithoutState(channels),
        )

    def forward(self, noisy: Tensor, times: Tensor | None = None) -> Tensor:
        """Return the noise (B, C, H, W) in maps (B, C, H, W) at times (B,); None if they are equal."""
        return self.layers(noisy if times is None else noisy + self.time_embedding(times)[:, :, None, None])


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
            BatchNormWithoutState(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            BatchNormWithoutState(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, channels, 1, bias=False),
            BatchNormWithoutState(channels),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.block(maps)
