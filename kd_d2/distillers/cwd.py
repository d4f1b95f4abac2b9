"""CWD: every channel's activations are a distribution over positions, which follows the teacher's (Shu et al. 2021)."""

from __future__ import annotations

from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor

from ..adapters import DetectorOutputs, DetectorSpec
from ..errors import UserError
from ..losses import channel_wise_loss
from .adaptation import ADAPTATION_KERNELS, AdaptationLayers
from .base import DISTILLER_REGISTRY, Distiller, check_choice, check_number
from .matching import common_strides

WEIGHTS = {"neck": 10.0, "logits": 5.0}
"""By the key MAPS the WEIGHT that stands for None."""


@DISTILLER_REGISTRY.register()
class CWD(Distiller):
    """Channel-wise distillation (Shu et al. 2021) of neck outputs or of dense heads' class logits.

    L = WEIGHT * sum over levels of TEMPERATURE^2 * mean over (B, C) of KL(p_T || p_S), with p a channel's softmax over the positions
    """

    needs = frozenset({"features"})
    loss_names = ("loss_cwd",)
    CONFIG_NODE = "CWD"
    default_weight = WEIGHTS["neck"]

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # None: 10 for MAPS "neck", 5 for "logits".
        node.WEIGHT = None
        # What is compared: the "neck"'s outputs, or the class "logits" of dense heads, whose channels are anchors times classes.
        node.MAPS = "neck"
        # Of the softmax.
        node.TEMPERATURE = 1.0
        # phi, between student and teacher features: "none", "1x1" or "3x3"; None: "1x1" where the channels differ. Logits have none.
        node.ADAPTATION = None

    @classmethod
    def weight_default(cls, node: CfgNode, student: DetectorSpec) -> float:
        return WEIGHTS[node.MAPS]

    @classmethod
    def validate_config(cls, node: CfgNode) -> None:
        check_choice(cls.CONFIG_NODE, "MAPS", node.MAPS, WEIGHTS)
        check_choice(cls.CONFIG_NODE, "ADAPTATION", node.ADAPTATION, (None, *ADAPTATION_KERNELS))
        check_number(cls.CONFIG_NODE, "TEMPERATURE", node.TEMPERATURE, 0, exclusive=True)
        if node.MAPS == "logits" and ADAPTATION_KERNELS.get(node.ADAPTATION):
            raise UserError(
                f"MODEL.KD.CWD.ADAPTATION is {node.ADAPTATION!r}, which MAPS 'neck' alone reads; MAPS is {node.MAPS!r}."
            )

    @configurable
    def __init__(
        self,
        *,
        weight: float,
        adaptation: AdaptationLayers | None = None,
        logit_strides: tuple[int, ...] = (),
        temperature: float = 1.0,
    ):
        """
        Args:
            weight: of the loss.
            adaptation: the layers phi; its strides are the levels of the neck that are compared. None compares class logits.
            logit_strides: the levels whose class logits are compared.
            temperature: of the softmax.
        """
        super().__init__()
        self.weight = weight
        self.adaptation = adaptation
        self.logit_strides = logit_strides
        self.temperature = temperature
        if adaptation is None:
            self.needs = frozenset({"features", "dense"})

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> dict:
        node = cfg.MODEL.KD.CWD
        weight = cls.weight_of(node, student)
        common = {"weight": weight, "temperature": node.TEMPERATURE}
        if node.MAPS == "logits":
            strides = common_strides(student, teacher)
            _check_logit_channels(strides, student, teacher)
            return {**common, "logit_strides": tuple(strides)}
        return {**common, "adaptation": AdaptationLayers.from_node(cls.CONFIG_NODE, node, student, teacher)}

    def forward(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[str, Tensor]:
        if self.adaptation is None:
            pairs = [tuple(outputs.logit_map(s) for outputs in (student, teacher)) for s in self.logit_strides]
        else:
            pairs = self.adaptation.pairs(student, teacher)
        return {"loss_cwd": self.weight * sum(channel_wise_loss(s, t, self.temperature) for s, t in pairs)}


def _check_logit_channels(strides: list[int], student: DetectorSpec, teacher: DetectorSpec) -> None:
    """Raise a UserError where two dense heads do not have equally many anchors a position. Others are refused by KDMetaArch."""
    if any("dense" not in spec.provides or spec.cell_anchors is None for spec in (student, teacher)):
        return
    for stride in strides:
        ours, theirs = (len(spec.cell_anchors[stride]) for spec in (student, teacher))
        if ours != theirs:
            raise UserError(
                f"CWD compares class logits channel by channel (MODEL.KD.CWD.MAPS is 'logits'), but at stride {stride} the student "
                f"({student.name}) has {ours} anchors a position and the teacher ({teacher.name}) {theirs}."
            )
