"""Min-max normalization of feature maps."""

import torch
from torch import Tensor

SCOPES = ("sample", "channel", "joint", "none")


def min_max_normalize(
    student: Tensor, teacher: Tensor, scope: str = "sample", eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Shift and scale a pair of feature maps to [0, 1] (nu in de Rijk 2022, equation 1).

    Args:
        student, teacher: (B, C, H, W).
        scope: "sample": each map by its own range over (C, H, W), per sample; "channel": by its own range over (H, W),
            per sample and channel; "joint": both by their common range, per sample; "none": unchanged.
        eps: smallest range to divide by, so that constant maps give zeros and finite gradients.

    Returns:
        The normalized student and teacher, in at least float32; unchanged for the scope "none".

    Raises:
        ValueError: the scope is unknown.
    """
    if scope == "none":
        return student, teacher
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}; it must be one of {', '.join(SCOPES)}")
    student, teacher = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (student, teacher))
    dims = (2, 3) if scope == "channel" else (1, 2, 3)
    low_s, high_s = student.amin(dims, keepdim=True), student.amax(dims, keepdim=True)
    low_t, high_t = teacher.amin(dims, keepdim=True), teacher.amax(dims, keepdim=True)
    if scope == "joint":
        low_s = low_t = torch.minimum(low_s, low_t)
        high_s = high_t = torch.maximum(high_s, high_t)
    return (
        (student - low_s) / (high_s - low_s).clamp(min=eps),
        (teacher - low_t) / (high_t - low_t).clamp(min=eps),
    )
