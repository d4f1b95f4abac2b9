"""Counts over all workers of a training."""

import torch
from detectron2.utils import comm
from torch import Tensor


def mean_of_workers(value: Tensor) -> Tensor:
    """The mean of a tensor over all workers."""
    if comm.get_world_size() == 1:
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value / comm.get_world_size()


def mean_count_of_workers(count: Tensor) -> Tensor:
    """What a loss divides by: the mean of all workers' counts; all of them together are at least 1.

    Gradients are averaged over workers, so this is the divisor of one process with the whole batch.
    """
    return mean_of_workers(count).clamp(min=1 / comm.get_world_size())


def mean_with_own_gradient(value: Tensor) -> Tensor:
    """The mean of a tensor over all workers, of whose gradient each worker has its own value's.

    What a loss makes of such means is the same on all workers, and its gradients, which are averaged over workers, are those of one
    process with the whole batch. Nothing is sent in the backward pass.
    """
    own = value.detach()
    return value + (mean_of_workers(own) - own)
