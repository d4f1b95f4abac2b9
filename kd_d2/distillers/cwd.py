"""CWD: every channel's activations are a distribution over positions, which follows the teacher's (Shu et al. 2021)."""

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

    L = WEIGHT * sum over levels of TEMPERATURE^2 * mean over (B, C) of KL(p_T || p_S), with p a channel's softmax over the positions
    """

    needs = frozenset({"features"})
    loss_names = ("loss_cwd",)
    CONFIG_NODE = "CWD"

    @dataclass(frozen=True)
    class Config(Distiller.Config):
        weight: Annotated[
            float | None,
            AtLeast(0),
            "What the method's losses are multiplied by; None is 10 for MAPS 'neck' and 5 for 'logits'.",
        ] = None
        maps: Annotated[
            Literal["neck", "logits"],
            "What is compared: the neck's outputs, or the class logits of dense heads, whose channels are anchors times classes.",
        ] = "neck"
        temperature: Annotated[float, Above(0), "Temperature of the softmax over positions."] = 1.0
        adaptation: Annotated[
            Adaptation,
            "Convolution that brings the student's features to the teacher's channels, one for each level; None is '1x1' where the "
            "channels differ. Logits have none.",
        ] = None

        def check(self, name: str) -> None:
            if self.maps == "logits" and self.adaptation not in (None, "none"):
                raise UserError(
                    f"{name}.ADAPTATION is {self.adaptation!r}, which MAPS 'neck' alone reads; MAPS is {self.maps!r}."
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
    """Raise a UserError where two dense heads do not have equally many anchors a position. Others are refused by KDMetaArch."""
    student, teacher = pair.student, pair.teacher
    if any("dense" not in spec.provides or spec.cell_anchors is None for spec in (student, teacher)):
        return
    for stride in pair.strides:
        ours, theirs = (len(spec.cell_anchors[stride]) for spec in (student, teacher))
        if ours != theirs:
            raise UserError(
                f"CWD compares class logits channel by channel (MODEL.KD.CWD.MAPS is 'logits'), but at stride {stride} the student "
                f"({student.name}) has {ours} anchors a position and the teacher ({teacher.name}) {theirs}."
            )
