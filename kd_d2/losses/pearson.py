"""Channel-wise Pearson correlation of feature maps (Cao et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .moments import Total, alone, central_moments
from .shapes import check_same_shape

EPS = 1e-6
"""Added to deviations."""
SQUARE_EPS = 1e-16
"""Variance up to which a channel counts as constant."""


def pearson_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute half the mean squared difference of maps standardized per channel, a scalar (Cao et al. 2022).

    1/2 * mean over (B, C, H, W) of (F^_S - F^_T)^2, where F^ = (F - mean) / (deviation + 1e-6) with mean and unbiased
    deviation over (B, H, W). Except for the 1e-6, it is (n - 1) / n * (1 - r), with n = BHW and r Pearson's
    correlation, averaged over channels. Gradients flow only to the student. Constant channels have none, unlike those of
    the authors' program: the few values of a small map are often equal in half precision, and the 1e-6 would multiply
    their gradient by up to 1e6. Computed in at least float32.

    Args:
        student, teacher: (B, C, H, W).

    Raises:
        ValueError: the maps differ in shape.
    """
    return pearson_loss_of_levels([student], [teacher])


def pearson_loss_of_levels(student: Sequence[Tensor], teacher: Sequence[Tensor], total: Total = alone) -> Tensor:
    """Compute the sum of `pearson_loss` over levels, of a batch that may be distributed over ranks.

    Args:
        student, teacher: maps (B, C, H, W) of the levels.
        total: sums a tensor over all ranks and propagates the gradients of all of them.

    Returns:
        A scalar, the same on all ranks.
    """
    for pair in zip(student, teacher, strict=True):
        check_same_shape(*pair)
    dtype = torch.promote_types(student[0].dtype, torch.float32)
    maps = ([x.to(dtype) for x in detector] for detector in (student, teacher))
    sums_3N, counts_N = central_moments(*maps, dims=(0, 2, 3), total=total)
    squares_2N, products_N = sums_3N[:2], sums_3N[2]
    variances_2N = squares_2N / (counts_N - 1).clamp(min=1)
    deviations_2N = variances_2N.clamp(min=SQUARE_EPS).sqrt() + EPS
    is_varied_2N = variances_2N > SQUARE_EPS
    products_N = products_N.where(is_varied_2N[0], 0)
    halves_N = (squares_2N / deviations_2N.square()).where(is_varied_2N, 0).sum(0) / 2
    losses_N = (halves_N - products_N / (deviations_2N[0] * deviations_2N[1])) / counts_N
    return sum(level.mean() for level in losses_N.split([x.shape[1] for x in student]))
