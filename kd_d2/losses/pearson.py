"""Correlation of channels (Cao et al. 2022), in two steps, so that a batch may lie on several ranks.

`channel_means` and `channel_moments` are means over the own images; a caller may average either across ranks before it goes on.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6
"""Added to deviations."""
SQUARE_EPS = 1e-24
"""Below it a variance counts as none, and has no gradient."""


def pearson_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Scalar: half the mean squared difference of maps that are standardized by channel (Cao et al. 2022).

    1/2 * mean over (B, C, H, W) of (F^_S - F^_T)^2, where F^ = (F - mean) / (deviation + 1e-6) with mean and unbiased deviation over
    (B, H, W). But for the 1e-6 it is (n - 1) / n * (1 - r), with n = BHW and r the mean over channels of Pearson's correlation. Gradients
    go to the student alone. Computed in float32 or better.

    Args:
        student, teacher: (B, C, H, W).
    """
    moments = channel_moments(student, teacher, channel_means(student, teacher))
    return pearson_loss_of_moments(moments, student.numel() // student.shape[1])


@torch.no_grad()
def channel_means(student: Tensor, teacher: Tensor) -> Tensor:
    """(2, C) means over (B, H, W) of the student's and of the teacher's channels, (B, C, H, W) each. Without gradient."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    return torch.stack([maps.mean((0, 2, 3), dtype=dtype) for maps in (student, teacher)])


def channel_moments(student: Tensor, teacher: Tensor, means: Tensor) -> Tensor:
    """(3, C) means over (B, H, W): of the squares of both detectors' deviations from `means`, and of their product.

    The gradient is that of central moments where `means` are the means of all images that count.

    Args:
        student, teacher: (B, C, H, W); gradients go to the student alone.
        means: (2, C), see `channel_means`.
    """
    both = zip((student, teacher.detach()), means, strict=True)
    s, t = (maps.to(means.dtype) - mean[:, None, None] for maps, mean in both)
    return torch.stack([product.mean((0, 2, 3)) for product in (s.square(), t.square(), s * t)])


def pearson_loss_of_moments(moments: Tensor, count: int) -> Tensor:
    """`pearson_loss` of what `channel_moments` returned, (3, C).

    Args:
        count: n, the positions of all images, over which the moments are means.
    """
    student, teacher, both = moments
    unbiased = count / max(1, count - 1)
    deviation_s, deviation_t = ((x * unbiased).clamp(min=SQUARE_EPS).sqrt() + EPS for x in (student, teacher))
    squares = student / deviation_s.square() + teacher / deviation_t.square()
    return (squares / 2 - both / (deviation_s * deviation_t)).mean()
