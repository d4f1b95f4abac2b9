"""SoftLabel: the student's class probabilities follow the teacher's, anchor by anchor or proposal by proposal."""

from __future__ import annotations

from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor

from ..adapters import IGNORED, DetectorOutputs, DetectorSpec
from ..distributed import mean_count_across_ranks
from ..errors import UserError
from ..losses import quality_focal_loss, soft_label_loss, softmax_divergence
from .base import (
    DISTILLER_REGISTRY,
    Distiller,
    check_choice,
    check_number,
    count_of,
    in_float32,
)
from .matching import check_same_anchors

LOSSES = ("kl", "quality_focal")
FIRST_COUNTED = {"all": IGNORED + 1, "positives": 0}
"""By ANCHORS the lowest label of an anchor that counts, see `DensePredictions.assignment`."""


@DISTILLER_REGISTRY.register()
class SoftLabel(Distiller):
    """Soft labels (Hinton et al. 2015) for heads of sigmoids, the baseline of Rank Mimicking (Li et al. 2022), and for box heads.

    L = WEIGHT * sum over anchors that are not ignored, and classes, of |p_T - p_S|^FOCUS * KL(p_T || p_S), divided by the positives.
    Of an R-CNN the mean, over the proposals that its box head is trained on, of the divergence of the softmax.
    """

    needs = frozenset({"dense", "targets"})
    alternative_needs = frozenset({"proposals"})
    loss_names = ("loss_soft_label",)
    CONFIG_NODE = "SOFT_LABEL"

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # LOSS, FOCUS and ANCHORS are of dense heads alone. "kl": KL(p_T || p_S); "quality_focal": binary cross-entropy with p_T, as in CrossKD's public program (with FOCUS 1), where
        # gradients also pass through the factor |p_T - p_S|^FOCUS.
        node.LOSS = "kl"
        # Logits are divided by it, and the loss multiplied by its square; of "kl".
        node.TEMPERATURE = 1.0
        # Elements are weighted by |p_T - p_S| to this power; ours for "kl".
        node.FOCUS = 0.0
        # Anchors that count: "all" that are not ignored, or the "positives" alone (ours).
        node.ANCHORS = "all"

    @classmethod
    def validate_config(cls, node: CfgNode) -> None:
        check_choice(cls.CONFIG_NODE, "LOSS", node.LOSS, LOSSES)
        check_choice(cls.CONFIG_NODE, "ANCHORS", node.ANCHORS, FIRST_COUNTED)
        check_number(cls.CONFIG_NODE, "TEMPERATURE", node.TEMPERATURE, 0, exclusive=True)
        check_number(cls.CONFIG_NODE, "FOCUS", node.FOCUS, 0)
        if node.LOSS != "kl" and node.TEMPERATURE != 1:
            raise UserError(
                f"MODEL.KD.SOFT_LABEL.TEMPERATURE is {node.TEMPERATURE}, which LOSS 'kl' alone reads; LOSS is {node.LOSS!r}."
            )

    @configurable
    def __init__(
        self,
        *,
        weight: float,
        loss: str = "kl",
        temperature: float = 1.0,
        focus: float = 0.0,
        anchors: str = "all",
        on_proposals: bool = False,
    ):
        """
        Args:
            weight: of the loss.
            loss, temperature, focus, anchors: see the keys.
            on_proposals: compare box heads, in place of dense heads.
        """
        super().__init__()
        self.weight = weight
        self.loss = loss
        self.temperature = temperature
        self.focus = focus
        self.anchors = anchors
        self.on_proposals = on_proposals
        if on_proposals:
            self.needs = self.alternative_needs

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> dict:
        node = cfg.MODEL.KD.SOFT_LABEL
        on_proposals = cls.needs_of(student) == cls.alternative_needs
        if on_proposals:
            cls._check_of_proposals(node, student)
        else:
            check_same_anchors(cls.__name__, student, teacher)
        return {
            "weight": node.WEIGHT,
            "loss": node.LOSS,
            "temperature": node.TEMPERATURE,
            "focus": node.FOCUS,
            "anchors": node.ANCHORS,
            "on_proposals": on_proposals,
        }

    @staticmethod
    def _check_of_proposals(node: CfgNode, student: DetectorSpec) -> None:
        for key, default in (("LOSS", "kl"), ("FOCUS", 0), ("ANCHORS", "all")):
            if node[key] != default:
                raise UserError(
                    f"MODEL.KD.SOFT_LABEL.{key} is {node[key]!r}, which is of dense heads; with the box head of the student "
                    f"({student.name}) it must be {default!r}."
                )

    def forward(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[str, Tensor]:
        if self.on_proposals:
            logits = student.proposals.logits
            divergence_N = divergence(logits, teacher.logits_at(student.proposals), self.temperature)
            return {"loss_soft_label": self.weight * divergence_N.sum() / count_of(logits)}
        total = sum(
            self._level_loss(
                student.dense.logits[stride],
                teacher.dense.logits[stride],
                (assignment >= FIRST_COUNTED[self.anchors])[..., None],
            )
            for stride, assignment in student.dense.assignment_by_level.items()
        )
        count = mean_count_across_ranks((student.dense.assignment >= 0).sum().float())
        return {"loss_soft_label": self.weight * total / count}

    def _level_loss(self, student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
        if self.loss == "kl":
            return soft_label_loss(student, teacher, counts, self.temperature, self.focus)
        return quality_focal_loss(student, teacher, counts, self.focus)


divergence = in_float32(softmax_divergence)
