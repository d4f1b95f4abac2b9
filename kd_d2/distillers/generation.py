"""Masked generation (Yang et al. 2022), shared by MGD and IMA: random positions are masked and regenerated."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

Residual = Annotated[
    bool, "Whether the generation network has a residual connection and starts as the identity; the paper's does not."
]


def random_mask(maps: Tensor, ratio: float) -> Tensor:
    """Return a mask (B, H, W) for maps (B, C, H, W): 0 with probability `ratio`, else 1."""
    return (torch.rand(len(maps), *maps.shape[-2:], device=maps.device) >= ratio).to(maps.dtype)


def generation_blocks(channels: dict[int, int], residual: bool = False) -> nn.ModuleDict:
    """Build a generation block per stride, two 3x3 convolutions with a ReLU in between, with that stride's channels.

    A residual block adds its input to its output; its last layer is zero-initialized, so it starts as the identity.
    """
    block = ResidualBlock if residual else GenerationBlock
    return nn.ModuleDict({str(stride): block(number) for stride, number in channels.items()})


class GenerationBlock(nn.Sequential):
    """Two 3x3 convolutions with a ReLU in between."""

    def __init__(self, channels: int):
        first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        super().__init__(first, nn.ReLU(inplace=True), second)


class ResidualBlock(GenerationBlock):
    """Generation block with a residual connection, which starts as the identity."""

    def __init__(self, channels: int):
        super().__init__(channels)
        nn.init.zeros_(self[2].weight)
        nn.init.zeros_(self[2].bias)

    def forward(self, maps: Tensor) -> Tensor:
        return maps + super().forward(maps)
