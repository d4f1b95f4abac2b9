"""MasKD: imitation inside masks of learned receptive tokens (Huang et al. 2023).

Shape suffixes: B images, C channels, H W map, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..adapters import DetectorOutputs
from ..keys import AtLeast
from ..losses import mask_overlap, masked_imitation_loss
from .base import DISTILLER_REGISTRY, in_float32
from .pair import Pair
from .tokens import TokenDistiller

ONE_STAGE, TWO_STAGE = 7.0, 1.0
WEIGHTS_BY_NAME = {"FCOS": 10.0, "RepPoints": 10.0}
"""WEIGHT of students for which the authors' differs from that of their family."""
TRAINING_OVER_TEACHER_MASKS = 25
"""The default of TEACHER_MASK_ITERS, a fraction of the training."""


@DISTILLER_REGISTRY.register()
class MasKD(TokenDistiller):
    """Masked distillation with receptive tokens (Huang et al. 2023).

    A mask of a level is sigmoid(token . F_T) at each position. In the first TOKEN_ITERS iterations only the tokens are
    trained: by the detection losses of the teacher if each level of its features is multiplied by the sum of its masks,
    weighted by shares that depend on the features, plus the Dice coefficients of all pairs of masks. Thereafter

    L = WEIGHT * sum over levels of mean over images of sum over tokens of share * sum over (H, W) of
        M^2 * mean over channels of (phi(F_S) - F_T)^2, divided by the sum of M

    with M the masks, later multiplied by those of the student's features.
    """

    loss_names = ("loss_maskd", "loss_maskd_aux_detection", "loss_maskd_aux_overlap")
    aux_loss_names = loss_names[1:]
    CONFIG_NODE = "MASKD"

    @dataclass(frozen=True)
    class Config(TokenDistiller.Config):
        weight: Annotated[
            float | None,
            AtLeast(0),
            "Weight of the method's loss; None means 10 for FCOS and RepPoints, 7 for other one-stage students, 1 for the rest.",
        ] = None
        teacher_mask_iters: Annotated[
            int | None,
            AtLeast(0),
            "Iterations after TOKEN_ITERS in which the masks are those of the teacher alone, before they are multiplied by those of the "
            "student; None means SOLVER.MAX_ITER / 25, the authors' value for 180,000 iterations.",
        ] = None

    def __init__(self, config: Config, pair: Pair):
        family = ONE_STAGE if pair.student.family == "one-stage" else TWO_STAGE
        super().__init__(config, pair, default_weight=WEIGHTS_BY_NAME.get(pair.student.name, family))
        default = pair.max_iter // TRAINING_OVER_TEACHER_MASKS
        self.teacher_masks_until = self.learn_until + self.iterations("teacher_mask_iters", default, pair)

    def tokens_for(self, channels: int) -> ReceptiveTokens:
        return ReceptiveTokens(channels, self.config.num_tokens)

    def imitation(self, student: DetectorOutputs, teacher: DetectorOutputs) -> Tensor:
        with_student = get_event_storage().iter >= self.teacher_masks_until
        total = 0
        for (stride, tokens), (ours, theirs) in zip(
            self.tokens(), self.adaptation.pairs(student, teacher), strict=True
        ):
            with torch.no_grad():
                masks_BTHW = tokens.masks(teacher.features[stride])
                if with_student:
                    selected = self.adaptation.selections[str(stride)].channels if self.adaptation.selections else None
                    masks_BTHW = masks_BTHW * tokens.masks(ours, selected)
                shares_BT = tokens.shares(teacher.features[stride])
            total = total + masked_imitation_loss(ours, theirs, masks_BTHW, shares_BT)
        return total


class ReceptiveTokens(nn.Module):
    """Tokens of one level, and the layers that weight their masks.

    Args:
        channels: C of the maps (B, C, H, W).
        number: T.
    """

    def __init__(self, channels: int, number: int):
        super().__init__()
        self.tokens = nn.Parameter(0.01 * torch.randn(number, channels))
        self.context = nn.Conv2d(channels, channels, 3, padding=1)
        self.share = nn.Linear(channels, number)
        for layer in (self.context, self.share):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    @in_float32
    def masks(self, maps_BCHW: Tensor, channels: Tensor | None = None) -> Tensor:
        """Return the masks (B, T, H, W).

        Args:
            channels: channels of the tokens that the maps have, whose products are scaled to the number of all; None
                for all.
        """
        tokens_TC = self.tokens
        if channels is not None:
            tokens_TC = tokens_TC[:, channels] * (tokens_TC.shape[1] / len(channels))
        return torch.einsum("tc,bchw->bthw", tokens_TC, maps_BCHW).sigmoid()

    @in_float32
    def shares(self, maps_BCHW: Tensor) -> Tensor:
        """Return the weights of the masks (B, T), whose sum is 1.

        They depend on the mean over positions of a convolution, here computed from sums of the maps.
        """
        sums_BC33 = sums_in_window(maps_BCHW)
        mean_BC = F.conv2d(sums_BC33, self.context.weight).flatten(1) / maps_BCHW.shape[2:].numel()
        return self.share(mean_BC + self.context.bias).softmax(1)

    def masked(self, maps_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps multiplied by the weighted sum of their masks, (B, C, H, W), and the overlap of the masks."""
        masks_BTHW = self.masks(maps_BCHW)
        total_B1HW = (masks_BTHW * self.shares(maps_BCHW)[..., None, None]).sum(1, keepdim=True)
        return maps_BCHW * total_B1HW, mask_overlap(masks_BTHW)


def sums_in_window(maps_BCHW: Tensor) -> Tensor:
    """Return what each element of a 3x3 kernel sees, summed over all positions, with zero padding, (B, C, 3, 3)."""

    def shifted(maps: Tensor, dim: int) -> Tensor:
        whole = maps.sum(dim)
        return torch.stack([whole - maps.select(dim, -1), whole, whole - maps.select(dim, 0)], dim)

    return shifted(shifted(maps_BCHW, 2), 3)
