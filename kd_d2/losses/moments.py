"""Second moments of pairs of tensors, for several levels at once, with few operators and saved tensors.

Shape suffix: N elements that remain of all levels after a reduction, one level after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .derivatives import first_derivative_only

Dims = tuple[int, ...]
Total = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks of a batch, and propagates the gradients of all of them."""


def alone(value: Tensor) -> Tensor:
    """Return the value: the sum of a single rank."""
    return value


def counts_over(maps: Sequence[Tensor], dims: Dims) -> Tensor:
    """Return the number of elements (N,) of each sum over `dims`, copied to the GPU without synchronization."""
    elements = [math.prod(_remaining(x, dims)) for x in maps]
    counts = [x.numel() // max(1, n) for x, n in zip(maps, elements, strict=True)]
    counts_S, elements_S = torch.tensor([counts, elements]).to(maps[0].device, non_blocking=True)
    return counts_S.repeat_interleave(elements_S, output_size=sum(elements)).to(maps[0].dtype)


def sums_over(maps: Sequence[Tensor], dims: Dims) -> Tensor:
    """Compute the sums (N,) over `dims` of the tensors of all levels."""
    return torch.cat([x.sum(dims).flatten() for x in maps])


def central_moments(
    student: Sequence[Tensor], teacher: Sequence[Tensor], dims: Dims, total: Total = alone
) -> tuple[Tensor, Tensor]:
    """Compute sums over `dims` of both detectors' squared deviations from their means, and of the deviations' product.

    Gradients flow only to the student. Both return values are the same on all ranks.

    Args:
        student, teacher: tensors of the levels, equal in shape level by level, in at least float32.
        total: sums a tensor over all ranks and propagates the gradients of all of them.

    Returns:
        The sums (3, N) and the number of elements of each, (N,), at least 1.
    """
    counts_N = counts_over(student, dims)
    with torch.no_grad():
        sums_3N = total(torch.stack([sums_over(student, dims), sums_over(teacher, dims), counts_N]))
    counts_N = sums_3N[2].clamp(min=1)
    maps = (*student, *(x.detach() for x in teacher))
    return _CentralSums.apply(dims, total, sums_3N[:2] / counts_N, counts_N, *maps), counts_N


class _CentralSums(torch.autograd.Function):
    """(dims, total, means (2, N), counts (N,), student's tensors, teacher's tensors) -> sums (3, N) of all ranks.

    The backward pass repeats the subtraction of the means, which is cheaper than storing deviations.
    """

    @staticmethod
    def forward(ctx, dims: Dims, total: Total, means_2N: Tensor, counts_N: Tensor, *maps: Tensor) -> Tensor:
        levels = []
        for ours, theirs in _deviations(maps, means_2N, dims):
            residuals = ours.sum(dims), theirs.sum(dims)
            own = ours.square().sum(dims)
            levels.append((own, ours.mul_(theirs).sum(dims), theirs.square_().sum(dims), *residuals))
        own_N, both_N, other_N, *residuals = (torch.cat([x.flatten() for x in of]) for of in zip(*levels, strict=True))
        sums_5N = total(torch.stack([own_N, other_N, both_N, *residuals]))
        ctx.dims, ctx.total = dims, total
        # The rounding errors of the means, which matter if they are not much smaller than the deviations.
        errors_2N = sums_5N[3:] / counts_N
        ctx.save_for_backward(means_2N, errors_2N, *maps)
        squares_2N = (sums_5N[:2] - sums_5N[3:] * errors_2N).clamp(min=0)
        products_N = sums_5N[2] - sums_5N[3] * errors_2N[1]
        return torch.cat([squares_2N, products_N[None]])

    @staticmethod
    @first_derivative_only
    def backward(ctx, gradient_3N: Tensor) -> tuple[Tensor | None, ...]:
        means_2N, errors_2N, *maps = ctx.saved_tensors
        gradient_3N = ctx.total(gradient_3N)
        # By the student's tensor: 2 * g[0] * (S - mean_S) + g[2] * (T - mean_T).
        own_N, other_N = gradient_3N[0] * 2, gradient_3N[2]
        shift_N = torch.addcmul(own_N * errors_2N[0], other_N, errors_2N[1]).neg_()
        factors = split_levels(torch.stack([shift_N, own_N, other_N]), maps[: len(maps) // 2], ctx.dims)
        gradients = [
            torch.addcmul(shift, ours, own).addcmul_(theirs, other)
            for (ours, theirs), (shift, own, other) in zip(_deviations(maps, means_2N, ctx.dims), factors, strict=True)
        ]
        return None, None, None, None, *gradients, *(None for _ in gradients)


def split_levels(values: Tensor, maps: Sequence[Tensor], dims: Dims) -> list[list[Tensor]]:
    """Return the values (V, N) of each level, V tensors that broadcast to the level's tensor."""
    shapes = [_remaining(x, dims) for x in maps]
    parts = values.split([math.prod(shape) for shape in shapes], 1)
    return [[x.view(shape) for x in part] for part, shape in zip(parts, shapes, strict=True)]


def _remaining(x: Tensor, dims: Dims) -> list[int]:
    return [1 if dim in dims else size for dim, size in enumerate(x.shape)]


def _deviations(maps: Sequence[Tensor], means_2N: Tensor, dims: Dims) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the deviations of student and teacher of each level from their means."""
    student, teacher = maps[: len(maps) // 2], maps[len(maps) // 2 :]
    for ours, theirs, (own_mean, other_mean) in zip(
        student, teacher, split_levels(means_2N, student, dims), strict=True
    ):
        yield ours - own_mean, theirs - other_mean
