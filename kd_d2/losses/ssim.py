"""SSIM and MS-SSIM losses (Wang et al. 2004; de Rijk 2022, equations 3 and 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .fused_ssim import FusedSSIMLoss
from .shapes import check_same_shape, check_weight
from .similarity import Moments, contrast_structure, local_moments, luminance, similarity_map

MS_SSIM_SIGMAS = (0.5, 1.0, 2.0, 4.0, 8.0)


def ssim_loss(
    student: Tensor,
    teacher: Tensor,
    window_size: int = 11,
    max_val: float = 1.0,
    *,
    exponents: Sequence[float] = (1, 1, 1),
    weight: Tensor | None = None,
) -> Tensor:
    """Compute the mean structural dissimilarity (1 - l^alpha * c^beta * s^gamma) / 2 of maps, channel by channel.

    Gaussian window with sigma 1.5, K1 = 0.01, K2 = 0.03, reflected borders; with the default exponents, equal to
    kornia's `ssim_loss`. Computed in at least float32. With the default exponents, no weight and a fixed teacher, one
    pass computes loss and gradient; otherwise, plain operations are used.

    Args:
        student, teacher: (B, C, H, W), values in [0, max_val].
        window_size: side of the window in cells, odd and at most 2 * min(H, W) - 1.
        max_val: range of the values, L in the formula.
        exponents: alpha of luminance, beta of contrast, gamma of structure; 0 disables a component.
        weight: weight of each position, broadcastable to the maps; the mean is still over all cells.

    Returns:
        A scalar, in [0, 1] without weight.

    Raises:
        ValueError: the maps are empty or differ in shape, the window is even or too large for the map, or the weight does
            not broadcast to the maps.
    """
    _check(student, teacher, window_size)
    dtype = torch.promote_types(student.dtype, torch.float32)
    with torch.autocast(student.device.type, enabled=False):
        if tuple(exponents) == (1, 1, 1) and weight is None and not teacher.requires_grad:
            return FusedSSIMLoss.apply(student, teacher, window_size, float(max_val))
        similarity = similarity_map(student.to(dtype), teacher.to(dtype), window_size, float(max_val), tuple(exponents))
        return _weighted_mean((1 - similarity) / 2, weight)


def ms_ssim_loss(
    student: Tensor,
    teacher: Tensor,
    window_size: int = 33,
    max_val: float = 1.0,
    *,
    sigmas: Sequence[float] = MS_SSIM_SIGMAS,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute the mean of 1 - l of the largest sigma * product of c * s over all sigmas.

    Scales are windows on one full-size map (Zhao et al. 2017, equation 8). Arguments and errors as for `ssim_loss`.

    Args:
        sigmas: standard deviations of the Gaussian windows, in cells, ascending.
    """
    _check(student, teacher, window_size)
    dtype = torch.promote_types(student.dtype, torch.float32)
    with torch.autocast(student.device.type, enabled=False):
        maps, max_val = (student.to(dtype), teacher.to(dtype)), float(max_val)

        def similarity(sigma: float, terms: list[Callable[[Moments, float], Tensor]]) -> Tensor:
            moments = local_moments(*maps, window_size, sigma)
            return math.prod(term(moments, max_val) for term in terms)

        product = 1.0
        for sigma in sigmas:
            terms = [contrast_structure, luminance] if sigma == sigmas[-1] else [contrast_structure]
            # Intermediate maps, ten for each sigma, are recomputed in the backward pass instead of stored.
            product = product * checkpoint(similarity, sigma, terms, use_reentrant=False, preserve_rng_state=False)
        return _weighted_mean(1 - product, weight)


def fitting_window(maps: Tensor, window_size: int) -> int:
    """Return the window size that fits maps (B, C, H, W): `window_size`, or 2 * min(H, W) - 1 if that is smaller."""
    return min(window_size, 2 * min(maps.shape[-2:]) - 1)


def _check(student: Tensor, teacher: Tensor, window_size: int) -> None:
    if student.numel() == 0:
        raise ValueError(f"maps of shape {tuple(student.shape)} have no similarity")
    check_same_shape(student, teacher)
    largest = 2 * min(student.shape[-2:]) - 1
    if window_size % 2 == 0 or not 1 <= window_size <= largest:
        raise ValueError(
            f"window_size is {window_size}; on a map of {tuple(student.shape[-2:])} it must be odd and at most {largest}"
        )


def _weighted_mean(losses: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return losses.mean()
    check_weight(weight, losses)
    return (losses * weight).mean()
