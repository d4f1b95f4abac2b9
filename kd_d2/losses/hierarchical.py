"""Hierarchical context loss of feature maps (Chen et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .shapes import check_same_shape

SIZES = (4, 2, 1)


def hierarchical_context_loss(student: Tensor, teacher: Tensor, sizes: Sequence[int] = SIZES) -> Tensor:
    """Compute the weighted mean of squared errors at several resolutions, a scalar (Chen et al. 2021, figure 4).

    The maps themselves have weight 1, and the maps pooled to each size half the weight of the one before. Sizes that are
    not smaller than the maps are left out.

    Args:
        student, teacher: (B, C, H, W).
        sizes: sides of the pooled maps, descending.

    Raises:
        ValueError: the maps differ in shape.
    """
    check_same_shape(student, teacher)
    difference = student - teacher
    weights, errors = [1.0], [difference.square().mean()]
    for size in sizes:
        if size < min(difference.shape[-2:]):
            weights.append(weights[-1] / 2)
            errors.append(F.adaptive_avg_pool2d(difference, size).square().mean())
    return sum(weight * error for weight, error in zip(weights, errors, strict=True)) / sum(weights)
