"""FGD: focal distillation of foreground and background, global distillation of relations (Yang et al. 2022).

Shape suffixes: B images, C channels, H W map, N boxes, S levels, L positions of all levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..adapters import DetectorOutputs
from ..keys import Above, AtLeast
from ..losses.attention import attention_of_levels
from ..losses.flat_levels import FlatLevels, flatten_levels
from ..losses.focal import attended_square, background_of_levels, foreground_of_levels
from .adaptation import Adaptation, AdaptationLayers, LevelGroup
from .base import DISTILLER_REGISTRY, Distiller, Losses, in_float32
from .pair import NumLevels, Pair

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
TEMPERATURES_BY_NAME = {"FCOS": 0.8}


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
        temperature: Annotated[
            float | None, Above(0), "Temperature of the attention softmax; None means 0.8 for FCOS and 0.5 for others."
        ] = None
        num_levels: NumLevels = None
        adaptation: Adaptation = None

    def __init__(self, config: Config, pair: Pair):
        super().__init__(config, pair)
        pair = pair.with_levels(config.num_levels)
        published = TEMPERATURES_BY_NAME.get(pair.student.name, 0.5)
        self.temperature = published if config.temperature is None else config.temperature
        self.adaptation = AdaptationLayers.build(config.adaptation, pair, self.CONFIG_NODE)
        published = ONE_STAGE if pair.student.family == "one-stage" else TWO_STAGE
        published = WEIGHTS_BY_NAME.get(pair.student.name, published)
        keys = config.foreground_weight, config.background_weight, config.attention_weight, config.relation_weight
        weights = (default if key is None else key for key, default in zip(keys, published, strict=True))
        self.weights = self.weigh_losses(*weights, optional=(ATTENTION, RELATION))
        channels = self.adaptation.compared_channels if RELATION in self.weights else {}
        self.student_relations, self.teacher_relations = (
            nn.ModuleDict({str(stride): ContextBlock(number) for stride, number in channels.items()}) for _ in range(2)
        )

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        boxes_BN4 = pad_sequence([t.gt_boxes.tensor for t in targets], batch_first=True, padding_value=OUTSIDE)
        parts = [self.losses_of_levels(group, boxes_BN4) for group in self.adaptation.groups(student, teacher)]
        return {n: weight / len(targets) * sum(part[n] for part in parts) for n, weight in self.weights.items()}

    def losses_of_levels(self, group: LevelGroup, boxes_BN4: Tensor) -> Losses:
        """Compute the losses of levels, summed over levels and images, unweighted."""
        strides, student, teacher = group
        boxes_SBN4 = torch.stack([boxes_BN4 / stride for stride in strides])
        foreground_BL = foreground_of_levels(boxes_SBN4, [x.shape[-2:] for x in teacher])
        names = [str(stride) for stride in strides]
        return self._flat_losses(
            flatten_levels(student), flatten_levels(teacher), foreground_BL, FlatLevels.of(teacher), names
        )

    @in_float32
    def _flat_losses(
        self, student_BCL: Tensor, teacher_BCL: Tensor, foreground_BL: Tensor, levels: FlatLevels, names: list[str]
    ) -> Losses:
        positions_BL, channels_BSC = theirs = attention_of_levels(teacher_BCL, self.temperature, levels)
        difference_BCL = student_BCL - teacher_BCL
        error_BL = positions_BL * attended_square(difference_BCL, channels_BSC, levels)
        losses = {
            FOREGROUND: (foreground_BL * error_BL).sum(),
            BACKGROUND: (background_of_levels(foreground_BL, levels) * error_BL).sum(),
        }
        if ATTENTION in self.weights:
            ours = attention_of_levels(student_BCL, self.temperature, levels)
            losses[ATTENTION] = sum((a - b).abs().sum() for a, b in zip(ours, theirs, strict=True))
        if RELATION in self.weights:
            ours_BSC, theirs_BSC = (
                contexts([blocks[name] for name in names], x_BCL, levels)
                for blocks, x_BCL in ((self.student_relations, student_BCL), (self.teacher_relations, teacher_BCL))
            )
            related_BCL = difference_BCL + (ours_BSC - theirs_BSC).transpose(1, 2) @ levels.member_SL
            losses[RELATION] = torch.linalg.vector_norm(related_BCL).square()
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

    def forward(self, x_BCHW: Tensor) -> Tensor:
        context_BSC = contexts([self], x_BCHW.flatten(2), FlatLevels.of([x_BCHW]))
        return x_BCHW + context_BSC.transpose(1, 2)[..., None]


def contexts(blocks: list[ContextBlock], x_BCL: Tensor, levels: FlatLevels) -> Tensor:
    """Compute what the block of each level adds at every position of that level, (B, S, C)."""
    weight_SC = torch.cat([block.attention.weight.flatten(1) for block in blocks])
    bias_S = torch.cat([block.attention.bias for block in blocks])
    share_BSL = levels.softmax(weight_SC @ x_BCL + bias_S[:, None])
    gathered_SBC = (share_BSL @ x_BCL.transpose(1, 2)).unbind(1)
    return torch.stack([block.transform(x_BC) for block, x_BC in zip(blocks, gathered_SBC, strict=True)], 1)
