"""PFI: the student's features follow the teacher's where their predictions differ."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor

from ..adapters import DetectorOutputs, DetectorSpec
from ..distributed import mean_across_ranks, mean_count_across_ranks
from ..errors import UserError
from ..losses import prediction_difference, relative_to_mean, weighted_imitation_loss
from .adaptation import ADAPTATION_KERNELS, AdaptationLayers
from .base import DISTILLER_REGISTRY, Distiller, check_choice, log_scalar
from .masks import inside_boxes, negative_positions, positive_positions, whole_maps
from .matching import check_same_anchors

PREDICTION = "prediction"
MASKS = {
    "whole": whole_maps,
    "positives": positive_positions,
    "negatives": negative_positions,
    "boxes": inside_boxes,
}
"""Masks that the paper compares with (table 5)."""


@DISTILLER_REGISTRY.register()
class PFI(Distiller):
    """Prediction-guided Feature Imitation (Li et al. 2022, equations 7 to 9).

    L = WEIGHT * mean over levels of mean over (B, H, W) of P * D, with P the squared difference of the class
    probabilities, a weight without gradient, and D that of the features. With another MASK in the place of P the mean of a level
    is over the positions inside the mask.
    """

    needs = frozenset({"features", "dense", "targets"})
    loss_names = ("loss_pfi",)
    CONFIG_NODE = "PFI"
    default_weight = 1.5

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # Where features are imitated: "prediction", or one of what the paper compares with: "whole", "positives",
        # "negatives", "boxes".
        node.MASK = PREDICTION
        # P of the class logits instead of their probabilities; the loss is then many times as large.
        node.ON_LOGITS = False
        # Divide P by its mean over each level: it says where, and no longer how much.
        node.RELATIVE = False
        # Let gradients pass through P too.
        node.THROUGH_PREDICTION = False
        # Layer between student and teacher features: "none", "1x1" or "3x3"; None: 1x1 where the channels differ.
        node.ADAPTATION = None

    @classmethod
    def validate_config(cls, node: CfgNode) -> None:
        check_choice(cls.CONFIG_NODE, "MASK", node.MASK, (PREDICTION, *MASKS))
        check_choice(cls.CONFIG_NODE, "ADAPTATION", node.ADAPTATION, (None, *ADAPTATION_KERNELS))
        for key in ("ON_LOGITS", "RELATIVE", "THROUGH_PREDICTION"):
            if node[key] and node.MASK != PREDICTION:
                raise UserError(f"MODEL.KD.PFI.{key} is True, but MASK {node.MASK!r} does not read predictions.")

    @configurable
    def __init__(
        self,
        *,
        weight: float,
        adaptation: AdaptationLayers,
        mask: str = PREDICTION,
        on_logits: bool = False,
        relative: bool = False,
        through_prediction: bool = False,
    ):
        """
        Args:
            weight: beta.
            adaptation: the layers phi; its strides are the levels that are compared.
            mask, on_logits, relative, through_prediction: see the keys.
        """
        super().__init__()
        self.weight = weight
        self.adaptation = adaptation
        self.mask = mask
        self.on_logits = on_logits
        self.relative = relative
        self.through_prediction = through_prediction

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> dict:
        node = cfg.MODEL.KD.PFI
        if node.MASK == PREDICTION:
            check_same_anchors(cls.__name__, student, teacher)
        return {
            "weight": node.WEIGHT,
            "adaptation": AdaptationLayers.from_node(cls.CONFIG_NODE, node, student, teacher),
            "mask": node.MASK,
            "on_logits": node.ON_LOGITS,
            "relative": node.RELATIVE,
            "through_prediction": node.THROUGH_PREDICTION,
        }

    def forward(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[str, Tensor]:
        students, teachers = zip(*self.adaptation.pairs(student, teacher), strict=True)
        if self.mask == PREDICTION:
            weights, divisors = self._prediction_weights(student, teacher), None
        else:
            weights = MASKS[self.mask](student, targets, self.adaptation.strides)
            divisors = mean_count_across_ranks(torch.stack([mask.sum() for mask in weights])).unbind()
        loss = self.weight * weighted_imitation_loss(students, teachers, weights, divisors)
        if student.losses:
            log_scalar("pfi_to_detector_loss", lambda: loss.detach() / sum(x.detach() for x in student.losses.values()))
        return {"loss_pfi": loss}

    def _prediction_weights(self, student: DetectorOutputs, teacher: DetectorOutputs) -> list[Tensor]:
        """P by level, (B, H, W)."""
        read = DetectorOutputs.logit_map if self.on_logits else DetectorOutputs.probability_map
        with torch.set_grad_enabled(self.through_prediction and torch.is_grad_enabled()):
            weights = [prediction_difference(read(student, s), read(teacher, s)) for s in self.adaptation.strides]
        if not self.relative:
            return weights
        return relative_to_mean(weights, [mean_across_ranks(weight.detach().mean()) for weight in weights])
