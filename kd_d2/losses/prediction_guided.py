"""Feature imitation weighted by prediction differences (Prediction-guided Feature Imitation, Li et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from .shapes import check_same_shape, check_weight

EPS = 1e-12


def prediction_guided_loss(
    student_features: list[Tensor],
    teacher_features: list[Tensor],
    student_probs: list[Tensor],
    teacher_probs: list[Tensor],
) -> Tensor:
    """Compute the squared difference of features, weighted by that of the predictions (equations 7 to 9).

    mean over levels of mean over (B, H, W) of P * D, with P the mean over anchors and classes of (p_T - p_S)^2, a
    weight without gradient, and D the mean over channels of (F_T - F_S)^2. Computed in at least float32.

    Args:
        student_features, teacher_features: (B, C, H, W) by level, with the student's adapted to the teacher's channels.
        student_probs, teacher_probs: class probabilities (B, A * K, H, W) by level.
    """
    weights = [prediction_difference(s, t).detach() for s, t in zip(student_probs, teacher_probs, strict=True)]
    return weighted_imitation_loss(student_features, teacher_features, weights)


def prediction_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute P (B, H, W), mean over anchors and classes of (T - S)^2 of probabilities or logits (B, A * K, H, W).

    Raises:
        ValueError: the predictions differ in shape.
    """
    check_same_shape(student, teacher)
    dtype = torch.promote_types(student.dtype, torch.float32)
    return (teacher.detach().to(dtype) - student.to(dtype)).square().mean(1)


def weighted_imitation_loss(
    student_features: list[Tensor],
    teacher_features: list[Tensor],
    weights: list[Tensor],
    divisors: list[Tensor | float] | None = None,
) -> Tensor:
    """Compute the mean over levels of the sum over (B, H, W) of weight * D, divided by the level's divisor.

    Args:
        student_features, teacher_features: (B, C, H, W) by level.
        weights: broadcastable to (B, H, W), by level.
        divisors: by level; None for the number of positions, B * H * W.

    Raises:
        ValueError: see `masked_squared_error`.
    """
    divisors = divisors or [max(1, s.shape[0] * s.shape[2:].numel()) for s in student_features]
    levels = zip(student_features, teacher_features, weights, divisors, strict=True)
    losses = [masked_squared_error(s, t, weight) / divisor for s, t, weight, divisor in levels]
    return sum(losses) / len(losses)


def masked_squared_error(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Compute the sum over (B, H, W) of mask * mean over channels of (F_S - F_T)^2, in at least float32.

    Args:
        student, teacher: (B, C, H, W); gradients flow only to the student.
        mask: broadcastable to (B, H, W), zeros and ones or any weights.

    Raises:
        ValueError: the maps differ in shape, or the mask does not broadcast to (B, H, W).
    """
    check_same_shape(student, teacher)
    dtype = torch.promote_types(student.dtype, torch.float32)
    difference = (student.to(dtype) - teacher.detach().to(dtype)).square().mean(1)
    check_weight(mask, difference)
    return (mask * difference).sum()


def relative_to_mean(weights: list[Tensor], means: list[Tensor] | None = None) -> list[Tensor]:
    """Divide each level's weights by their mean, so that they express where to imitate but not how much.

    Computed in at least float32, the type of the result.

    Args:
        means: means by level, such as those across ranks; None for the weights' own, without gradient.
    """
    weights = [weight.to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
    means = means or [weight.detach().mean() for weight in weights]
    return [weight / mean.clamp(min=EPS) for weight, mean in zip(weights, means, strict=True)]
