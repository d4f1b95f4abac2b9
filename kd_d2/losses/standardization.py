"""Standardization of feature maps, and agreement between two of them (Instance Mask Alignment)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import check_same_shape

EPS = 1e-5


def standardize(maps: Tensor, eps: float = EPS) -> Tensor:
    """Compute (F - mean) / std over positions of each map (N, C, H, W); constant maps give zeros and finite gradients.

    Computed in at least float32, the type of the result.

    Args:
        eps: added to the variance.
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    centered = maps - maps.mean((-2, -1), keepdim=True)
    return centered * (centered.square().mean((-2, -1), keepdim=True) + eps).rsqrt()


@torch.no_grad()
def agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the cosine similarity (N,) of two instances' features (N, C, H, W), at least 0, without gradient.

    Raises:
        ValueError: the features differ in shape.
    """
    check_same_shape(student, teacher)
    return F.cosine_similarity(student.flatten(1).float(), teacher.flatten(1).float()).clamp(min=0)
