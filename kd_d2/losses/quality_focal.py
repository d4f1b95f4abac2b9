"""Quality focal loss (Li et al. 2020): focal loss for targets that are probabilities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def quality_focal_loss(
    student_logits: Tensor, teacher_logits: Tensor, weight: Tensor | None = None, power: float = 1.0
) -> Tensor:
    """Sum over all elements of |p_T - p_S|^power * BCE(p_S, p_T), with p = sigmoid(logits).

    Li et al. 2020, equation 5, with the teacher's probabilities as targets; CrossKD (Wang et al. 2024) takes power 1. Gradients go to
    the student alone, through both factors. Computed in float32 or better.

    Args:
        student_logits, teacher_logits: of one shape; each element is a binary classification of its own.
        weight: of each element, or of a shape that broadcasts to theirs.
        power: beta of the paper.
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student, target = student_logits.to(dtype), teacher_logits.detach().to(dtype).sigmoid()
    with torch.autocast(student.device.type, enabled=False):
        entropy = F.binary_cross_entropy_with_logits(student, target, reduction="none")
        loss = (target - student.sigmoid()).abs().pow(power) * entropy
        return (loss if weight is None else weight * loss).sum()
