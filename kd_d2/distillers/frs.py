"""FRS: imitation where the teacher's class scores are high, its features are rich (Du et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from detectron2.structures import Instances
from torch import Tensor

from ..adapters import DetectorOutputs
from ..distributed import mean_across_ranks
from ..errors import UserError
from ..keys import AtLeast
from ..losses import feature_richness, masked_squared_error, quality_focal_loss
from .adaptation import Adaptation, AdaptationLayers
from .base import DISTILLER_REGISTRY, Distiller, Losses
from .matching import check_anchors_at, check_same_anchors, check_same_classes, in_words, without_adapter
from .pair import Pair

FEATURE, CLASS = "loss_frs_feature", "loss_frs_class"
EPS = 1e-12
ONE_STAGE, TWO_STAGE = (5e-3, 0.02), (2e-3, 0.1)
WEIGHTS_BY_NAME = {"FCOS": (0.01, 0.05), "GFL": (0.1, 0.05)}
"""Feature and class weight of students for which the authors' differ from those of their family."""

FEATURES_ALONE = "To compare only features, set MODEL.KD.FRS.CLASS_WEIGHT to 0."
"""What to do about class scores that cannot be compared, for messages."""


def _logits_of_class_head(outputs: DetectorOutputs) -> dict[int, Tensor]:
    return outputs.dense.logits


def _logits_of_rpn(outputs: DetectorOutputs) -> dict[int, Tensor]:
    return outputs.objectness


LOGITS = {"dense": _logits_of_class_head, "objectness": _logits_of_rpn}
"""Functions that return logits (B, HWA, K) by stride, by the part that has them."""


@DISTILLER_REGISTRY.register()
class FRS(Distiller):
    """Feature-richness score (Du et al. 2021), for features and class probabilities.

    The richness S of a position is the teacher's largest class probability there, of any anchor, or the largest
    objectness of an RPN. Times WEIGHT, summed over levels, each divided by the sum of its S:

    - features: sum over (B, H, W) of S times the sum over channels of (phi(F_S) - F_T)^2;
    - classes: sum over (B, H, W) of S times the sum over anchors and classes of BCE(p_S, p_T).

    The class loss is skipped if its weight is 0. The student then needs no class scores, and its classes may differ from
    the teacher's.
    """

    needs = frozenset({"features", "dense"})
    alternative_needs = frozenset({"features", "objectness"})
    loss_names = (FEATURE, CLASS)
    CONFIG_NODE = "FRS"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        feature_weight: Annotated[
            float | None,
            AtLeast(0),
            "Weight of the feature loss; None means 0.01 for FCOS, 0.1 for GFL, 0.005 for other one-stage students, 0.002 for the rest.",
        ] = None
        class_weight: Annotated[
            float | None,
            AtLeast(0),
            "Weight of the class loss; None means 0.05 for FCOS and GFL, 0.02 for other one-stage students, 0.1 for the rest, where it "
            "compares the objectness of RPNs.",
        ] = None
        adaptation: Adaptation = "3x3"

    def __init__(self, config: Config, pair: Pair):
        if config.class_weight == 0:
            self.needs = frozenset({"features"})
        elif LOGITS.keys().isdisjoint(pair.student.provides):
            raise UserError(
                f"FRS compares class scores of a dense head or an RPN, which the student ({pair.student.name}) does not have"
                f"{without_adapter(pair.student)}. {FEATURES_ALONE}"
            )
        super().__init__(config, pair)
        student, teacher = pair.student, pair.teacher
        self.part_with_scores = next((part for part in LOGITS if part in teacher.provides), None)
        if self.part_with_scores is None:
            raise UserError(
                f"FRS weights features by class scores of a dense head or an RPN, which the teacher ({teacher.name}) does not have."
            )
        family = ONE_STAGE if student.family == "one-stage" else TWO_STAGE
        keys = config.feature_weight, config.class_weight
        published = WEIGHTS_BY_NAME.get(student.name, family)
        weights = (default if key is None else key for key, default in zip(keys, published, strict=True))
        self.weights = self.weigh_losses(*weights, optional=(CLASS,))
        if CLASS in self.weights:
            self._check_scores(pair)
        check_anchors_at("FRS", "teacher", teacher, pair.strides)
        self.adaptation = AdaptationLayers.build(config.adaptation, pair, self.CONFIG_NODE)

    def _check_scores(self, pair: Pair) -> None:
        """Raise a UserError if the class scores cannot be compared."""
        if self.part_with_scores not in self.needs:
            raise UserError(
                f"FRS compares class scores, but the student ({pair.student.name}) has {in_words(self.needs - {'features'})} and the teacher "
                f"({pair.teacher.name}) {in_words({self.part_with_scores})}. {FEATURES_ALONE}"
            )
        try:
            check_same_anchors("FRS", pair.student, pair.teacher, self.part_with_scores)
            if self.compares_classes:
                check_same_classes("FRS", pair.student, pair.teacher)
        except UserError as error:
            raise UserError(f"{error} {FEATURES_ALONE}") from error

    @property
    def needs_of_teacher(self) -> frozenset[str]:
        return frozenset({"features", self.part_with_scores})

    @property
    def compares_classes(self) -> bool:
        return CLASS in self.weights and "dense" in self.needs

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        strides, pairs = self.adaptation.strides, self.adaptation.pairs(student, teacher)
        logits_of = LOGITS[self.part_with_scores]
        theirs = logits_of(teacher)
        richness = [
            feature_richness(theirs[stride], t.shape[-2:]) for stride, (_, t) in zip(strides, pairs, strict=True)
        ]
        totals_L = mean_across_ranks(torch.stack([x.sum() for x in richness])).clamp(min=EPS)
        squares = [s.shape[1] * masked_squared_error(s, t, S) for S, (s, t) in zip(richness, pairs, strict=True)]
        losses = {FEATURE: (torch.stack(squares) / totals_L).sum()}
        if CLASS in self.weights:
            ours = logits_of(student)
            entropies = [
                quality_focal_loss(
                    _by_position(ours[stride], S), _by_position(theirs[stride], S), S[..., None], power=0
                )
                for stride, S in zip(strides, richness, strict=True)
            ]
            losses[CLASS] = (torch.stack(entropies) / totals_L).sum()
        return {name: weight * losses[name] for name, weight in self.weights.items()}


def _by_position(logits: Tensor, maps: Tensor) -> Tensor:
    """Reshape logits (B, HWA, K) of a level to (B, H, W, A * K), with the size of maps (B, H, W)."""
    return logits.unflatten(1, (*maps.shape[1:], -1)).flatten(3)
