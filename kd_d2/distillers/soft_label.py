"""SoftLabel: imitation of the teacher's class probabilities, anchor by anchor or proposal by proposal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from detectron2.structures import Instances

from ..adapters import IGNORED, DetectorOutputs
from ..distributed import count_of, mean_count_across_ranks
from ..errors import UserError
from ..keys import Above, AtLeast, OneOf
from ..losses import quality_focal_loss, soft_label_loss, softmax_divergence
from .base import DISTILLER_REGISTRY, Distiller, Losses
from .matching import check_same_anchors
from .pair import Pair

FIRST_COUNTED = {"all": IGNORED + 1, "positives": 0}
"""Lowest label of an anchor that contributes, by value of ANCHORS; see `DensePredictions.assignment`."""


@DISTILLER_REGISTRY.register()
class SoftLabel(Distiller):
    """Soft labels (Hinton et al. 2015) for sigmoid heads, Rank Mimicking's baseline (Li et al. 2022), and box heads.

    L = WEIGHT * sum over non-ignored anchors and classes of |p_T - p_S|^FOCUS * KL(p_T || p_S), divided by the number
    of positives, at least 1. For an R-CNN, the mean softmax divergence over the proposals that its box head is trained on.
    """

    needs = frozenset({"dense", "targets"})
    alternative_needs = frozenset({"proposals"})
    loss_names = ("loss_soft_label",)
    CONFIG_NODE = "SOFT_LABEL"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        loss: Annotated[
            Literal["kl", "quality_focal"],
            "For dense heads: KL(p_T || p_S), or binary cross-entropy with p_T as in CrossKD's public code (with FOCUS 1), where "
            "gradients also flow through the factor |p_T - p_S|^FOCUS.",
        ] = "kl"
        temperature: Annotated[
            float, Above(0), "Logits are divided by it, and the loss is multiplied by its square; only for LOSS 'kl'."
        ] = 1.0
        focus: Annotated[
            float, AtLeast(0), "For dense heads: exponent of the element weight |p_T - p_S|; ours for 'kl'."
        ] = 0.0
        anchors: Annotated[
            str,
            OneOf(*FIRST_COUNTED),
            "For dense heads: anchors that contribute, all that are not ignored or only the positives (ours).",
        ] = "all"

        def check(self, name: str) -> None:
            if self.loss != "kl" and self.temperature != 1:
                raise UserError(
                    f"{name}.TEMPERATURE is {self.temperature}, which only LOSS 'kl' uses; LOSS is {self.loss!r}."
                )

    def __init__(self, config: Config, pair: Pair):
        super().__init__(config, pair)
        if "dense" in self.needs:
            check_same_anchors("SoftLabel", pair.student, pair.teacher)
            return
        for key, default in (("loss", "kl"), ("focus", 0), ("anchors", "all")):
            if getattr(config, key) != default:
                raise UserError(
                    f"MODEL.KD.SOFT_LABEL.{key.upper()} is {getattr(config, key)!r}, which is for dense heads; with the box head of the "
                    f"student ({pair.student.name}) it must be {default!r}."
                )

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        if "proposals" in self.needs:
            logits = student.proposals.logits
            divergence_N = softmax_divergence(logits, teacher.logits_at(student.proposals), self.config.temperature)
            return {"loss_soft_label": divergence_N.sum() / count_of(logits)}
        config, total = self.config, 0
        for stride, assignment in student.dense.assignment_by_level.items():
            logits = student.dense.logits[stride], teacher.dense.logits[stride]
            counts = (assignment >= FIRST_COUNTED[config.anchors])[..., None]
            if config.loss == "kl":
                total = total + soft_label_loss(*logits, counts, config.temperature, config.focus)
            else:
                total = total + quality_focal_loss(*logits, counts, config.focus)
        count = mean_count_across_ranks((student.dense.assignment >= 0).sum().float())
        return {"loss_soft_label": total / count}
