"""DKD: decoupled distillation of a box head's classification, the target class and the other classes separately."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from detectron2.structures import Instances

from ..adapters import DetectorOutputs
from ..distributed import count_of
from ..errors import UserError
from ..keys import Above, AtLeast
from ..losses import decoupled_loss
from .base import DISTILLER_REGISTRY, Distiller, Losses
from .pair import Pair


@DISTILLER_REGISTRY.register()
class DKD(Distiller):
    """Decoupled knowledge distillation (Zhao et al. 2022, equation 7) on the proposals that a box head is trained on.

    L = WEIGHT * (ALPHA * TCKD + BETA * NCKD), averaged over proposals; background counts as a class. See
    `decoupled_loss`.
    """

    needs = frozenset({"proposals"})
    loss_names = ("loss_dkd",)
    CONFIG_NODE = "DKD"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        alpha: Annotated[
            float, AtLeast(0), "Weight of TCKD, the target class against the rest; the authors' value for detectors."
        ] = 1.0
        beta: Annotated[
            float, AtLeast(0), "Weight of NCKD, between the other classes; the authors' value for detectors."
        ] = 0.25
        temperature: Annotated[float, Above(0), "Softmax temperature; the loss is multiplied by its square."] = 1.0

    def __init__(self, config: Config, pair: Pair):
        super().__init__(config, pair)
        if not config.alpha and pair.student.num_classes == 1:
            raise UserError(
                f"MODEL.KD.DKD.ALPHA is 0, and the student ({pair.student.name}) has one class: there is one class besides that of a "
                "proposal, so BETA's term is 0 and DKD would have no effect."
            )

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        proposals, config = student.proposals, self.config
        theirs, count = teacher.logits_at(proposals), count_of(proposals.logits)
        keys = config.alpha, config.beta, config.temperature
        return {"loss_dkd": decoupled_loss(proposals.logits, theirs, proposals.labels, *keys, count)}
