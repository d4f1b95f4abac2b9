"""PFI: feature imitation weighted by the difference of predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from detectron2.structures import Instances
from torch import Tensor

from ..adapters import DetectorOutputs
from ..distributed import mean_across_ranks, mean_count_across_ranks
from ..errors import UserError
from ..keys import OneOf
from ..losses import prediction_difference, relative_to_mean, weighted_imitation_loss
from .adaptation import Adaptation, AdaptationLayers
from .base import DISTILLER_REGISTRY, Distiller, Losses, Weight, log_scalar
from .masks import inside_boxes, negative_positions, positive_positions, whole_maps
from .matching import check_same_anchors
from .pair import Pair

PREDICTION = "prediction"
MASKS = {
    "whole": whole_maps,
    "positives": positive_positions,
    "negatives": negative_positions,
    "boxes": inside_boxes,
}
"""Masks that the paper uses for comparison (table 5)."""


@DISTILLER_REGISTRY.register()
class PFI(Distiller):
    """Prediction-guided Feature Imitation (Li et al. 2022, equations 7 to 9).

    L = WEIGHT * mean over levels of mean over (B, H, W) of P * D, where P is the squared difference of the class
    probabilities, a weight without gradient, and D is that of the features. With another MASK in place of P, the mean
    of a level is over the positions inside the mask.
    """

    needs = frozenset({"features", "dense", "targets"})
    loss_names = ("loss_pfi",)
    CONFIG_NODE = "PFI"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        weight: Weight = 1.5
        mask: Annotated[
            str,
            OneOf(PREDICTION, *MASKS),
            "Where features are imitated: where predictions differ, or one of the paper's alternatives: everywhere, at the positives, at "
            "the negatives, inside the boxes.",
        ] = PREDICTION
        on_logits: Annotated[
            bool,
            "Whether the prediction difference P, which weights the features, is computed from class logits instead of probabilities; the loss is then many times larger.",
        ] = False
        relative: Annotated[
            bool, "Whether P is divided by its mean over each level, so that only its relative values matter."
        ] = False
        through_prediction: Annotated[bool, "Whether gradients also flow through P."] = False
        adaptation: Adaptation = None

        def check(self, name: str) -> None:
            for key in ("on_logits", "relative", "through_prediction"):
                if getattr(self, key) and self.mask != PREDICTION:
                    raise UserError(f"{name}.{key.upper()} is True, but MASK {self.mask!r} does not use predictions.")

    def __init__(self, config: Config, pair: Pair):
        super().__init__(config, pair)
        if config.mask == PREDICTION:
            check_same_anchors("PFI", pair.student, pair.teacher)
        self.adaptation = AdaptationLayers.build(config.adaptation, pair, self.CONFIG_NODE)

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        students, teachers = zip(*self.adaptation.pairs(student, teacher), strict=True)
        if self.config.mask == PREDICTION:
            weights, divisors = self._prediction_weights(student, teacher), None
        else:
            weights = MASKS[self.config.mask](student, targets, self.adaptation.strides)
            divisors = mean_count_across_ranks(torch.stack([mask.sum() for mask in weights])).unbind()
        loss = weighted_imitation_loss(students, teachers, weights, divisors)
        if student.losses:
            weighted = self.weight * loss.detach()
            log_scalar("pfi_to_detector_loss", lambda: weighted / sum(x.detach() for x in student.losses.values()))
        return {"loss_pfi": loss}

    def _prediction_weights(self, student: DetectorOutputs, teacher: DetectorOutputs) -> list[Tensor]:
        """Return P by level, (B, H, W)."""
        read = DetectorOutputs.logit_map if self.config.on_logits else DetectorOutputs.probability_map
        with torch.set_grad_enabled(self.config.through_prediction and torch.is_grad_enabled()):
            weights = [prediction_difference(read(student, s), read(teacher, s)) for s in self.adaptation.strides]
        if not self.config.relative:
            return weights
        return relative_to_mean(weights, [mean_across_ranks(weight.detach().mean()) for weight in weights])
