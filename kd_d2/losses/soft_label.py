"""Soft labels for heads of sigmoids (Hinton et al. 2015, as papers on detectors compare with them)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def soft_label_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weight: Tensor | None = None,
    temperature: float = 1.0,
    focus: float = 0.0,
) -> Tensor:
    """Sum over all elements of KL(Bernoulli(p_T) || Bernoulli(p_S)), with p = sigmoid(logits / temperature).

    Multiplied by the temperature's square, so that gradients keep their size. Gradients go to the student alone; the
    gradient is made in the forward pass, and besides it nothing is kept. Computed in float32 or better.

    Args:
        student_logits, teacher_logits: of one shape; each element is a binary classification of its own.
        weight: of each element, or of a shape that broadcasts to theirs.
        focus: each element is also weighted by |p_T - p_S| to this power, without gradient.
    """
    return _BernoulliKL.apply(student_logits, teacher_logits.detach(), weight, temperature, focus)


class _BernoulliKL(torch.autograd.Function):
    """KL = p_T * (l_T - l_S) + softplus(l_S) - softplus(l_T); its derivative in l_S is p_S - p_T."""

    @staticmethod
    def forward(
        ctx,
        student_logits: Tensor,
        teacher_logits: Tensor,
        weight: Tensor | None,
        temperature: float,
        focus: float,
    ) -> Tensor:
        dtype = torch.promote_types(student_logits.dtype, torch.float32)
        student, teacher = student_logits.to(dtype) / temperature, teacher_logits.to(dtype) / temperature
        target = teacher.sigmoid()
        divergence = (teacher - student).mul_(target).add_(F.softplus(student)).sub_(F.softplus(teacher))
        difference = student.sigmoid_().sub_(target)
        weights = [] if weight is None else [weight]
        if focus:
            weights.append(difference.abs().pow_(focus))
        gradient = difference.mul_(temperature)
        for weight in weights:
            divergence *= weight
            gradient *= weight
        ctx.save_for_backward(gradient.to(student_logits.dtype))
        return divergence.sum() * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss.to(gradient.dtype), None, None, None, None
