"""Check of shapes, which would otherwise be broadcast silently."""

from __future__ import annotations

from torch import Tensor


def check_same_shape(student: Tensor, teacher: Tensor) -> None:
    """Raise a ValueError if the tensors of student and teacher differ in shape."""
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} have different shapes")
