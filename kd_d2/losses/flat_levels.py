"""Feature maps of several levels with all their positions in one dimension, for few operators over many maps.

Shape suffixes: B images, C channels, H W map, S levels, L positions of all levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def flatten_levels(maps: Sequence[Tensor]) -> Tensor:
    """Concatenate maps (B, C, H, W) over their positions, (B, C, L)."""
    return torch.cat([x.flatten(2) for x in maps], 2)


class FlatLevels:
    """Which of L positions belong to which of S levels, and reductions over the positions of each level.

    Args:
        sizes: height and width of each level.
        like: tensor whose device and dtype, promoted to at least float32, are used.

    Attributes:
        member_SL: 1 for the positions of a level, otherwise 0.
        lengths_S1: number of positions of each level.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], like: Tensor):
        dtype = torch.promote_types(like.dtype, torch.float32)
        lengths_S1 = torch.tensor([height * width for height, width in sizes])[:, None]
        ends_S1 = lengths_S1.cumsum(0)
        # Computed on the CPU and copied without blocking, so that the GPU is not synchronized.
        bounds_2S1 = torch.stack([ends_S1 - lengths_S1, ends_S1]).to(like.device, non_blocking=True)
        self.lengths_S1 = lengths_S1.to(like.device, dtype, non_blocking=True)
        position_L = torch.arange(sum(height * width for height, width in sizes), device=like.device)
        is_member_SL = (bounds_2S1[0] <= position_L) & (position_L < bounds_2S1[1])
        self.member_SL = is_member_SL.to(dtype)
        self._outside_SL = torch.zeros_like(self.member_SL).masked_fill_(~is_member_SL, -torch.inf)

    @classmethod
    def of(cls, maps: Sequence[Tensor]) -> FlatLevels:
        return cls([tuple(x.shape[-2:]) for x in maps], maps[0])

    def softmax(self, scores: Tensor) -> Tensor:
        """Compute the softmax over the positions of each level, (B, S, L), of scores (B, S, L) or (B, 1, L)."""
        return (scores + self._outside_SL).softmax(2)

    def sum(self, x_BCL: Tensor) -> Tensor:
        """Compute the sum over the positions of each level, (B, S, C), without autocast."""
        with torch.autocast(x_BCL.device.type, enabled=False):
            return self.member_SL @ x_BCL.transpose(1, 2)

    def select(self, x_BSL: Tensor) -> Tensor:
        """Return the values (B, L) of each position's own level."""
        return (x_BSL * self.member_SL).sum(1)

    def expand(self, x_BS: Tensor) -> Tensor:
        """Repeat the value of each level at its positions, (B, L), without autocast."""
        with torch.autocast(x_BS.device.type, enabled=False):
            return x_BS @ self.member_SL
