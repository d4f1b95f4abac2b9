"""Alignment of channels to the mean and deviation of another detector's (CrossKD).

Shape suffix: N channels of all maps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .derivatives import first_derivative_only
from .moments import Total, alone, counts_over, split_levels, sums_over
from .shapes import check_same_shape

SQUARE_EPS = 1e-16
"""Variance up to which a channel counts as constant: the student's is aligned to the mean alone, without gradient."""
DEVIATION_EPS = 1e-6
POSITIONS = (0, 2, 3)


def with_statistics_of(student: Sequence[Tensor], teacher: Sequence[Tensor], total: Total = alone) -> list[Tensor]:
    """Align mean and deviation of each channel of the student's maps with the teacher's (CrossKD, Wang et al. 2024).

    (S - mean_S) / (deviation_S + 1e-6) * deviation_T + mean_T, over (B, H, W), with unbiased deviations. Gradients flow
    only to the student, including through its statistics. Constant channels have no gradient: two values are often equal
    in half precision, and the 1e-6 would multiply their gradient by up to 1e6. Computed in at least float32.

    Args:
        student, teacher: maps (B, C, H, W), equal in shape pair by pair.
        total: sums a tensor over all ranks of a batch that is distributed over several.

    Raises:
        ValueError: the maps of a pair differ in shape.
    """
    for pair in zip(student, teacher, strict=True):
        check_same_shape(*pair)
    dtype = torch.promote_types(student[0].dtype, torch.float32)
    maps = [*(x.to(dtype) for x in student), *(x.detach().to(dtype) for x in teacher)]
    return list(_Alignment.apply(total, *maps))


class _Alignment(torch.autograd.Function):
    """(total, student's maps, teacher's maps) -> aligned maps, with two sums across ranks; a third in the backward pass.

    The deviation of a single position is 0.
    """

    @staticmethod
    def forward(ctx, total: Total, *maps: Tensor) -> tuple[Tensor, ...]:
        sums, counts = total(torch.stack([sums_over(maps, POSITIONS), counts_over(maps, POSITIONS)]))
        means = sums / counts.clamp(min=1)
        centered = [x - mean for x, (mean,) in zip(maps, split_levels(means[None], maps, POSITIONS), strict=True)]
        student = centered[: len(maps) // 2]
        sums = total(sums_over([*(x.square() for x in centered), *student], POSITIONS))
        own_N, theirs_N, sum_N = sums.chunk(3)
        counts_N, mean_N = counts.chunk(2)[0], means.chunk(2)[1]
        degrees_N = (counts_N - 1).clamp(min=1)
        error_N = sum_N / counts_N.clamp(min=1)  # the rounding error of the student's mean
        variance_N = (own_N - sum_N * error_N) / degrees_N
        deviation_N = variance_N.clamp(min=SQUARE_EPS).sqrt()
        inverse_N = (deviation_N + DEVIATION_EPS).reciprocal().where(variance_N > SQUARE_EPS, 0)
        scale_N = (theirs_N / degrees_N).sqrt() * inverse_N
        # The gradient's factor of the student's deviations: -scale / ((deviation + 1e-6) * deviation * (n - 1))
        decay_N = -scale_N * inverse_N / (deviation_N * degrees_N)
        ctx.total = total
        ctx.save_for_backward(scale_N, decay_N, error_N, counts_N, *student)
        factors = split_levels(torch.stack([mean_N - error_N * scale_N, scale_N]), student, POSITIONS)
        return tuple(torch.addcmul(shift, x, scale) for x, (shift, scale) in zip(student, factors, strict=True))

    @staticmethod
    @first_derivative_only
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scale_N, decay_N, error_N, counts_N, *centered = ctx.saved_tensors
        products = [gradient * x for gradient, x in zip(gradients, centered, strict=True)]
        sum_N, product_N = ctx.total(torch.stack([sums_over(maps, POSITIONS) for maps in (gradients, products)]))
        own_N = decay_N * (product_N - error_N * sum_N)
        # scale * (g - mean of g) + own * (S - error)
        shift_N = -scale_N * sum_N / counts_N - own_N * error_N
        factors = split_levels(torch.stack([shift_N, scale_N, own_N]), centered, POSITIONS)
        results = [
            torch.addcmul(shift, gradient, scale).addcmul_(x, own)
            for gradient, x, (shift, scale, own) in zip(gradients, centered, factors, strict=True)
        ]
        return None, *results, *(None for _ in results)
