"""FGD: focal distillation of objects and background by attention, global distillation of relations (Yang et al. 2022)."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..adapters import DetectorOutputs, DetectorSpec
from ..losses import attended_error, background_weights, foreground_weights, own_attention
from .adaptation import ADAPTATION_KERNELS, AdaptationLayers
from .base import (
    DISTILLER_REGISTRY,
    Distiller,
    check_choice,
    check_number,
    in_float32,
)

OUTSIDE = -1e4
"""Coordinates in pixels that pad an image's boxes: no position is there."""
PART_KEYS = ("FOREGROUND_WEIGHT", "BACKGROUND_WEIGHT", "ATTENTION_WEIGHT", "RELATION_WEIGHT")
ONE_STAGE = (1e-3, 5e-4, 5e-4, 5e-6)
POINTS = (1.6e-3, 8e-4, 8e-4, 8e-6)
TWO_STAGE = (5e-5, 2.5e-5, 5e-5, 5e-7)
WEIGHTS_BY_NAME = {"FCOS": POINTS, "RepPoints": POINTS}
"""alpha, beta, gamma and lambda of the students for which the authors have other weights than for their family."""


@DISTILLER_REGISTRY.register()
class FGD(Distiller):
    """Focal and global knowledge distillation (Yang et al. 2022).

    Of each level, summed over levels and divided by the images, times WEIGHT:

    - foreground and background: sum of M * A^S * A^C * (phi(F_S) - F_T)^2, with the teacher's attention A over positions and channels,
      and M as in `foreground_weights` and `background_weights`;
    - attention: sum of |A_S - A_T| over positions and over channels;
    - relation: sum of (R_S(phi(F_S)) - R_T(F_T))^2, with a `ContextBlock` R for each detector.
    """

    needs = frozenset({"features", "targets"})
    loss_names = ("loss_fgd_foreground", "loss_fgd_background", "loss_fgd_attention", "loss_fgd_relation")
    CONFIG_NODE = "FGD"

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # alpha; None: 1.6e-3 for FCOS and RepPoints, 1e-3 for other one-stage detectors, 5e-5 for the rest.
        node.FOREGROUND_WEIGHT = None
        # beta; None: 8e-4, 5e-4, 2.5e-5.
        node.BACKGROUND_WEIGHT = None
        # gamma; None: 8e-4, 5e-4, 5e-5.
        node.ATTENTION_WEIGHT = None
        # lambda; None: 8e-6, 5e-6, 5e-7.
        node.RELATION_WEIGHT = None
        # Of the attention's softmax.
        node.TEMPERATURE = 0.5
        # phi, between student and teacher features: "none", "1x1" or "3x3"; None: "1x1" where the channels differ.
        node.ADAPTATION = None

    @classmethod
    def validate_config(cls, node: CfgNode) -> None:
        check_choice(cls.CONFIG_NODE, "ADAPTATION", node.ADAPTATION, (None, *ADAPTATION_KERNELS))
        for key in PART_KEYS:
            if node[key] is not None:
                check_number(cls.CONFIG_NODE, key, node[key], 0)
        check_number(cls.CONFIG_NODE, "TEMPERATURE", node.TEMPERATURE, 0, exclusive=True)

    @configurable
    def __init__(
        self,
        *,
        adaptation: AdaptationLayers,
        channels: dict[int, int],
        weights: tuple[float, float, float, float] = ONE_STAGE,
        temperature: float = 0.5,
    ):
        """
        Args:
            adaptation: the layers phi; its strides are the levels that are compared.
            channels: the teacher's by stride.
            weights: of the losses, in order of `loss_names`.
            temperature: of the attention's softmax.
        """
        super().__init__()
        self.adaptation = adaptation
        self.weights = weights
        self.temperature = temperature
        self.student_relations, self.teacher_relations = (
            nn.ModuleDict({str(stride): ContextBlock(number) for stride, number in channels.items()}) for _ in range(2)
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> dict:
        node = cfg.MODEL.KD.FGD
        adaptation = AdaptationLayers.from_node(cls.CONFIG_NODE, node, student, teacher)
        published = ONE_STAGE if student.family == "one-stage" else TWO_STAGE
        published = WEIGHTS_BY_NAME.get(student.name, published)
        return {
            "adaptation": adaptation,
            "channels": {stride: teacher.shapes[stride].channels for stride in adaptation.strides},
            "weights": tuple(
                node.WEIGHT * (default if node[key] is None else node[key])
                for key, default in zip(PART_KEYS, published, strict=True)
            ),
            "temperature": node.TEMPERATURE,
        }

    def forward(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[str, Tensor]:
        boxes = [target.gt_boxes.tensor for target in targets]
        boxes_BN4 = pad_sequence(boxes, batch_first=True, padding_value=OUTSIDE)
        levels = [
            torch.stack(self.level_losses(s, t, boxes_BN4 / stride, str(stride)))
            for stride, (s, t) in zip(self.adaptation.strides, self.adaptation.pairs(student, teacher), strict=True)
        ]
        totals = sum(levels).unbind()
        return {n: w * total for n, w, total in zip(self.loss_names, self.weights, totals, strict=True)}

    @in_float32
    def level_losses(
        self, student_BCHW: Tensor, teacher_BCHW: Tensor, boxes_BN4: Tensor, stride: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The losses of one level, unweighted, in order of `loss_names`; boxes in its cells."""
        foreground_BHW = foreground_weights(boxes_BN4, *teacher_BCHW.shape[-2:])
        ours = own_attention(student_BCHW, self.temperature)
        positions_B1HW, channels_BC11 = theirs = own_attention(teacher_BCHW, self.temperature)
        error_BHW = positions_B1HW[:, 0] * attended_error(student_BCHW, teacher_BCHW, channels_BC11)
        related = self.student_relations[stride](student_BCHW) - self.teacher_relations[stride](teacher_BCHW)
        losses = (
            (foreground_BHW * error_BHW).sum(),
            (background_weights(foreground_BHW) * error_BHW).sum(),
            sum((a - b).abs().sum() for a, b in zip(ours, theirs, strict=True)),
            related.square().sum(),
        )
        return tuple(loss / len(teacher_BCHW) for loss in losses)


class ContextBlock(nn.Module):
    """F + W2 relu(LN(W1 * sum over positions of F * softmax over positions of w.F)): a global context block (Cao et al. 2019).

    W2 begins as zero, the block as the identity.

    Args:
        channels: C of the maps (B, C, H, W); half as many are within.
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
        share_BL1 = self.attention(x_BCHW).flatten(2).softmax(2).transpose(1, 2)
        context_BC = (x_BCHW.flatten(2) @ share_BL1)[..., 0]
        return x_BCHW + self.transform(context_BC)[..., None, None]
