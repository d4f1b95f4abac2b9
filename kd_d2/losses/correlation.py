"""Correlation of predictions (DIST), and alignment of channels to another's mean and deviation (CrossKD).

A batch may be distributed over several ranks: `total` then sums a tensor over all of them and propagates the gradients
of all of them. Shape suffixes: N rows (positions or proposals), K classes, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SQUARE_EPS = 1e-16
"""Smallest sum of squares to divide by: constant values have correlation 0 and finite gradients."""
DEVIATION_EPS = 1e-6


def _alone(value: Tensor) -> Tensor:
    return value


def dist_loss(
    student_probs: Tensor,
    teacher_probs: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    total: Callable[[Tensor], Tensor] = _alone,
) -> Tensor:
    """Compute DIST (Huang et al. 2022, equations 7 to 10): beta * (1 - r along classes) + gamma * (1 - r along rows).

    r is Pearson's correlation of student and teacher: of each row along its classes, averaged over rows; of each class
    along the rows, averaged over classes. Gradients flow only to the student. Computed in at least float32.

    Args:
        student_probs, teacher_probs: (N, K).
        total: see the module's docstring.

    Returns:
        A scalar, the same on all ranks.
    """
    dtype = torch.promote_types(student_probs.dtype, torch.float32)
    student_NK, teacher_NK = student_probs.to(dtype), teacher_probs.detach().to(dtype)
    along_classes = student_NK.new_zeros(())
    if beta:
        rows = [x - x.mean(1, keepdim=True) for x in (student_NK, teacher_NK)]
        along_classes = (1 - _correlation(*(x.sum(1) for x in _products(*rows)))).sum()
    count = student_NK.new_full((1,), len(student_NK))
    sums = total(torch.cat([student_NK.sum(0), teacher_NK.sum(0), along_classes[None], count]))
    number = sums[-1].clamp(min=1)
    loss = beta * sums[-2] / number
    if gamma:
        means = (sums[:-2] / number).chunk(2)
        columns = [x - mean for x, mean in zip((student_NK, teacher_NK), means, strict=True)]
        products_3K = total(torch.stack([x.sum(0) for x in _products(*columns)]))
        loss = loss + gamma * (1 - _correlation(*products_3K)).mean()
    return loss


def _products(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return student * teacher, student.square(), teacher.square()


def _correlation(product: Tensor, student_square: Tensor, teacher_square: Tensor) -> Tensor:
    """Compute r from sums of products and squares of zero-mean values."""
    return product * student_square.clamp(min=SQUARE_EPS).rsqrt() * teacher_square.clamp(min=SQUARE_EPS).rsqrt()


def with_statistics_of(
    student: Sequence[Tensor], teacher: Sequence[Tensor], total: Callable[[Tensor], Tensor] = _alone
) -> list[Tensor]:
    """Align mean and deviation of each channel of the student's maps with the teacher's (CrossKD, Wang et al. 2024).

    (S - mean_S) / (deviation_S + 1e-6) * deviation_T + mean_T, over (B, H, W), with unbiased deviations. Gradients flow
    only to the student, including through its statistics. Computed in at least float32.

    Args:
        student, teacher: maps (B, C, H, W), equal in shape pair by pair.
        total: see the module's docstring.
    """
    dtype = torch.promote_types(student[0].dtype, torch.float32)
    maps = [*(x.to(dtype) for x in student), *(x.detach().to(dtype) for x in teacher)]
    centered, means, deviations = _standard_form(maps, total)
    (_, mean_t), (deviation_s, deviation_t) = means.chunk(2), deviations.chunk(2)
    channels = [x.shape[1] for x in student]
    scales, shifts = (deviation_t / (deviation_s + DEVIATION_EPS)).split(channels), mean_t.split(channels)
    return [
        torch.addcmul(shift[:, None, None], x, scale[:, None, None])
        for x, scale, shift in zip(centered[: len(student)], scales, shifts, strict=True)
    ]


def _standard_form(maps: list[Tensor], total: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return the maps centered by channel, and mean and unbiased deviation of all channels, using two sums across ranks.

    The deviation of a single position is 0.
    """
    channels = [x.shape[1] for x in maps]
    counts = torch.cat([x.new_full((x.shape[1],), x[:, 0].numel()) for x in maps])
    sums, counts = total(torch.stack([torch.cat([x.sum((0, 2, 3)) for x in maps]), counts]))
    means = sums / counts.clamp(min=1)
    centered = [x - mean[:, None, None] for x, mean in zip(maps, means.split(channels), strict=True)]
    norms = torch.cat([torch.linalg.vector_norm(x, dim=(0, 2, 3)) for x in centered])
    variances = total(norms.square()) / (counts - 1).clamp(min=1)
    return centered, means, variances.clamp(min=SQUARE_EPS).sqrt()
