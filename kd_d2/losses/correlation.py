"""Correlation of predictions along classes and along positions (DIST).

A batch may be distributed over several ranks: `total` then sums a tensor over all of them and propagates the gradients
of all of them. Shape suffixes: N rows (positions or proposals) of all levels, S levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .moments import Total, alone, central_moments
from .shapes import check_same_shape

SQUARE_EPS = 1e-16
"""Sum of squares up to which values count as constant: their correlation and its gradient are 0."""


def dist_loss(
    student_probs: Tensor, teacher_probs: Tensor, beta: float = 1.0, gamma: float = 1.0, total: Total = alone
) -> Tensor:
    """Compute DIST (Huang et al. 2022, equations 7 to 10): beta * (1 - r along classes) + gamma * (1 - r along rows).

    r is Pearson's correlation of student and teacher: of each row along its classes, averaged over rows; of each class
    along the rows, averaged over classes. Gradients flow only to the student. Computed in at least float32.

    Args:
        student_probs, teacher_probs: (N, K).
        total: see the module's docstring.

    Returns:
        A scalar, the same on all ranks.

    Raises:
        ValueError: the probabilities differ in shape.
    """
    return dist_loss_of_levels([student_probs], [teacher_probs], beta, gamma, total)


def dist_loss_of_levels(
    student_probs: Sequence[Tensor],
    teacher_probs: Sequence[Tensor],
    beta: float = 1.0,
    gamma: float = 1.0,
    total: Total = alone,
) -> Tensor:
    """Compute the sum of `dist_loss` over levels.

    Args:
        student_probs, teacher_probs: probabilities (N, K) of the levels.
        beta, gamma, total: see `dist_loss`.
    """
    for pair in zip(student_probs, teacher_probs, strict=True):
        check_same_shape(*pair)
    dtype = torch.promote_types(student_probs[0].dtype, torch.float32)
    maps = [[x.to(dtype) for x in probs] for probs in (student_probs, teacher_probs)]
    loss = maps[0][0].new_zeros(())
    if beta:
        along_classes_N = _distances(central_moments(*maps, dims=(1,))[0])
        rows_S = [len(x) for x in student_probs]
        sums_S = torch.stack([x.sum() for x in along_classes_N.split(rows_S)])
        counts_S = torch.tensor(rows_S).to(sums_S, non_blocking=True)
        sums_S, counts_S = total(torch.stack([sums_S, counts_S]))
        loss = loss + beta * (sums_S / counts_S.clamp(min=1)).sum()
    if gamma:
        distances = _distances(central_moments(*maps, dims=(0,), total=total)[0])
        loss = loss + gamma * sum(x.mean() for x in distances.split([x.shape[1] for x in student_probs]))
    return loss


def _distances(sums_3N: Tensor) -> Tensor:
    """Compute 1 - r from sums of squares and products of values with a mean of zero.

    Predictions in half precision are often constant, along classes or positions, at the beginning of training.
    """
    inverse_2N = F.threshold(sums_3N[:2], SQUARE_EPS, torch.inf).rsqrt()
    return 1 - sums_3N[2] * inverse_2N[0] * inverse_2N[1]
