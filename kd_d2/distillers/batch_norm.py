"""Batch normalization over the images of all ranks, for layers of methods."""

from __future__ import annotations

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from ..distributed import sum_across_ranks
from ..errors import UserError


class BatchNormOverAllRanks(nn.BatchNorm2d):
    """Batch normalization that uses, in training, mean and variance over the positions of all ranks, of any number each."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or comm.get_world_size() == 1:
            return super().forward(input)
        maps = input.float()
        total = sum_across_ranks(torch.cat([maps.sum((0, 2, 3)), maps.new_full((1,), maps[:, 0].numel())]))
        mean, count = total[:-1] / total[-1], total[-1]
        centered = maps - mean[:, None, None]
        variance = sum_across_ranks(centered.square().sum((0, 2, 3))) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
                self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


class BatchNormWithoutState(BatchNormOverAllRanks):
    """`BatchNormOverAllRanks` without running statistics: evaluation normalizes by its own batch, a single value per channel to 0."""

    def __init__(self, channels: int):
        super().__init__(channels, track_running_stats=False)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training and input[:, 0].numel() == 1:
            return torch.zeros_like(input) + self.bias[:, None, None]
        return super().forward(input)


def check_positions(maps: Tensor, method: str, node: str) -> None:
    """Raise a UserError if maps (B, C, H, W) have only one value per channel, which cannot be normalized in training.

    Args:
        method: name of the method.
        node: its CONFIG_NODE, which has a key NUM_LEVELS.
    """
    if maps[:, 0].numel() * comm.get_world_size() == 1:
        raise UserError(
            f"{method} normalizes over the batch and positions of each level, but a level has only one position, of one image: use larger "
            f"images, several in a batch (SOLVER.IMS_PER_BATCH), or fewer levels (MODEL.KD.{node}.NUM_LEVELS)."
        )
