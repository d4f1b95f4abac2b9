"""PKD: channels of the student correlate with the teacher's, whatever the scale of either (Cao et al. 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import Tensor

from ..adapters import DetectorOutputs, DetectorSpec
from ..distributed import mean_across_ranks, mean_across_ranks_with_local_gradient
from ..losses import channel_means, channel_moments, pearson_loss_of_moments
from .adaptation import ADAPTATION_KERNELS, AdaptationLayers
from .base import DISTILLER_REGISTRY, Distiller, check_choice, in_float32

RESIZED = ("student", "teacher")


@DISTILLER_REGISTRY.register()
class PKD(Distiller):
    """Distillation by Pearson correlation (Cao et al. 2022), made for detectors of different families.

    L = WEIGHT * sum over levels of 1/2 * mean over (B, C, H, W) of (F^_S - F^_T)^2, where F^ is standardised by channel over the whole
    batch, that of all ranks (see `pearson_loss`). Levels are paired by stride.
    """

    needs = frozenset({"features"})
    loss_names = ("loss_pkd",)
    CONFIG_NODE = "PKD"
    resizes = True

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # None: 10 for one-stage detectors, 6 for the others.
        node.WEIGHT = None
        # Where maps of one stride have different sizes: whose are resized to the partner's, the "student"'s or the "teacher"'s.
        node.RESIZE = "student"
        # phi, between student and teacher features: "none", "1x1" or "3x3"; None: "1x1" where the channels differ.
        node.ADAPTATION = None

    @classmethod
    def weight_default(cls, node: CfgNode, student: DetectorSpec) -> float:
        return 10.0 if student.family == "one-stage" else 6.0

    @classmethod
    def validate_config(cls, node: CfgNode) -> None:
        check_choice(cls.CONFIG_NODE, "RESIZE", node.RESIZE, RESIZED)
        check_choice(cls.CONFIG_NODE, "ADAPTATION", node.ADAPTATION, (None, *ADAPTATION_KERNELS))

    @configurable
    def __init__(self, *, weight: float, adaptation: AdaptationLayers, resized: str = "student"):
        """
        Args:
            weight: of the loss.
            adaptation: the layers phi; its strides are the levels that are compared.
            resized: whose maps are brought to the size of the partner's, "student" or "teacher".
        """
        super().__init__()
        self.weight = weight
        self.adaptation = adaptation
        self.resized = resized

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> dict:
        node = cfg.MODEL.KD.PKD
        return {
            "weight": cls.weight_of(node, student),
            "adaptation": AdaptationLayers.from_node(cls.CONFIG_NODE, node, student, teacher),
            "resized": node.RESIZE,
        }

    def forward(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[str, Tensor]:
        pairs = [self._of_one_size(s, t) for s, t in self.adaptation.pairs(student, teacher)]
        channels = [t.shape[1] for _, t in pairs]
        # All levels in one message each: their means, then moments around the means of all ranks.
        means = mean_across_ranks(torch.cat([channel_means(s, t) for s, t in pairs], 1))
        moments = torch.cat(
            [channel_moments(s, t, mean) for (s, t), mean in zip(pairs, means.split(channels, 1), strict=True)], 1
        )
        levels = mean_across_ranks_with_local_gradient(moments).split(channels, 1)
        counts = [comm.get_world_size() * t[:, 0].numel() for _, t in pairs]
        losses = [pearson_loss_of_moments(level, count) for level, count in zip(levels, counts, strict=True)]
        return {"loss_pkd": self.weight * sum(losses)}

    def _of_one_size(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        if student.shape[-2:] == teacher.shape[-2:]:
            return student, teacher
        if self.resized == "student":
            return resize(student, teacher.shape[-2:]), teacher
        return student, resize(teacher, student.shape[-2:])


@in_float32
def resize(maps: Tensor, size: torch.Size) -> Tensor:
    """Bilinear, corners not aligned."""
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)
