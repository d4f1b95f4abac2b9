"""Means, counts and sums across the ranks of a training."""

import torch
from detectron2.utils import comm
from torch import Tensor

from .moved import explain_names


def mean_across_ranks(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks."""
    if comm.get_world_size() == 1:
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value / comm.get_world_size()


def mean_count_across_ranks(count: Tensor) -> Tensor:
    """Return the divisor of a loss: the mean of a count over all ranks, with a total of at least 1.

    Gradients are averaged across ranks, so this corresponds to one process with the whole batch.
    """
    return mean_across_ranks(count).clamp(min=1 / comm.get_world_size())


def count_of(rows: Tensor) -> Tensor:
    """Return the number of rows averaged across ranks, for use as a divisor: see `mean_count_across_ranks`."""
    return mean_count_across_ranks(rows.new_full((), len(rows), dtype=torch.float32))


def sum_across_ranks(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, with gradients flowing from all ranks.

    All ranks must call it, and its backward pass, equally often and in the same order.
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


__getattr__ = explain_names(__name__)
