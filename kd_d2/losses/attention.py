"""Spatial and channel attention of feature maps (Zhang and Ma 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from .flat_levels import FlatLevels


@torch.no_grad()
def spatial_attention(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Compute H * W * softmax over positions of mean over channels |F| / temperature, (B, 1, H, W), averaged over both.

    Its mean over the positions of an image is 1; it has no gradient. Computed in at least float32.

    Args:
        student, teacher: (B, C, H, W); the channel counts may differ.
    """
    return shared_attention(*(mean_activation(features, 1) for features in (student, teacher)), temperature)


@torch.no_grad()
def channel_attention(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Compute C * softmax over channels of mean over positions |F| / temperature, (B, C, 1, 1), averaged over both.

    Its mean over the channels of an image is 1; it has no gradient. Computed in at least float32.

    Args:
        student, teacher: (B, C, H, W).
    """
    return shared_attention(*(mean_activation(features, (2, 3)) for features in (student, teacher)), temperature)


@torch.no_grad()
def shared_attention(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Compute number of elements * softmax over mean activations (B, ...) / temperature, averaged over both."""
    return _softmax_attention(torch.cat([student, teacher]), temperature).unflatten(0, (2, len(student))).mean(0)


def mean_activation(features: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """Compute the mean of |F| over dimensions, kept with size 1, in at least float32 and one pass over the map."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    total = torch.linalg.vector_norm(features, 1, dims, keepdim=True, dtype=dtype)
    return total * (total.numel() / max(1, features.numel()))


def own_attention(features: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute a detector's attention over positions (B, 1, H, W) and channels (B, C, 1, 1), with mean 1 and gradients.

    The first is H * W * softmax over positions of mean over channels |F| / temperature, the second C * softmax over
    channels of mean over positions |F| / temperature. Computed in at least float32.

    Args:
        features: (B, C, H, W).
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    positions, channels = attention_of_levels(features.flatten(2), temperature, FlatLevels.of([features]))
    return positions.view_as(features[:, :1]), channels[:, 0, :, None, None]


def attention_of_levels(features_BCL: Tensor, temperature: float, levels: FlatLevels) -> tuple[Tensor, Tensor]:
    """Compute `own_attention` of S levels: over the positions of each, (B, L), and over its channels, (B, S, C)."""
    return attention_of_activations(*activations_of_levels(features_BCL, levels), temperature, levels)


def activations_of_levels(features_BCL: Tensor, levels: FlatLevels) -> tuple[Tensor, Tensor]:
    """Compute the mean of |F| of S levels over channels, (B, 1, L), and over the positions of each, (B, S, C)."""
    return means_of_levels(features_BCL.abs(), levels)


def means_of_levels(features_BCL: Tensor, levels: FlatLevels) -> tuple[Tensor, Tensor]:
    """Compute the mean of F of S levels over channels, (B, 1, L), and over the positions of each, (B, S, C)."""
    return features_BCL.mean(1, keepdim=True), levels.sum(features_BCL) / levels.lengths_S1


def attention_of_activations(
    positions_B1L: Tensor, channels_BSC: Tensor, temperature: float, levels: FlatLevels
) -> tuple[Tensor, Tensor]:
    """Compute `attention_of_levels` from the means of |F|."""
    share_BSL = levels.softmax(positions_B1L / temperature)
    over_channels_BSC = (channels_BSC / temperature).softmax(2)
    return (share_BSL * levels.lengths_S1).sum(1), over_channels_BSC * channels_BSC.shape[2]


@torch.no_grad()
def shared_attention_of_levels(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], temperature: float, levels: FlatLevels
) -> tuple[Tensor, Tensor]:
    """Compute `attention_of_activations`, averaged over both detectors, from results of `activations_of_levels`."""
    both = (attention_of_activations(*activations, temperature, levels) for activations in (student, teacher))
    return tuple((ours + theirs) / 2 for ours, theirs in zip(*both, strict=True))


def _softmax_attention(activations: Tensor, temperature: float) -> Tensor:
    return (activations / temperature).flatten(1).softmax(1).view_as(activations) * activations.shape[1:].numel()
