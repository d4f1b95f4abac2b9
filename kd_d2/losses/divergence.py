"""Divergences of softmax distributions, plain or decoupled (DKD).

Shape suffixes: N proposals, K classes and background.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .shapes import check_same_shape


def softmax_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute temperature^2 * KL(softmax(T / temperature) || softmax(S / temperature)) over the last dimension.

    Gradients flow only to the student. Computed in at least float32.

    Args:
        student_logits, teacher_logits: (..., D).

    Returns:
        (...), each summed over D.

    Raises:
        ValueError: the logits differ in shape.
    """
    check_same_shape(student_logits, teacher_logits)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student = (student_logits.to(dtype) / temperature).log_softmax(-1)
    teacher = (teacher_logits.detach().to(dtype) / temperature).log_softmax(-1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)


def decoupled_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 0.25,
    temperature: float = 1.0,
    num_proposals: Tensor | float | None = None,
) -> Tensor:
    """Compute decoupled knowledge distillation (Zhao et al. 2022, equation 7): alpha * TCKD + beta * NCKD.

    TCKD is the divergence of (p_y, 1 - p_y), y the label; NCKD that of the softmax over all other classes. Both are
    averaged over proposals, times temperature^2. Gradients flow only to the student. Computed in at least float32.

    Args:
        student_logits, teacher_logits: (N, K).
        labels: (N,) int64, class of each proposal.
        num_proposals: divisor; None for N, at least 1.

    Returns:
        A scalar; zero, with a gradient of zero, if there are no proposals.

    Raises:
        ValueError: the logits differ in shape.
    """
    check_same_shape(student_logits, teacher_logits)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    is_label_NK = labels[:, None] == torch.arange(student_logits.shape[1], device=labels.device)
    students, teachers = (
        _decoupled(logits.to(dtype) / temperature, is_label_NK) for logits in (student_logits, teacher_logits.detach())
    )
    target, other = ((log_t.exp() * (log_t - log_s)).sum() for log_s, log_t in zip(students, teachers, strict=True))
    count = max(len(labels), 1) if num_proposals is None else num_proposals
    return temperature**2 * (alpha * target + beta * other) / count


def _decoupled(logits_NK: Tensor, is_label_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return log probabilities of label and rest (N, 2), and within the other classes (N, K), 0 at the label."""
    others_NK = logits_NK.masked_fill(is_label_NK, -torch.inf)
    rest_N = others_NK.logsumexp(1)
    label_N = logits_NK.where(is_label_NK, 0).sum(1)
    return torch.stack([label_N, rest_N], 1).log_softmax(1), (others_NK - rest_N[:, None]).masked_fill(is_label_NK, 0)
