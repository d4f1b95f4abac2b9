"""CWD: distillation of each channel's distribution of activations over positions (Shu et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from detectron2.structures import Instances

from ..adapters import DetectorOutputs
from ..errors import UserError
from ..keys import Above, AtLeast
from ..losses import channel_wise_loss
from .adaptation import Adaptation, AdaptationLayers
from .base import DISTILLER_REGISTRY, Distiller, Losses
from .pair import Pair


@DISTILLER_REGISTRY.register()
class CWD(Distiller):
    """Channel-wise distillation (Shu et al. 2021) of neck outputs or of dense heads' class logits.

    L = WEIGHT * sum over levels of TEMPERATURE^2 * mean over (B, C) of KL(p_T || p_S), p the softmax over positions
    """

    needs = frozenset({"features"})
    loss_names = ("loss_cwd",)
    CONFIG_NODE = "CWD"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        weight: Annotated[
            float | None,
            AtLeast(0),
            "Weight of the method's losses; None means 10 for MAPS 'neck' and 5 for 'logits'.",
        ] = None
        maps: Annotated[
            Literal["neck", "logits"],
            "Maps to compare: the neck outputs, or the class logits of dense heads, whose channels are anchors times classes.",
        ] = "neck"
        temperature: Annotated[float, Above(0), "Temperature of the softmax over positions."] = 1.0
        adaptation: Annotated[
            Adaptation,
            "Convolution that maps the student's features to the teacher's channels, one per level; 'select' and None as for other methods. Not "
            "used with logits.",
        ] = None

        def check(self, name: str) -> None:
            if self.maps == "logits" and self.adaptation not in (None, "none"):
                raise UserError(
                    f"{name}.ADAPTATION is {self.adaptation!r}, which only MAPS 'neck' uses; MAPS is {self.maps!r}."
                )

    def __init__(self, config: Config, pair: Pair):
        super().__init__(config, pair, default_weight=10.0 if config.maps == "neck" else 5.0)
        self.strides = pair.strides
        if config.maps == "logits":
            self.needs = frozenset({"features", "dense"})
            _check_logit_channels(pair)
        else:
            self.adaptation = AdaptationLayers.build(config.adaptation, pair, self.CONFIG_NODE)

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]) -> Losses:
        if self.config.maps == "logits":
            pairs = [(student.logit_map(s), teacher.logit_map(s)) for s in self.strides]
        else:
            pairs = self.adaptation.pairs(student, teacher)
        return {"loss_cwd": sum(channel_wise_loss(s, t, self.config.temperature) for s, t in pairs)}


def _check_logit_channels(pair: Pair) -> None:
    """Raise a UserError if two dense heads differ in their anchors per position. KDMetaArch rejects other detectors."""
    student, teacher = pair.student, pair.teacher
    if any("dense" not in spec.provides or spec.cell_anchors is None for spec in (student, teacher)):
        return
    for stride in pair.strides:
        ours, theirs = (len(spec.cell_anchors[stride]) for spec in (student, teacher))
        if ours != theirs:
            raise UserError(
                f"CWD compares class logits channel by channel (MODEL.KD.CWD.MAPS is 'logits'), but at stride {stride} the student "
                f"({student.name}) has {ours} anchors per position and the teacher ({teacher.name}) {theirs}."
            )
