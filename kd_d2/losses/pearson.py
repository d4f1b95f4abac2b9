"""Channel-wise Pearson correlation (Cao et al. 2022), in two steps, so that a batch may be distributed over ranks.

`channel_means` and `channel_moments` are means over local images; a caller may average each across ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6
"""Added to deviations."""
SQUARE_EPS = 1e-24
"""Variances below it are treated as zero and have no gradient."""


def pearson_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute half the mean squared difference of maps standardized per channel, a scalar (Cao et al. 2022).

    1/2 * mean over (B, C, H, W) of (F^_S - F^_T)^2, where F^ = (F - mean) / (deviation + 1e-6) with mean and unbiased
    deviation over (B, H, W). Except for the 1e-6, it is (n - 1) / n * (1 - r), with n = BHW and r Pearson's
    correlation, averaged over channels. Gradients flow only to the student. Computed in at least float32.

    Args:
        student, teacher: (B, C, H, W).
    """
    moments = channel_moments(student, teacher, channel_means(student, teacher))
    return pearson_loss_of_moments(moments, student.numel() // student.shape[1])


@torch.no_grad()
def channel_means(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute means (2, C) over (B, H, W) of student's and teacher's channels, (B, C, H, W) each, without gradient."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    return torch.stack([maps.mean((0, 2, 3), dtype=dtype) for maps in (student, teacher)])


def channel_moments(student: Tensor, teacher: Tensor, means: Tensor) -> Tensor:
    """Compute means (3, C) over (B, H, W) of both detectors' squared deviations from `means`, and of their product.

    The gradient is that of central moments if `means` are those of all contributing images.

    Args:
        student, teacher: (B, C, H, W); gradients flow only to the student.
        means: (2, C), see `channel_means`.
    """
    both = zip((student, teacher.detach()), means, strict=True)
    s, t = (maps.to(means.dtype) - mean[:, None, None] for maps, mean in both)
    return torch.stack([product.mean((0, 2, 3)) for product in (s.square(), t.square(), s * t)])


def pearson_loss_of_moments(moments: Tensor, count: int) -> Tensor:
    """Compute `pearson_loss` from the moments (3, C) that `channel_moments` returned.

    Args:
        count: n, the number of positions of all images over which the moments are averaged.
    """
    student, teacher, both = moments
    unbiased = count / max(1, count - 1)
    deviation_s, deviation_t = ((x * unbiased).clamp(min=SQUARE_EPS).sqrt() + EPS for x in (student, teacher))
    squares = student / deviation_s.square() + teacher / deviation_t.square()
    return (squares / 2 - both / (deviation_s * deviation_t)).mean()
