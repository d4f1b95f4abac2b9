"""Feature richness: where a detector recognizes something (Du et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def feature_richness(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute the largest probability of any anchor and class at each position, (B, H, W), in at least float32.

    Args:
        logits: class logits (B, HWA, K) of a level, of binary classifications.
        size: H, W.
    """
    largest = logits.unflatten(1, (*size, -1)).flatten(3).amax(3)
    return largest.to(torch.promote_types(largest.dtype, torch.float32)).sigmoid()
