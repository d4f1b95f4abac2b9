"""SoftLabel: the student's class probabilities follow the teacher's, anchor by anchor."""

from __future__ import annotations

from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor

from ..detectors import IGNORED, DetectorOutputs, DetectorSpec
from ..losses import soft_label_loss
from ..workers import mean_count_of_workers
from .base import DISTILLER_REGISTRY, Distiller, check_number, check_same_anchors


@DISTILLER_REGISTRY.register()
class SoftLabel(Distiller):
    """Soft labels (Hinton et al. 2015) for heads of sigmoids, the baseline of Rank Mimicking (Li et al. 2022).

    L = WEIGHT * sum over anchors that are not ignored, and classes, of KL(p_T || p_S), divided by the positives.
    """

    needs = frozenset({"dense", "targets"})
    loss_names = ("loss_soft_label",)
    CONFIG_NODE = "SOFT_LABEL"

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # Logits are divided by it, and the loss multiplied by its square.
        node.TEMPERATURE = 1.0

    @classmethod
    def validate_config(cls, node: CfgNode) -> None:
        check_number(cls.CONFIG_NODE, "TEMPERATURE", node.TEMPERATURE, 0, exclusive=True)

    @configurable
    def __init__(self, *, weight: float, temperature: float = 1.0):
        super().__init__()
        self.weight = weight
        self.temperature = temperature

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> dict:
        check_same_anchors(cls.__name__, student, teacher)
        node = cfg.MODEL.KD.SOFT_LABEL
        return {"weight": node.WEIGHT, "temperature": node.TEMPERATURE}

    def forward(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[str, Tensor]:
        total = sum(
            soft_label_loss(
                student.dense.logits[stride],
                teacher.dense.logits[stride],
                (assignment != IGNORED)[..., None],
                self.temperature,
            )
            for stride, assignment in student.dense.assignment_by_level.items()
        )
        count = mean_count_of_workers((student.dense.assignment >= 0).sum().float())
        return {"loss_soft_label": self.weight * total / count}
