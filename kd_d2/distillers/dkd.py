"""DKD: the student's box head classifies its proposals as the teacher's does, the label and the other classes apart."""

from __future__ import annotations

from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor

from ..adapters import DetectorOutputs, DetectorSpec
from ..losses import decoupled_loss
from .base import (
    DISTILLER_REGISTRY,
    Distiller,
    check_number,
    count_of,
    in_float32,
)


@DISTILLER_REGISTRY.register()
class DKD(Distiller):
    """Decoupled knowledge distillation (Zhao et al. 2022, equation 7) on the proposals that an R-CNN's box head is trained on.

    L = WEIGHT * (ALPHA * TCKD + BETA * NCKD), means over proposals; background is a class as the others. See `decoupled_loss`.
    """

    needs = frozenset({"proposals"})
    loss_names = ("loss_dkd",)
    CONFIG_NODE = "DKD"

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # Of TCKD, label against the rest, and of NCKD, the other classes among themselves; the authors' for detectors.
        node.ALPHA = 1.0
        node.BETA = 0.25
        # Logits are divided by it, and the loss multiplied by its square.
        node.TEMPERATURE = 1.0

    @classmethod
    def validate_config(cls, node: CfgNode) -> None:
        for key in ("ALPHA", "BETA"):
            check_number(cls.CONFIG_NODE, key, node[key], 0)
        check_number(cls.CONFIG_NODE, "TEMPERATURE", node.TEMPERATURE, 0, exclusive=True)

    @configurable
    def __init__(self, *, weight: float, alpha: float = 1.0, beta: float = 0.25, temperature: float = 1.0):
        """
        Args:
            weight: of the loss.
            alpha, beta, temperature: see the keys.
        """
        super().__init__()
        self.weight = weight
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> dict:
        node = cfg.MODEL.KD.DKD
        return {"weight": node.WEIGHT, "alpha": node.ALPHA, "beta": node.BETA, "temperature": node.TEMPERATURE}

    def forward(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[str, Tensor]:
        proposals = student.proposals
        loss = decoupled(
            proposals.logits,
            teacher.logits_at(proposals),
            proposals.labels,
            self.alpha,
            self.beta,
            self.temperature,
            count_of(proposals.logits),
        )
        return {"loss_dkd": self.weight * loss}


decoupled = in_float32(decoupled_loss)
