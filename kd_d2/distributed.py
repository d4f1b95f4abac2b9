"""Means, counts and sums across the ranks of a training."""

import torch
from detectron2.utils import comm
from torch import Tensor


def mean_across_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all ranks."""
    if comm.get_world_size() == 1:
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value / comm.get_world_size()


def mean_count_across_ranks(count: Tensor) -> Tensor:
    """What a loss divides by: the mean of all ranks' counts; all of them together are at least 1.

    Gradients are averaged across ranks, so this is the divisor of one process with the whole batch.
    """
    return mean_across_ranks(count).clamp(min=1 / comm.get_world_size())


def mean_across_ranks_with_local_gradient(value: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, of whose gradient each rank has its own value's.

    What a loss makes of such means is the same on all ranks, and its gradients, which are averaged across ranks, are those of one
    process with the whole batch. Nothing is sent in the backward pass.
    """
    own = value.detach()
    return value + (mean_across_ranks(own) - own)


def sum_across_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, which gradients of all ranks flow through.

    All ranks call it, and its backward pass, equally often and in the same order.
    """
    return value if comm.get_world_size() == 1 else _SumAcrossRanks.apply(value)


class _SumAcrossRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        value = value.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _SumAcrossRanks.forward(ctx, gradient)
