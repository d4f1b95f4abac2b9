"""Mean SSIM loss and its gradient in one pass over the maps, for training a student against a fixed teacher."""

from __future__ import annotations

import functools
import importlib.util
import logging
from types import ModuleType

import torch
from torch import Tensor

from . import ssim_chunks
from .gaussian import makes_plain_tensors
from .similarity import similarity_map

logger = logging.getLogger(__name__)

HAS_TRITON = importlib.util.find_spec("triton") is not None


class FusedSSIMLoss(torch.autograd.Function):
    """(student, teacher, window_size, max_val) -> mean of (1 - SSIM) / 2, equal to that of `similarity_map`.

    The loss is a scalar, so its gradient is computed in the forward pass, chunk by chunk; only the gradient and the
    inputs are stored. This takes four blurs forward (of s, t, s^2 + t^2 and s * t) and three adjoint ones. Gradients
    flow to the student; a second backward pass recomputes the gradient, with plain operations if create_graph is set.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, window_size: int, max_val: float) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.window_size, ctx.max_val = window_size, max_val
        ctx.gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        return loss_and_gradient(student, teacher, window_size, max_val, ctx.gradient)

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        student, teacher = ctx.saved_tensors
        if torch.is_grad_enabled():
            dtype = torch.promote_types(student.dtype, torch.float32)
            maps = student.to(dtype), teacher.to(dtype)
            loss = (1 - similarity_map(*maps, ctx.window_size, ctx.max_val, (1, 1, 1)).mean()) / 2
            (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
            return gradient * grad_loss, None, None, None
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            gradient = torch.empty_like(student)
            loss_and_gradient(student, teacher, ctx.window_size, ctx.max_val, gradient)
        # The stored gradient is that of a sum; it is divided only here, together with a gradient scaler's factor.
        scale = grad_loss * (-2 / student.numel())
        if gradient.dtype == scale.dtype:
            return gradient.mul_(scale), None, None, None
        return (gradient.to(scale.dtype) * scale).to(gradient.dtype), None, None, None


def loss_and_gradient(
    student: Tensor, teacher: Tensor, window_size: int, max_val: float, gradient: Tensor | None
) -> Tensor:
    """Return the mean loss and write the gradient of the sum of SSIM / 4 to `gradient`; uses Triton where available."""
    can_use_triton = student.is_cuda and student.dtype != torch.float64 and makes_plain_tensors()
    kernels = _triton_kernels(student.device) if can_use_triton else None
    return (kernels or ssim_chunks).loss_and_gradient(student, teacher, window_size, max_val, gradient)


@functools.cache
def _triton_kernels(device: torch.device) -> ModuleType | None:
    """Return the module of Triton kernels; None without Triton, or, with a warning, if the kernels fail."""
    if not HAS_TRITON:
        return None
    try:
        from . import ssim_triton

        maps = torch.zeros(1, 1, 16, 16, device=device)
        ssim_triton.loss_and_gradient(maps, maps, 11, 1.0, torch.empty_like(maps))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        logger.warning(
            f"The Triton kernels of SSIM failed on {device} ({reason}); falling back to the slower PyTorch implementation."
        )
        return None
    return ssim_triton
