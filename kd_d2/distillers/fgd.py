"""FGD: focal distillation of foreground and background, global distillation of relations (Yang et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..adapters import DetectorOutputs
from ..keys import Above, AtLeast
from ..losses import background_weights, foreground_weights, own_attention
from ..losses.focal import attended_square
from .adaptation import Adaptation, AdaptationLayers
from .base import DISTILLER_REGISTRY, Distiller, Losses, in_float32
from .pair import Pair
from .pointwise import pointwise

FOREGROUND, BACKGROUND, ATTENTION, RELATION = (
    f"loss_fgd_{part}" for part in ("foreground", "background", "attention", "relation")
)
OUTSIDE = -1e4
"""Coordinates in pixels of boxes that pad the batch; they contain no position."""
ONE_STAGE = (1e-3, 5e-4, 5e-4, 5e-6)
POINTS = (1.6e-3, 8e-4, 8e-4, 8e-6)
TWO_STAGE = (5e-5, 2.5e-5, 5e-5, 5e-7)
WEIGHTS_BY_NAME = {"FCOS": POINTS, "RepPoints": POINTS}
"""alpha, beta, gamma and lambda of students for which the authors' weights differ from those of their family."""


@DISTILLER_REGISTRY.register()
class FGD(Distiller):
    """Focal and global knowledge distillation (Yang et al. 2022).

    Losses of each level, summed over levels and divided by the number of images, times WEIGHT:

    - foreground and background: sum of M * A^S * A^C * (phi(F_S) - F_T)^2, with the teacher's attention A over
      positions and channels, and M as in `foreground_weights` and `background_weights`;
    - attention: sum of |A_S - A_T| over positions and over channels;
    - relation: sum of (R_S(phi(F_S)) - R_T(F_T))^2, with a `ContextBlock` R for each detector.

    Attention and relation are skipped if their weight is 0.
    """

    needs = frozenset({"features", "targets"})
    loss_names = (FOREGROUND, BACKGROUND, ATTENTION, RELATION)
    CONFIG_NODE = "FGD"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        foreground_weight: Annotated[
            float | None,
            AtLeast(0),
            "Foreground weight (alpha); None means 1.6e-3 for FCOS and RepPoints, 1e-3 for other one-stage students, 5e-5 for the rest.",
        ] = None
        background_weight: Annotated[
            float | None,
            AtLeast(0),
            "Background weight (beta); None means 8e-4 for FCOS and RepPoints, 5e-4 for other one-stage students, 2.5e-5 for the rest.",
        ] = None
        attention_weight: Annotated[
            float | None,
            AtLeast(0),
            "Attention weight (gamma); None means 8e-4 for FCOS and RepPoints, 5e-4 for other one-stage students, 5e-5 for the rest.",
        ] = None
        relation_weight: Annotated[
            float | None,
            AtLeast(0),
            "Relation weight (lambda); None means 8e-6 for FCOS and RepPoints, 5e-6 for other one-stage students, 5e-7 for the rest.",
        ] = None
        temperature: Annotated[float, Above(0), "Temperature of the attention softmax."] = 0.5
        adaptation: Adaptation = None

    def __init__(self, config: Config, pair: Pair):
        super().__init__(config, pair)
        self.adaptation = AdaptationLayers.build(config.adaptation, pair, self.CONFIG_NODE)
        published = ONE_STAGE if pair.student.family == "one-stage" else TWO_STAGE
        published = WEIGHTS_BY_NAME.get(pair.student.name, published)
        keys = config.foreground_weight, config.background_weight, config.attention_weight, config.relation_weight
        weights = (default if key is None else key for key, default in zip(keys, published, strict=True))
        self.weights = self.weigh_losses(*weights, optional=(ATTENTION, RELATION))
        channels = {str(stride): number for stride, (_, number) in pair.channels.items() if RELATION in self.weights}
        self.student_relations, self.teacher_relations = (
            nn.ModuleDict({stride: ContextBlock(number) for stride, number in channels.items()}) for _ in range(2)
        )

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        boxes = [target.gt_boxes.tensor for target in targets]
        boxes_BN4 = pad_sequence(boxes, batch_first=True, padding_value=OUTSIDE)
        levels = [
            self.level_losses(s, t, boxes_BN4 / stride, str(stride))
            for stride, (s, t) in zip(self.adaptation.strides, self.adaptation.pairs(student, teacher), strict=True)
        ]
        return {n: weight / len(targets) * sum(level[n] for level in levels) for n, weight in self.weights.items()}

    @in_float32
    def level_losses(self, student_BCHW: Tensor, teacher_BCHW: Tensor, boxes_BN4: Tensor, stride: str) -> Losses:
        """Compute the losses of one level, summed over images and unweighted, with boxes in units of its cells."""
        foreground_BHW = foreground_weights(boxes_BN4, *teacher_BCHW.shape[-2:])
        positions_B1HW, channels_BC11 = theirs = own_attention(teacher_BCHW, self.config.temperature)
        difference_BCHW = student_BCHW - teacher_BCHW
        error_BHW = positions_B1HW[:, 0] * attended_square(difference_BCHW, channels_BC11)
        losses = {
            FOREGROUND: (foreground_BHW * error_BHW).sum(),
            BACKGROUND: (background_weights(foreground_BHW) * error_BHW).sum(),
        }
        if ATTENTION in self.weights:
            ours = own_attention(student_BCHW, self.config.temperature)
            losses[ATTENTION] = sum((a - b).abs().sum() for a, b in zip(ours, theirs, strict=True))
        if RELATION in self.weights:
            ours_BC = self.student_relations[stride].context(student_BCHW)
            theirs_BC = self.teacher_relations[stride].context(teacher_BCHW)
            related_BCHW = difference_BCHW + (ours_BC - theirs_BC)[..., None, None]
            losses[RELATION] = torch.linalg.vector_norm(related_BCHW).square()
        return losses


class ContextBlock(nn.Module):
    """Global context block: F + W2 relu(LN(W1 * sum over positions of F * softmax over positions of w.F)).

    See Cao et al. 2019. W2 is initialized to zero, so that the block starts as the identity.

    Args:
        channels: C of the maps (B, C, H, W); the hidden layer has half as many.
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(1, channels // 2)
        self.attention = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, channels)
        )
        nn.init.kaiming_normal_(self.attention.weight, nonlinearity="relu")
        nn.init.zeros_(self.attention.bias)
        nn.init.zeros_(self.transform[-1].weight)
        nn.init.zeros_(self.transform[-1].bias)

    def context(self, x_BCHW: Tensor) -> Tensor:
        """Return the context (B, C), which is added at every position."""
        x_BCL = x_BCHW.flatten(2)
        share_BL1 = pointwise(self.attention, x_BCL).softmax(2).transpose(1, 2)
        return self.transform((x_BCL @ share_BL1)[..., 0])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.context(x_BCHW)[..., None, None]
