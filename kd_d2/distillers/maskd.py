"""MasKD: imitation inside masks of learned receptive tokens (Huang et al. 2023).

Shape suffixes: B images, C channels, H W map, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..adapters import DetectorOutputs
from ..errors import UserError
from ..keys import Above, AtLeast
from ..losses import mask_overlap, masked_imitation_loss
from .adaptation import Adaptation, AdaptationLayers
from .base import DISTILLER_REGISTRY, Distiller, Losses, OptimizerSettings, ParamGroup, in_float32
from .pair import Pair

FEATURES, DETECTION, OVERLAP = "loss_maskd", "loss_maskd_aux_detection", "loss_maskd_aux_overlap"
ONE_STAGE, TWO_STAGE = 7.0, 1.0
WEIGHTS_BY_NAME = {"FCOS": 10.0, "RepPoints": 10.0}
"""WEIGHT of students for which the authors' differs from that of their family."""
MOST_TOKEN_ITERS, TRAINING_OVER_TOKENS, TRAINING_OVER_TEACHER_MASKS = 2000, 10, 25
"""Default lengths: the most iterations, and fractions of the training."""


@DISTILLER_REGISTRY.register()
class MasKD(Distiller):
    """Masked distillation with receptive tokens (Huang et al. 2023).

    A mask of a level is sigmoid(token . F_T) at each position. In the first TOKEN_ITERS iterations only the tokens are
    trained: by the detection losses of the teacher if each level of its features is multiplied by the sum of its masks,
    weighted by shares that depend on the features, plus the Dice coefficients of all pairs of masks. Thereafter

    L = WEIGHT * sum over levels of mean over images of sum over tokens of share * sum over (H, W) of
        M^2 * mean over channels of (phi(F_S) - F_T)^2, divided by the sum of M

    with M the masks, later multiplied by those of the student's features.
    """

    needs = frozenset({"features", "targets"})
    loss_names = (FEATURES, DETECTION, OVERLAP)
    aux_loss_names = loss_names[1:]
    CONFIG_NODE = "MASKD"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        weight: Annotated[
            float | None,
            AtLeast(0),
            "Weight of the method's loss; None means 10 for FCOS and RepPoints, 7 for other one-stage students, 1 for the rest.",
        ] = None
        num_tokens: Annotated[int, AtLeast(2), "Number of receptive tokens of each level."] = 6
        token_iters: Annotated[
            int | None,
            AtLeast(0),
            "Iterations, starting at START_ITER, in which the tokens are learned and the student imitates nothing; None means 2000, at "
            "most a tenth of SOLVER.MAX_ITER.",
        ] = None
        teacher_mask_iters: Annotated[
            int | None,
            AtLeast(0),
            "Iterations after TOKEN_ITERS in which the masks are those of the teacher alone, before they are multiplied by those of the "
            "student; None means SOLVER.MAX_ITER / 25, the authors' value for 180,000 iterations.",
        ] = None
        lr: Annotated[
            float, Above(0), "Learning rate of AdamW for the tokens, with cosine decay to zero after TOKEN_ITERS."
        ] = 0.01
        weight_decay: Annotated[float, AtLeast(0), "Weight decay of AdamW for the tokens."] = 1e-3
        adaptation: Adaptation = "1x1"

    def __init__(self, config: Config, pair: Pair):
        family = ONE_STAGE if pair.student.family == "one-stage" else TWO_STAGE
        super().__init__(config, pair, default_weight=WEIGHTS_BY_NAME.get(pair.student.name, family))
        if not pair.max_iter and None in (config.token_iters, config.teacher_mask_iters):
            raise UserError(
                "MasKD needs the number of training iterations, as in `Pair(student, teacher, max_iter=90000)`, or `token_iters` and "
                "`teacher_mask_iters` of `MasKD.Config`."
            )
        defaults = (
            min(MOST_TOKEN_ITERS, pair.max_iter // TRAINING_OVER_TOKENS),
            pair.max_iter // TRAINING_OVER_TEACHER_MASKS,
        )
        keys = config.token_iters, config.teacher_mask_iters
        learning, alone = (default if key is None else key for key, default in zip(keys, defaults, strict=True))
        self.learn_until = config.start_iter + learning
        self.teacher_masks_until = self.learn_until + alone
        end = pair.max_iter if config.end_iter is None else config.end_iter
        if end and learning and self.learn_until >= end:
            raise UserError(
                f"MODEL.KD.MASKD.START_ITER {config.start_iter} and TOKEN_ITERS {learning} leave no iteration before {end} in which the "
                "student imitates the teacher: lower them."
            )
        self.adaptation = AdaptationLayers.build(config.adaptation, pair, self.CONFIG_NODE)
        channels = {stride: theirs for stride, (_, theirs) in pair.channels.items()}
        self.levels = nn.ModuleDict(
            {str(s): ReceptiveTokens(number, config.num_tokens) for s, number in channels.items()}
        )

    @property
    def needs_of_teacher(self) -> frozenset[str]:
        return frozenset({"features", "losses"})

    @property
    def compares_classes(self) -> bool:
        return True  # the teacher's detection losses are those of the student's annotations

    def param_groups(self, cfg: CfgNode) -> list[ParamGroup]:
        config = self.config
        optimizer = OptimizerSettings(
            "maskd", config.lr, config.weight_decay, start_iter=config.start_iter, end_iter=self.learn_until
        )
        (others,) = super().param_groups(cfg)
        others.params = list(self.adaptation.parameters())
        return [ParamGroup(list(self.levels.parameters()), optimizer), others]

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        losses = self.idle_losses(like=student.images.tensor)
        iteration = get_event_storage().iter
        if iteration < self.learn_until:
            losses |= self._token_losses(teacher, targets)
        else:
            losses[FEATURES] = self._imitation(student, teacher, with_student=iteration >= self.teacher_masks_until)
        return losses

    def _token_losses(self, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        masked, overlaps = dict(teacher.features), []
        for stride, tokens in self._tokens():
            maps = teacher.features[stride]
            masks_BTHW = tokens.masks(maps)
            masked[stride] = maps * tokens.total(masks_BTHW, maps).to(maps.dtype)
            overlaps.append(mask_overlap(masks_BTHW))
        return {DETECTION: sum(teacher.losses_of(masked, targets).values()), OVERLAP: sum(overlaps)}

    def _imitation(self, student: DetectorOutputs, teacher: DetectorOutputs, with_student: bool) -> Tensor:
        total = 0
        for (stride, tokens), (ours, theirs) in zip(
            self._tokens(), self.adaptation.pairs(student, teacher), strict=True
        ):
            with torch.no_grad():
                masks_BTHW = tokens.masks(teacher.features[stride])
                if with_student:
                    selected = self.adaptation.selections[str(stride)].channels if self.adaptation.selections else None
                    masks_BTHW = masks_BTHW * tokens.masks(ours, selected)
                shares_BT = tokens.shares(teacher.features[stride])
            total = total + masked_imitation_loss(ours, theirs, masks_BTHW, shares_BT)
        return total

    def _tokens(self) -> list[tuple[int, ReceptiveTokens]]:
        return [(stride, self.levels[str(stride)]) for stride in self.adaptation.strides]


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

    def total(self, masks_BTHW: Tensor, maps_BCHW: Tensor) -> Tensor:
        """Return the weighted sum of the masks (B, 1, H, W)."""
        return (masks_BTHW * self.shares(maps_BCHW)[..., None, None]).sum(1, keepdim=True)


def sums_in_window(maps_BCHW: Tensor) -> Tensor:
    """Return what each element of a 3x3 kernel sees, summed over all positions, with zero padding, (B, C, 3, 3)."""

    def shifted(maps: Tensor, dim: int) -> Tensor:
        whole = maps.sum(dim)
        return torch.stack([whole - maps.select(dim, -1), whole, whole - maps.select(dim, 0)], dim)

    return shifted(shifted(maps_BCHW, 2), 3)
