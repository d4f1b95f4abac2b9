"""Channel-wise distillation loss on distributions over positions (Shu et al. 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import check_same_shape


def channel_wise_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute temperature^2 * mean over (B, C) of KL(p_T || p_S), with p the softmax of F / temperature over positions.

    Gradients flow only to the student. Computed in at least float32.

    Args:
        student, teacher: (B, C, H, W), feature maps or class logits.

    Raises:
        ValueError: the maps differ in shape.
    """
    check_same_shape(student, teacher)
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_student, log_teacher = (
        (maps.to(dtype).flatten(2) / temperature).log_softmax(2) for maps in (student, teacher.detach())
    )
    total = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return total * (temperature**2 / max(1, student.shape[:2].numel()))
