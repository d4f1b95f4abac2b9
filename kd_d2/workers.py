"""Counts and sums over all workers of a training."""

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


def sum_of_workers(value: Tensor) -> Tensor:
    """The sum of a tensor over all workers, which gradients of all workers flow through.

    All workers call it, and its backward pass, equally often and in the same order.
    """
    return value if comm.get_world_size() == 1 else _SumOfWorkers.apply(value)


class _SumOfWorkers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        value = value.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _SumOfWorkers.forward(ctx, gradient)
