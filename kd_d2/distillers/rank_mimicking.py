"""RankMimicking: the student ranks the candidates of each instance as the teacher does."""

from __future__ import annotations

from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor

from ..adapters import DensePredictions, DetectorOutputs, DetectorSpec, Positives
from ..distributed import mean_count_across_ranks
from ..errors import UserError
from ..losses import count_ranked, rank_kl_loss
from .base import DISTILLER_REGISTRY, Distiller, check_number, in_float32
from .matching import check_same_anchors


@DISTILLER_REGISTRY.register()
class RankMimicking(Distiller):
    """Rank Mimicking (Li et al. 2022, equations 5 and 6) of classification scores and of box quality.

    The positives of each instance are those of the student's own label assignment, for both detectors.
    """

    needs = frozenset({"dense", "targets"})
    loss_names = ("loss_rank_classification", "loss_rank_localization")
    CONFIG_NODE = "RANK_MIMICKING"
    default_weight = 4.0

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # Rank by the logits of the instance's class instead of its probability. The loss is many times as large then.
        node.ON_LOGITS = False
        # Rank by probability times centreness, for detectors that have a centreness.
        node.JOINT_SCORE = False
        # Rank also by the overlap of the predicted box with the ground truth.
        node.LOCALIZATION = True
        # Scores, and overlaps, are divided by it before the softmax, and the loss is multiplied by its square. Ours; the paper's
        # softmax has none. Probabilities and overlaps lie between 0 and 1, so that at 1 all candidates of an instance rank nearly alike.
        node.TEMPERATURE = 1.0
        node.LOCALIZATION_TEMPERATURE = 1.0

    @classmethod
    def validate_config(cls, node: CfgNode) -> None:
        if node.ON_LOGITS and node.JOINT_SCORE:
            raise UserError(
                "MODEL.KD.RANK_MIMICKING.ON_LOGITS and JOINT_SCORE are both True; a joint score is a probability."
            )
        for key in ("TEMPERATURE", "LOCALIZATION_TEMPERATURE"):
            check_number(cls.CONFIG_NODE, key, node[key], 0, exclusive=True)

    @configurable
    def __init__(
        self,
        *,
        weight: float,
        on_logits: bool = False,
        joint_score: bool = False,
        localization: bool = True,
        temperature: float = 1.0,
        localization_temperature: float = 1.0,
    ):
        """
        Args:
            weight: alpha, of both losses.
            on_logits, joint_score: what the classification rank is made of; neither for the class's probability.
            localization: whether there is a localisation rank.
            temperature, localization_temperature: of the softmax over scores, and over overlaps.
        """
        super().__init__()
        self.weight = weight
        self.on_logits = on_logits
        self.joint_score = joint_score
        self.localization = localization
        self.temperature = temperature
        self.localization_temperature = localization_temperature
        if not localization:
            self.loss_names = RankMimicking.loss_names[:1]

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> dict:
        node = cfg.MODEL.KD.RANK_MIMICKING
        check_same_anchors(cls.__name__, student, teacher)
        for whose, spec in (("student", student), ("teacher", teacher)):
            if node.JOINT_SCORE and "quality" not in spec.provides:
                raise UserError(
                    f"MODEL.KD.RANK_MIMICKING.JOINT_SCORE is True, but the {whose} ({spec.name}) has no centreness."
                )
        return {
            "weight": node.WEIGHT,
            "on_logits": node.ON_LOGITS,
            "joint_score": node.JOINT_SCORE,
            "localization": node.LOCALIZATION,
            "temperature": node.TEMPERATURE,
            "localization_temperature": node.LOCALIZATION_TEMPERATURE,
        }

    def forward(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[str, Tensor]:
        positives = student.dense.positives
        instance_P = positives.among_all(targets)
        class_P, box_P4 = positives.ground_truth(targets)
        count = mean_count_across_ranks(count_ranked(instance_P).float())
        scores = [self._scores(outputs.dense, positives, class_P) for outputs in (student, teacher)]
        losses = {"loss_rank_classification": self.weight * ranked(*scores, instance_P, count, self.temperature)}
        if self.localization:
            overlaps = [overlap(outputs.dense.boxes_at(positives), box_P4) for outputs in (student, teacher)]
            divergence = ranked(*overlaps, instance_P, count, self.localization_temperature)
            losses["loss_rank_localization"] = self.weight * divergence
        return losses

    def _scores(self, dense: DensePredictions, positives: Positives, class_P: Tensor) -> Tensor:
        """(P,) what the classification rank is made of."""
        logits = positives.pick(dense.logits.values(), class_P).float()
        if self.on_logits:
            return logits
        scores = logits.sigmoid()
        if self.joint_score:
            scores = scores * positives.pick(dense.quality.values())[:, 0].float().sigmoid()
        return scores


ranked = in_float32(rank_kl_loss)


@in_float32
def overlap(boxes_P4: Tensor, ground_truth_P4: Tensor) -> Tensor:
    """IoU (P,) of predicted boxes with the ground truth of each."""
    return matched_pairwise_iou(Boxes(boxes_P4), Boxes(ground_truth_P4))
