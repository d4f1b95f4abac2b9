"""Losses of masked distillation with receptive tokens (MasKD, Huang et al. 2023).

Shape suffixes: B images, C channels, H W map, T masks of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .shapes import check_same_shape

EPS = 1e-12


def mask_overlap(masks_BTHW: Tensor) -> Tensor:
    """Compute the mean Dice coefficient, 2 a.b / (a.a + b.b), of all pairs of different masks of an image."""
    masks_BTL = masks_BTHW.flatten(2)
    products_BTT = masks_BTL @ masks_BTL.transpose(1, 2)
    squares_BT = products_BTT.diagonal(dim1=1, dim2=2) + EPS
    dice_BTT = 2 * products_BTT / (squares_BT[:, :, None] + squares_BT[:, None])
    images, number = squares_BT.shape
    is_pair_TT = ~torch.eye(number, dtype=torch.bool, device=dice_BTT.device)
    return (dice_BTT * is_pair_TT).sum() / (images * number * (number - 1))


def masked_imitation_loss(student_BCHW: Tensor, teacher_BCHW: Tensor, masks_BTHW: Tensor, shares_BT: Tensor) -> Tensor:
    """Compute the squared error of features inside each mask, with a weighted sum over masks and the mean over images.

    mean over images of sum over masks of share * sum over (H, W) of M^2 * D / sum over (H, W) of M, with D the mean
    over channels of (F_S - F_T)^2. Gradients flow only to the student's features. Computed in at least float32.

    Raises:
        ValueError: the features differ in shape.
    """
    check_same_shape(student_BCHW, teacher_BCHW)
    dtype = torch.promote_types(student_BCHW.dtype, torch.float32)
    error_B1HW = (student_BCHW.to(dtype) - teacher_BCHW.detach().to(dtype)).square().mean(1, keepdim=True)
    masks_BTHW, shares_BT = masks_BTHW.detach().to(dtype), shares_BT.detach().to(dtype)
    inside_BT = (masks_BTHW.square() * error_B1HW).sum((2, 3)) / masks_BTHW.sum((2, 3)).clamp(min=EPS)
    return (shares_BT * inside_BT).sum(1).mean()
