"""Soft-label loss for sigmoid heads (Hinton et al. 2015, in the form that detection papers use as a baseline)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import check_same_shape, check_weight


def soft_label_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weight: Tensor | None = None,
    temperature: float = 1.0,
    focus: float = 0.0,
) -> Tensor:
    """Compute the sum over elements of KL(Bernoulli(p_T) || Bernoulli(p_S)), with p = sigmoid(logits / temperature).

    Multiplied by the squared temperature to preserve the scale of gradients. Gradients flow only to the student.
    Computed in at least float32.

    Args:
        student_logits, teacher_logits: equal in shape; each element is a separate binary classification.
        weight: weight of each element, broadcastable to the logits.
        focus: exponent of an additional element weight |p_T - p_S|, without gradient.

    Raises:
        ValueError: the logits differ in shape, or the weight does not broadcast to them.
    """
    check_same_shape(student_logits, teacher_logits)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student, teacher = student_logits.to(dtype), teacher_logits.detach().to(dtype)
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    target = teacher.sigmoid()
    divergence = target * (teacher - student) + F.softplus(student) - F.softplus(teacher)
    if focus:
        divergence = divergence * (student.detach().sigmoid() - target).abs() ** focus
    if weight is not None:
        check_weight(weight, divergence)
        divergence = divergence * weight.detach()
    return divergence.sum() * temperature**2
