"""RankMimicking: distillation of the teacher's ranking of the candidates of each instance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from detectron2.structures import Boxes, Instances
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor

from ..adapters import DensePredictions, DetectorOutputs, Positives
from ..distributed import mean_count_across_ranks
from ..errors import UserError
from ..keys import Above
from ..losses import count_ranked, rank_kl_loss
from .base import DISTILLER_REGISTRY, Distiller, Losses, Weight
from .matching import check_same_anchors
from .pair import Pair


@DISTILLER_REGISTRY.register()
class RankMimicking(Distiller):
    """Rank Mimicking (Li et al. 2022, equations 5 and 6) of classification scores and of box quality.

    The positives of each instance are those of the student's label assignment, for both detectors.
    """

    needs = frozenset({"dense", "targets"})
    loss_names = ("loss_rank_classification", "loss_rank_localization")
    CONFIG_NODE = "RANK_MIMICKING"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        weight: Weight = 4.0
        on_logits: Annotated[
            bool,
            "Whether candidates are ranked by the logits of the instance's class instead of its probability; the loss is then many times "
            "larger.",
        ] = False
        joint_score: Annotated[
            bool, "Whether candidates are ranked by probability times centerness, for detectors with a centerness."
        ] = False
        localization: Annotated[
            bool, "Whether candidates are also ranked by the IoU of the predicted box with the ground truth."
        ] = True
        temperature: Annotated[
            float,
            Above(0),
            "Temperature of the softmax over scores; the loss is multiplied by its square. Not in the paper, whose softmax has none. "
            "Probabilities are between 0 and 1, so that at 1 all candidates of an instance rank nearly alike.",
        ] = 1.0
        localization_temperature: Annotated[
            float,
            Above(0),
            "Temperature of the softmax over IoUs; their loss is multiplied by its square. Not in the paper.",
        ] = 1.0

        def check(self, name: str) -> None:
            if self.on_logits and self.joint_score:
                raise UserError(f"{name}.ON_LOGITS and JOINT_SCORE are both True; a joint score is a probability.")

    def __init__(self, config: Config, pair: Pair):
        super().__init__(config, pair)
        check_same_anchors("RankMimicking", pair.student, pair.teacher)
        for whose, spec in (("student", pair.student), ("teacher", pair.teacher)):
            if config.joint_score and "quality" not in spec.provides:
                raise UserError(
                    f"MODEL.KD.RANK_MIMICKING.JOINT_SCORE is True, but the {whose} ({spec.name}) has no centerness."
                )
        if not config.localization:
            self.loss_names = self.loss_names[:1]

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        positives = student.dense.positives
        instance_P = positives.among_all(targets)
        class_P, box_P4 = positives.ground_truth(targets)
        count = mean_count_across_ranks(count_ranked(instance_P).float())
        scores = [self._scores(outputs.dense, positives, class_P) for outputs in (student, teacher)]
        losses = {"loss_rank_classification": rank_kl_loss(*scores, instance_P, count, self.config.temperature)}
        if self.config.localization:
            boxes = torch.cat([outputs.dense.boxes_at(positives) for outputs in (student, teacher)])
            overlaps = matched_pairwise_iou(Boxes(boxes), Boxes(box_P4.repeat(2, 1))).chunk(2)
            temperature = self.config.localization_temperature
            losses["loss_rank_localization"] = rank_kl_loss(*overlaps, instance_P, count, temperature)
        return losses

    def _scores(self, dense: DensePredictions, positives: Positives, class_P: Tensor) -> Tensor:
        """Return the classification scores (P,) to rank by."""
        logits = positives.pick(dense.logits.values(), class_P).float()
        if self.config.on_logits:
            return logits
        scores = logits.sigmoid()
        if self.config.joint_score:
            scores = scores * positives.pick(dense.quality.values())[:, 0].float().sigmoid()
        return scores
