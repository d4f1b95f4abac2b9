"""Masked generation (Yang et al. 2022), which MGD and IMA share: positions are hidden at random and filled in again."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def random_mask(maps: Tensor, ratio: float) -> Tensor:
    """(B, H, W) of zeros, each with probability `ratio`, and ones, for maps (B, C, H, W)."""
    return (torch.rand(len(maps), *maps.shape[-2:], device=maps.device) >= ratio).to(maps.dtype)


def generation_blocks(channels: dict[int, int], residual: bool = False) -> nn.ModuleDict:
    """By stride what fills hidden positions in: two 3x3 convolutions with a ReLU between, of that stride's channels.

    A residual block adds what they give to its input; its second convolution starts at zero, so that it starts as the identity.
    """
    block = ResidualBlock if residual else GenerationBlock
    return nn.ModuleDict({str(stride): block(number) for stride, number in channels.items()})


class GenerationBlock(nn.Sequential):
    """Two 3x3 convolutions with a ReLU between."""

    def __init__(self, channels: int):
        first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        super().__init__(first, nn.ReLU(inplace=True), second)


class ResidualBlock(GenerationBlock):
    """A generation block that adds its output to its input, and starts as the identity."""

    def __init__(self, channels: int):
        super().__init__(channels)
        nn.init.zeros_(self[2].weight)
        nn.init.zeros_(self[2].bias)

    def forward(self, maps: Tensor) -> Tensor:
        return maps + super().forward(maps)
