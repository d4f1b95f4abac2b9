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
    return (_attention(student, temperature) + _attention(teacher, temperature)) / 2


@torch.no_grad()
def channel_attention(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """(B, C, 1, 1): C * softmax over channels of mean over positions |F| / temperature, averaged over both.

    Its mean over the channels of an image is 1; no gradient. Computed in float32 or better.

    Args:
        student, teacher: (B, C, H, W).
    """
    return sum(_channel_attention(features, temperature) for features in (student, teacher)) / 2


def _channel_attention(features: Tensor, temperature: float) -> Tensor:
    dtype = torch.promote_types(features.dtype, torch.float32)
    activation = features.abs().mean((2, 3), keepdim=True, dtype=dtype) / temperature
    return activation.softmax(1) * activation.shape[1]


def _attention(features: Tensor, temperature: float) -> Tensor:
    dtype = torch.promote_types(features.dtype, torch.float32)
    activation = features.abs().mean(1, keepdim=True, dtype=dtype) / temperature
    return activation.flatten(1).softmax(1).view_as(activation) * activation[0].numel()
