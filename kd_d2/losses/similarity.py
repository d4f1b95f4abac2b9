"""Structural similarity in plain, differentiable operations (Wang et al. 2004; de Rijk 2022, equations 3 and 4).

Reference for tests of the fused loss, and implementation of the cases that it does not support.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .gaussian import gaussian_blur

SIGMA = 1.5
K1, K2 = 0.01, 0.03
EPS = 1e-12
"""Added to SSIM's denominator, as in kornia: black cells have a similarity of 1 - 1e-5."""
SQUARE_EPS = 1e-12
"""Added to variances under a root, so that constant patches have finite gradients."""


class Moments(NamedTuple):
    """Means, variances and covariance of student and teacher in each cell's window, (B, C, H, W) each."""

    mean_s: Tensor
    mean_t: Tensor
    variance_s: Tensor
    variance_t: Tensor
    covariance: Tensor


def local_moments(student: Tensor, teacher: Tensor, window_size: int, sigma: float = SIGMA) -> Moments:
    """Compute moments under a Gaussian window, of maps shifted toward zero so that float32 suffices at any offset."""
    with torch.no_grad():
        offset = teacher.mean((-2, -1), keepdim=True)
    student, teacher = student - offset, teacher - offset
    mean_s, mean_t = (gaussian_blur(x, window_size, sigma) for x in (student, teacher))
    return Moments(
        mean_s + offset,
        mean_t + offset,
        (gaussian_blur(student.square(), window_size, sigma) - mean_s.square()).clamp(min=0),
        (gaussian_blur(teacher.square(), window_size, sigma) - mean_t.square()).clamp(min=0),
        gaussian_blur(student * teacher, window_size, sigma) - mean_s * mean_t,
    )


def luminance(moments: Moments, max_val: float) -> Tensor:
    """Compute l, the agreement of means, at most 1."""
    c1 = (K1 * max_val) ** 2
    mean_s, mean_t = moments.mean_s, moments.mean_t
    return (2 * mean_s * mean_t + c1) / (mean_s.square() + mean_t.square() + c1)


def contrast(moments: Moments, max_val: float) -> Tensor:
    """Compute c, the agreement of deviations, from 0 to 1."""
    c2 = (K2 * max_val) ** 2
    return (2 * _deviation_product(moments) + c2) / (moments.variance_s + moments.variance_t + c2)


def structure(moments: Moments, max_val: float) -> Tensor:
    """Compute s, the correlation, from -1 to 1."""
    c3 = (K2 * max_val) ** 2 / 2
    return (moments.covariance + c3) / (_deviation_product(moments) + c3)


def contrast_structure(moments: Moments, max_val: float) -> Tensor:
    """Compute c * s in one term, without square roots."""
    c2 = (K2 * max_val) ** 2
    return (2 * moments.covariance + c2) / (moments.variance_s + moments.variance_t + c2)


def ssim_map(moments: Moments, max_val: float) -> Tensor:
    """Compute l * c * s in one fraction (Wang et al. 2004, equation 13), as kornia's `ssim` does."""
    c1, c2 = (K1 * max_val) ** 2, (K2 * max_val) ** 2
    mean_s, mean_t = moments.mean_s, moments.mean_t
    numerator = (2 * mean_s * mean_t + c1) * (2 * moments.covariance + c2)
    squares, variances = mean_s.square() + mean_t.square(), moments.variance_s + moments.variance_t
    return numerator / ((squares + c1) * (variances + c2) + EPS)


def similarity_map(
    student: Tensor, teacher: Tensor, window_size: int, max_val: float, exponents: tuple[float, float, float]
) -> Tensor:
    """Compute l^alpha * c^beta * s^gamma per cell (B, C, H, W); l and s, if negative, keep their sign under a power."""
    moments = local_moments(student, teacher, window_size)
    if exponents == (1, 1, 1):
        return ssim_map(moments, max_val)
    alpha, beta, gamma = exponents
    factors = [_power(luminance(moments, max_val), alpha)] if alpha else []
    if beta == gamma == 1:
        factors.append(contrast_structure(moments, max_val))
    else:
        factors += [_power(contrast(moments, max_val), beta)] if beta else []
        factors += [_power(structure(moments, max_val), gamma)] if gamma else []
    return math.prod(factors, start=torch.ones_like(student))


def _power(x: Tensor, exponent: float) -> Tensor:
    return x if exponent == 1 else x.sign() * x.abs().clamp(min=SQUARE_EPS) ** exponent


def _deviation_product(moments: Moments) -> Tensor:
    return ((moments.variance_s + SQUARE_EPS) * (moments.variance_t + SQUARE_EPS)).sqrt()
