"""Quality focal loss: binary cross-entropy with the teacher's probabilities, weighted by the difference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .derivatives import first_derivative_only
from .shapes import check_same_shape, check_weight


def quality_focal_loss(
    student_logits: Tensor, teacher_logits: Tensor, weight: Tensor | None = None, power: float = 1.0
) -> Tensor:
    """Compute the sum over all elements of |p_T - p_S|^power * BCE(p_S, p_T), with p = sigmoid(logits).

    Li et al. 2020, equation 2, with the teacher's probabilities as targets. For power 0 it is the cross-entropy alone.
    For power 1, as in CrossKD (Wang et al. 2024), the gradient is computed in the forward pass, with two thirds of the
    memory traffic and one tensor saved.
    Gradients flow only to the student, through both factors. Computed in at least float32.

    Args:
        student_logits, teacher_logits: equal in shape; each element is a separate binary classification.
        weight: weight of each element, broadcastable to the logits.
        power: beta in the paper, at least 0.

    Raises:
        ValueError: the logits differ in shape, or the weight does not broadcast to them.
    """
    check_same_shape(student_logits, teacher_logits)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student, teacher = student_logits.to(dtype), teacher_logits.detach().to(dtype)
    weight = student.new_ones(()) if weight is None else weight.detach().to(dtype)
    check_weight(weight, student)
    if power == 1:
        return _LinearQualityFocal.apply(student, teacher, weight)
    target = teacher.sigmoid()
    if power == 0:
        return F.binary_cross_entropy_with_logits(student, target, weight, reduction="sum")
    entropy = F.binary_cross_entropy_with_logits(student, target, reduction="none")
    difference = (target - student.sigmoid()).abs()
    smallest = torch.finfo(dtype).eps  # below it, the gradient of a power below 1 is not finite
    factor = difference.clamp(min=smallest).pow(power).where(difference >= smallest, 0.0**power)
    return (weight * factor * entropy).sum()


class _LinearQualityFocal(torch.autograd.Function):
    """(student, teacher, weight) -> the loss with power 1.

    With d = p_S - p_T, the derivative of the cross-entropy e, the gradient is |d| * d + sign(d) * p_S * (1 - p_S) * e.
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
    @first_derivative_only
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss, None, None
