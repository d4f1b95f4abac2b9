"""Where on a feature map the activations are (Zhang and Ma 2021)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def spatial_attention(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """(B, 1, H, W): H * W * softmax over positions of mean over channels |F| / temperature, averaged over both.

    Its mean over the positions of an image is 1; no gradient. Computed in float32 or better.

    Args:
        student, teacher: (B, C, H, W); the channel counts may differ.
    """
    return shared_attention(*(mean_activation(features, 1) for features in (student, teacher)), temperature)


@torch.no_grad()
def channel_attention(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """(B, C, 1, 1): C * softmax over channels of mean over positions |F| / temperature, averaged over both.

    Its mean over the channels of an image is 1; no gradient. Computed in float32 or better.

    Args:
        student, teacher: (B, C, H, W).
    """
    return shared_attention(*(mean_activation(features, (2, 3)) for features in (student, teacher)), temperature)


@torch.no_grad()
def shared_attention(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Of mean activations (B, ...): number of elements * softmax over them / temperature, averaged over both."""
    return sum(_softmax_attention(x, temperature) for x in (student, teacher)) / 2


def mean_activation(features: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """Mean of |F| over dimensions, which stay with one element. Computed in float32 or better, in one pass over the map."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    total = torch.linalg.vector_norm(features, 1, dims, keepdim=True, dtype=dtype)
    return total * (total.numel() / features.numel())


def own_attention(features: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Of one detector, with gradients: over positions (B, 1, H, W) and over channels (B, C, 1, 1), each with a mean of 1.

    The first is H * W * softmax over positions of mean over channels |F| / temperature, the second C * softmax over channels of mean over
    positions |F| / temperature. Computed in float32 or better.

    Args:
        features: (B, C, H, W).
    """
    positions, channels = (_softmax_attention(mean_activation(features, dims), temperature) for dims in (1, (2, 3)))
    return positions, channels


def _softmax_attention(activations: Tensor, temperature: float) -> Tensor:
    return (activations / temperature).flatten(1).softmax(1).view_as(activations) * activations[0].numel()
