"""DIST: correlation of the student's predictions with the teacher's, along classes and along positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from detectron2.structures import Instances
from torch import Tensor

from ..adapters import DetectorOutputs, DetectorSpec
from ..distributed import sum_across_ranks
from ..errors import UserError
from ..keys import AtLeast
from ..losses import dist_loss_of_levels
from .base import DISTILLER_REGISTRY, Distiller, Losses
from .matching import check_same_anchors
from .pair import Pair


@DISTILLER_REGISTRY.register()
class DIST(Distiller):
    """Knowledge distillation from a stronger teacher (Huang et al. 2022, equations 7 to 10).

    L = WEIGHT * (BETA * (1 - r along classes) + GAMMA * (1 - r along positions)), where r is the correlation of class
    probabilities, see `dist_loss_of_levels`. Dense heads: sigmoid probabilities, summed over levels; the classes of each anchor
    are separate. Box heads: softmax probabilities of the proposals that the head is trained on. With at most two
    probabilities per position or proposal, between which every correlation is 1 or -1, the first term is left out.
    """

    needs = frozenset({"dense"})
    alternative_needs = frozenset({"proposals"})
    loss_names = ("loss_dist",)
    CONFIG_NODE = "DIST"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        beta: Annotated[float, AtLeast(0), "Weight of the correlation along classes."] = 1.0
        gamma: Annotated[float, AtLeast(0), "Weight of the correlation along positions or proposals."] = 1.0

    def __init__(self, config: Config, pair: Pair):
        super().__init__(config, pair)
        beta = config.beta
        if "dense" in self.needs:
            check_same_anchors("DIST", pair.student, pair.teacher)
        if _probabilities_per_row(pair.student, "dense" in self.needs) <= 2:
            beta = 0.0
            if not config.gamma:
                raise UserError(
                    f"MODEL.KD.DIST.GAMMA is 0, and the student ({pair.student.name}) has too few classes: BETA's correlation needs "
                    "three probabilities per position or proposal, so DIST would have no effect."
                )
        self.loss = partial(dist_loss_of_levels, beta=beta, gamma=config.gamma, total=sum_across_ranks)

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        if "proposals" in self.needs:
            proposals = student.proposals
            pairs = [[x.float().softmax(1)] for x in (proposals.logits, teacher.logits_at(proposals))]
        else:
            strides = student.dense.logits
            pairs = [[_rows(outputs.probability_map(s)) for s in strides] for outputs in (student, teacher)]
        return {"loss_dist": self.loss(*pairs)}


def _probabilities_per_row(spec: DetectorSpec, is_dense: bool) -> float:
    """Return the number of probabilities per position of a dense head, or per proposal of a box head."""
    classes = spec.num_classes or math.inf
    anchors = max(map(len, (spec.cell_anchors or {}).values()), default=1)
    return classes * anchors if is_dense else classes + 1


def _rows(maps: Tensor) -> Tensor:
    """Reshape (B, A * K, H, W) to (B * H * W, A * K)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)
