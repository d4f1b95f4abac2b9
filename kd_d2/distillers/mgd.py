"""MGD: the student's features, partly hidden, are to generate the teacher's (Yang et al. 2022)."""

from __future__ import annotations

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor

from ..adapters import DetectorOutputs, DetectorSpec
from ..errors import UserError
from .adaptation import ADAPTATION_KERNELS, AdaptationLayers
from .base import (
    DISTILLER_REGISTRY,
    Distiller,
    check_choice,
    check_number,
    in_float32,
)
from .generation import generation_blocks, random_mask


@DISTILLER_REGISTRY.register()
class MGD(Distiller):
    """Masked generative distillation (Yang et al. 2022).

    L = WEIGHT * sum over levels and (B, C, H, W) of (G(M * phi(F_S)) - F_T)^2 / B

    M hides positions at random, G, two 3x3 convolutions with a ReLU between, fills them in again.
    """

    needs = frozenset({"features"})
    loss_names = ("loss_mgd",)
    CONFIG_NODE = "MGD"

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # None: 2e-5 for one-stage detectors, 5e-7 for the others.
        node.WEIGHT = None
        # The part that is hidden; None: 0.65 for one-stage detectors, 0.45 for the others.
        node.MASK_RATIO = None
        # phi, between student and teacher features: "none", "1x1" or "3x3"; None: "1x1" where the channels differ.
        node.ADAPTATION = None

    @classmethod
    def weight_default(cls, node: CfgNode, student: DetectorSpec) -> float:
        return 2e-5 if student.family == "one-stage" else 5e-7

    @classmethod
    def validate_config(cls, node: CfgNode) -> None:
        check_choice(cls.CONFIG_NODE, "ADAPTATION", node.ADAPTATION, (None, *ADAPTATION_KERNELS))
        if node.MASK_RATIO is not None:
            check_number(cls.CONFIG_NODE, "MASK_RATIO", node.MASK_RATIO, 0)
            if node.MASK_RATIO >= 1:
                raise UserError(f"MODEL.KD.MGD.MASK_RATIO is {node.MASK_RATIO}; it must be from 0 to below 1.")

    @configurable
    def __init__(
        self, *, weight: float, adaptation: AdaptationLayers, channels: dict[int, int], mask_ratio: float = 0.65
    ):
        """
        Args:
            weight: of the loss.
            adaptation: the layers phi; its strides are the levels that are compared.
            channels: of G by stride, the teacher's.
            mask_ratio: the part that is hidden.
        """
        super().__init__()
        self.weight = weight
        self.adaptation = adaptation
        self.generation = generation_blocks(channels)
        self.mask_ratio = mask_ratio

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> dict:
        node = cfg.MODEL.KD.MGD
        adaptation = AdaptationLayers.from_node(cls.CONFIG_NODE, node, student, teacher)
        ratio = 0.65 if student.family == "one-stage" else 0.45
        return {
            "weight": cls.weight_of(node, student),
            "adaptation": adaptation,
            "channels": {stride: teacher.shapes[stride].channels for stride in adaptation.strides},
            "mask_ratio": ratio if node.MASK_RATIO is None else node.MASK_RATIO,
        }

    def forward(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[str, Tensor]:
        losses = []
        for stride, (s, t) in zip(self.adaptation.strides, self.adaptation.pairs(student, teacher), strict=True):
            filled = self.generation[str(stride)](s * random_mask(s, self.mask_ratio)[:, None])
            losses.append(squared_error(filled, t) / len(s))
        return {"loss_mgd": self.weight * sum(losses)}


@in_float32
def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """The sum of squared differences."""
    return F.mse_loss(student, teacher, reduction="sum")
