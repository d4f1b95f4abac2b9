"""Soft labels for heads of sigmoids (Hinton et al. 2015, as papers on detectors compare with them)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_label_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weight: Tensor | None = None,
    temperature: float = 1.0,
    focus: float = 0.0,
) -> Tensor:
    """Sum over all elements of KL(Bernoulli(p_T) || Bernoulli(p_S)), with p = sigmoid(logits / temperature).

    Multiplied by the temperature's square, so that gradients keep their size. Gradients go to the student alone. Computed in
    float32 or better.

    Args:
        student_logits, teacher_logits: of one shape; each element is a binary classification of its own.
        weight: of each element, or of a shape that broadcasts to theirs.
        focus: each element is also weighted by |p_T - p_S| to this power, without gradient.
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student, teacher = student_logits.to(dtype), teacher_logits.detach().to(dtype)
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    target = teacher.sigmoid()
    divergence = target * (teacher - student) + F.softplus(student) - F.softplus(teacher)
    if focus:
        divergence = divergence * (student.detach().sigmoid() - target).abs() ** focus
    if weight is not None:
        divergence = divergence * weight.detach()
    return divergence.sum() * temperature**2
