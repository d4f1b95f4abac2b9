"""DKD: the student's box head classifies its proposals as the teacher's does, the label and the other classes apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from detectron2.structures import Instances

from ..adapters import DetectorOutputs
from ..keys import Above, AtLeast
from ..losses import decoupled_loss
from .base import DISTILLER_REGISTRY, Distiller, Losses, count_of


@DISTILLER_REGISTRY.register()
class DKD(Distiller):
    """Decoupled knowledge distillation (Zhao et al. 2022, equation 7) on the proposals that an R-CNN's box head is trained on.

    L = WEIGHT * (ALPHA * TCKD + BETA * NCKD), means over proposals; background is a class as the others. See `decoupled_loss`.
    """

    needs = frozenset({"proposals"})
    loss_names = ("loss_dkd",)
    CONFIG_NODE = "DKD"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        alpha: Annotated[
            float, AtLeast(0), "Weight of TCKD, the label against the rest; the authors' for detectors."
        ] = 1.0
        beta: Annotated[
            float, AtLeast(0), "Weight of NCKD, the other classes among themselves; the authors' for detectors."
        ] = 0.25
        temperature: Annotated[
            float, Above(0), "Logits are divided by it, and the loss is multiplied by its square."
        ] = 1.0

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        proposals, config = student.proposals, self.config
        theirs, count = teacher.logits_at(proposals), count_of(proposals.logits)
        keys = config.alpha, config.beta, config.temperature
        return {"loss_dkd": decoupled_loss(proposals.logits, theirs, proposals.labels, *keys, count)}
