"""Checks of shapes, which would otherwise be broadcast silently."""

from __future__ import annotations

from torch import Tensor


def check_same_shape(student: Tensor, teacher: Tensor) -> None:
    """Raise a ValueError if the tensors of student and teacher differ in shape."""
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} have different shapes")


def check_weight(weight: Tensor, weighted: Tensor) -> None:
    """Raise a ValueError if the weight does not broadcast to what it weights, or would itself enlarge it."""
    sizes = zip(weight.shape, weighted.shape[weighted.dim() - weight.dim() :], strict=False)
    if weight.dim() > weighted.dim() or any(size not in (1, full) for size, full in sizes):
        raise ValueError(f"weight {tuple(weight.shape)} does not broadcast to {tuple(weighted.shape)}")
