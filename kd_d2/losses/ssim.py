"""Structural similarity as a loss (Wang et al. 2004; de Rijk 2022, equations 2 to 4)."""

import kornia
import torch
from torch import Tensor


def ssim_loss(student: Tensor, teacher: Tensor, window_size: int = 11, max_val: float = 1.0) -> Tensor:
    """Mean structural dissimilarity (1 - SSIM) / 2 of two feature maps, every channel an image of its own.

    Gaussian window with sigma 1.5, K1 = 0.01, K2 = 0.03, reflected borders (kornia's `ssim_loss`). Always computed in
    float32.

    Args:
        student, teacher: (B, C, H, W), values in [0, max_val].
        window_size: side of the window in cells, odd and at most 2 * min(H, W) - 1.
        max_val: the range of the values, L in the formula.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: the shapes differ, or the window is even or too large for the map.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} have different shapes")
    largest = 2 * min(student.shape[-2:]) - 1
    if window_size % 2 == 0 or not 1 <= window_size <= largest:
        raise ValueError(
            f"window_size is {window_size}; on a map of {tuple(student.shape[-2:])} it must be odd and at most {largest}"
        )
    with torch.autocast(student.device.type, enabled=False):
        return kornia.losses.ssim_loss(student.float(), teacher.float(), window_size, float(max_val))
