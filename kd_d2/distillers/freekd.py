"""FreeKD: imitation of details of the features inside masks of learned frequency prompts (Zhang et al. 2024).

Shape suffixes: B images, C channels, H W map, h w map of a scale, T tokens, S scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from ..adapters import DetectorOutputs
from ..keys import AtLeast
from ..losses import detail_loss, haar_transform, inverse_haar_transform, mask_overlap
from .base import DISTILLER_REGISTRY, in_float32
from .tokens import TokenDistiller


@DISTILLER_REGISTRY.register()
class FreeKD(TokenDistiller):
    """Distillation with semantic frequency prompts (Zhang et al. 2024), as in the authors' program.

    A Haar wavelet transform divides features into details of SCALES scales, D, and an approximation. Each has its own
    tokens, and a mask of a scale is sigmoid(token . sum over orientations of D_T) at each position. In the first
    TOKEN_ITERS iterations only the tokens are trained: by the detection losses of the teacher if details and
    approximation of its features are multiplied by the sums of their masks, plus the Dice coefficients of all pairs of
    masks. Thereafter

    L = WEIGHT * sum over levels and scales of mean over (B, C, h, w), orientations and tokens of
        M * |D(phi(F_S)) - D(F_T)|
    """

    loss_names = ("loss_freekd", "loss_freekd_aux_detection", "loss_freekd_aux_overlap")
    aux_loss_names = loss_names[1:]
    CONFIG_NODE = "FREEKD"

    @dataclass(frozen=True)
    class Config(TokenDistiller.Config):
        scales: Annotated[int, AtLeast(1), "Number of scales of the wavelet transform; each halves the maps' size."] = 3

    def tokens_for(self, channels: int) -> FrequencyPrompts:
        return FrequencyPrompts(channels, self.config.num_tokens, self.config.scales)

    def imitation(self, student: DetectorOutputs, teacher: DetectorOutputs) -> Tensor:
        total = 0
        for (stride, prompts), (ours, theirs) in zip(
            self.tokens(), self.adaptation.pairs(student, teacher), strict=True
        ):
            with torch.no_grad():
                masks = prompts.mean_masks(teacher.features[stride])
            total = total + detail_loss(ours, theirs, masks)
        return total


class FrequencyPrompts(nn.Module):
    """Tokens of one level for the approximation and each scale.

    Args:
        channels: C of the maps (B, C, H, W).
        number: T.
        scales: S.
    """

    def __init__(self, channels: int, number: int, scales: int):
        super().__init__()
        self.scales = scales
        self.tokens = nn.Parameter(0.01 * torch.randn(1 + scales, number, channels))

    @in_float32
    def masked(self, maps_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return maps (B, C, H, W) whose details and approximation are multiplied by the sums of their masks, and the overlap."""
        approximation, details = haar_transform(maps_BCHW, self.scales)
        masks = [masks_of(self.tokens[0], approximation), *self._masks_of_details(details)]
        approximation = approximation * masks[0].sum(1, keepdim=True)
        details = [detail * mask.sum(1)[:, None, None] for detail, mask in zip(details, masks[1:], strict=True)]
        masked = inverse_haar_transform(approximation, details, maps_BCHW.shape[-2:])
        return masked, sum(mask_overlap(mask) for mask in masks)

    @in_float32
    def mean_masks(self, maps_BCHW: Tensor) -> list[Tensor]:
        """Return the mean of the masks (B, 1, h, w) of each scale, from the finest on."""
        _, details = haar_transform(maps_BCHW, self.scales)
        return [masks.mean(1, keepdim=True) for masks in self._masks_of_details(details)]

    def _masks_of_details(self, details: list[Tensor]) -> list[Tensor]:
        return [masks_of(tokens_TC, detail.sum(2)) for tokens_TC, detail in zip(self.tokens[1:], details, strict=True)]


def masks_of(tokens_TC: Tensor, maps_BChw: Tensor) -> Tensor:
    """Return the masks (B, T, h, w) of tokens."""
    return torch.einsum("tc,bchw->bthw", tokens_TC, maps_BChw).sigmoid()
