"""Quality focal loss between probabilities: binary cross-entropy with the teacher's, weighted by the difference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def quality_focal_loss(
    student_logits: Tensor, teacher_logits: Tensor, weight: Tensor | None = None, power: float = 1.0
) -> Tensor:
    """Sum over all elements of |p_T - p_S|^power * BCE(p_S, p_T), with p = sigmoid(logits).

    Li et al. 2020, equation 5, with the teacher's probabilities as targets; CrossKD (Wang et al. 2024) takes power 1, for which the
    gradient is computed in the forward pass: it takes two thirds of the memory traffic, and one tensor is saved for the backward pass.
    Gradients go to the student alone, through both factors. Computed in float32 or better.

    Args:
        student_logits, teacher_logits: of one shape; each element is a binary classification of its own.
        weight: of each element, or of a shape that broadcasts to theirs.
        power: beta of the paper.
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student, teacher = student_logits.to(dtype), teacher_logits.detach().to(dtype)
    weight = student.new_ones(()) if weight is None else weight.to(dtype)
    if power == 1:
        return _LinearQualityFocal.apply(student, teacher, weight)
    target = teacher.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(student, target, reduction="none")
    return (weight * (target - student.sigmoid()).abs().pow(power) * entropy).sum()


class _LinearQualityFocal(torch.autograd.Function):
    """(student, teacher, weight) -> the loss of power 1.

    With d = p_S - p_T and the cross-entropy e, whose derivative is d, the gradient is |d| * d + sign(d) * p_S * (1 - p_S) * e.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        target, probability = teacher.sigmoid(), student.sigmoid()
        entropy = F.softplus(student).addcmul_(target, student, value=-1)
        difference = probability - target
        size = difference.abs()
        loss = torch.mul(size, entropy, out=target).mul_(weight).sum()
        if ctx.needs_input_grad[0]:
            gradient = torch.ops.aten.sigmoid_backward(entropy, probability).mul_(difference.sgn())
            ctx.save_for_backward(gradient.addcmul_(difference, size).mul_(weight))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss, None, None
