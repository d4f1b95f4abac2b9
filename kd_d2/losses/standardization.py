"""Feature maps brought to mean 0 and deviation 1, and how much two of them agree (Instance Mask Alignment)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5


def standardize(maps: Tensor, eps: float = EPS) -> Tensor:
    """(F - mean) / std over the positions of each map (N, C, H, W); a constant map becomes zeros, with finite gradients.

    Args:
        eps: added to the variance.
    """
    centered = maps - maps.mean((-2, -1), keepdim=True)
    return centered * (centered.square().mean((-2, -1), keepdim=True) + eps).rsqrt()


@torch.no_grad()
def agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """(N,) the cosine of the angle between two instances' features (N, C, H, W), at least 0; without gradient."""
    return F.cosine_similarity(student.flatten(1).float(), teacher.flatten(1).float()).clamp(min=0)
