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
    rows = [x - x.mean(1, keepdim=True) for x in (student_NK, teacher_NK)]
    along_classes = (1 - _correlation(*(x.sum(1) for x in _products(*rows)))).sum()
    count = student_NK.new_full((1,), len(student_NK))
    sums = total(torch.cat([student_NK.sum(0), teacher_NK.sum(0), along_classes[None], count]))
    number = sums[-1].clamp(min=1)
    means = (sums[:-2] / number).chunk(2)
    columns = [x - mean for x, mean in zip((student_NK, teacher_NK), means, strict=True)]
    products_3K = total(torch.stack([x.sum(0) for x in _products(*columns)]))
    return beta * sums[-2] / number + gamma * (1 - _correlation(*products_3K)).mean()


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
    student, teacher = [x.to(dtype) for x in student], [x.detach().to(dtype) for x in teacher]
    statistics = _channel_statistics([*student, *teacher], total)
    pairs = zip(student, statistics[: len(student)], statistics[len(student) :], strict=True)
    return [
        (maps - mean_s) / (deviation_s + DEVIATION_EPS) * deviation_t + mean_t
        for maps, (mean_s, deviation_s), (mean_t, deviation_t) in pairs
    ]


def _channel_statistics(maps: list[Tensor], total: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return mean and unbiased deviation (C, 1, 1; 0 for one position) of each map, using two sums across ranks."""
    channels = [x.shape[1] for x in maps]
    counts = maps[0].new_tensor([x[:, 0].numel() for x in maps])
    *sums, counts = total(torch.cat([*(x.sum((0, 2, 3)) for x in maps), counts])).split([*channels, len(maps)])
    means = [(s / count.clamp(min=1))[:, None, None] for s, count in zip(sums, counts, strict=True)]
    squares = total(torch.cat([(x - mean).square().sum((0, 2, 3)) for x, mean in zip(maps, means, strict=True)]))
    variances = [s / (count - 1).clamp(min=1) for s, count in zip(squares.split(channels), counts, strict=True)]
    deviations = [variance.clamp(min=SQUARE_EPS).sqrt()[:, None, None] for variance in variances]
    return list(zip(means, deviations, strict=True))
