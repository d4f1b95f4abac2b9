"""Counts over all workers of a training."""

import torch
from detectron2.utils import comm
from torch import Tensor


def mean_count_of_workers(count: Tensor) -> Tensor:
    """What a loss divides by: the mean of all workers' counts, at least 1.

    Gradients are averaged over workers, so this is the divisor of one process with the whole batch.
    """
    if comm.get_world_size() > 1:
        count = count.clone()
        torch.distributed.all_reduce(count)
        count /= comm.get_world_size()
    return count.clamp(min=1)
