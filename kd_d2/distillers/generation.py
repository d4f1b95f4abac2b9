"""Masked generation (Yang et al. 2022), which MGD and IMA share: positions are hidden at random and filled in again."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def random_mask(maps: Tensor, ratio: float) -> Tensor:
    """(B, H, W) of zeros, each with probability `ratio`, and ones, for maps (B, C, H, W)."""
    return (torch.rand(len(maps), *maps.shape[-2:], device=maps.device) >= ratio).to(maps.dtype)


def generation_blocks(channels: dict[int, int]) -> nn.ModuleDict:
    """By stride what fills hidden positions in: two 3x3 convolutions with a ReLU between, of that stride's channels."""
    return nn.ModuleDict({str(stride): _block(number) for stride, number in channels.items()})


def _block(channels: int) -> nn.Sequential:
    layers = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
    return nn.Sequential(next(layers), nn.ReLU(inplace=True), next(layers))
