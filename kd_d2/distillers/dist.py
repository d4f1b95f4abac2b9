"""DIST: the student's predictions correlate with the teacher's, class by class and position by position."""

from __future__ import annotations

from functools import partial

from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor

from ..adapters import DetectorOutputs, DetectorSpec
from ..distributed import sum_across_ranks
from ..losses import dist_loss
from .base import DISTILLER_REGISTRY, Distiller, check_number, in_float32
from .matching import check_same_anchors


@DISTILLER_REGISTRY.register()
class DIST(Distiller):
    """Knowledge distillation from a stronger teacher (Huang et al. 2022, equations 7 to 10).

    L = WEIGHT * (BETA * (1 - r along classes) + GAMMA * (1 - r along positions)), r the correlation of class probabilities, see
    `dist_loss`. Of a dense head the sum over levels, probabilities being sigmoids, and each anchor's classes classes of its own; of
    a box head of softmax over the proposals that it is trained on.
    """

    needs = frozenset({"dense"})
    alternative_needs = frozenset({"proposals"})
    loss_names = ("loss_dist",)
    CONFIG_NODE = "DIST"

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # Of the correlation along classes, and of that along positions or proposals.
        node.BETA = 1.0
        node.GAMMA = 1.0

    @classmethod
    def validate_config(cls, node: CfgNode) -> None:
        for key in ("BETA", "GAMMA"):
            check_number(cls.CONFIG_NODE, key, node[key], 0)

    @configurable
    def __init__(self, *, weight: float, beta: float = 1.0, gamma: float = 1.0, on_proposals: bool = False):
        """
        Args:
            weight: of the loss.
            beta, gamma: see the keys.
            on_proposals: compare box heads, in place of dense heads.
        """
        super().__init__()
        self.weight = weight
        self.loss = in_float32(partial(dist_loss, beta=beta, gamma=gamma, total=sum_across_ranks))
        self.on_proposals = on_proposals
        if on_proposals:
            self.needs = self.alternative_needs

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> dict:
        node = cfg.MODEL.KD.DIST
        on_proposals = cls.needs_of(student) == cls.alternative_needs
        if not on_proposals:
            check_same_anchors(cls.__name__, student, teacher)
        return {"weight": node.WEIGHT, "beta": node.BETA, "gamma": node.GAMMA, "on_proposals": on_proposals}

    def forward(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[str, Tensor]:
        if self.on_proposals:
            proposals = student.proposals
            theirs = teacher.logits_at(proposals).float().softmax(1)
            total = self.loss(proposals.logits.float().softmax(1), theirs)
        else:
            total = sum(
                self.loss(*(_rows(outputs.probability_map(stride)) for outputs in (student, teacher)))
                for stride in student.dense.logits
            )
        return {"loss_dist": self.weight * total}


def _rows(maps: Tensor) -> Tensor:
    """(B, A * K, H, W) to (B * H * W, A * K)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)
