"""FGFI: features imitated near objects, where anchors overlap them."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from ..adapters import DetectorOutputs, DetectorSpec
from ..distributed import mean_count_across_ranks
from ..errors import UserError
from ..losses import masked_squared_error
from .adaptation import ADAPTATION_KERNELS, AdaptationLayers
from .base import DISTILLER_REGISTRY, Distiller, check_choice


@DISTILLER_REGISTRY.register()
class FGFI(Distiller):
    """Fine-grained feature imitation (Wang et al. 2019, equations 1 to 3).

    L = WEIGHT * 1 / (2 * N) * sum over levels and positions of the mask and channels of (phi(F_S) - F_T)^2, N positions. A position
    is in the mask where one of its anchors overlaps a ground-truth box more than THRESHOLD times the best of the level's anchors.
    """

    needs = frozenset({"features", "anchors", "targets"})
    needs_of_teacher = frozenset({"features"})
    loss_names = ("loss_fgfi",)
    CONFIG_NODE = "FGFI"
    default_weight = 0.01  # of the authors' programs; the loss sums over channels

    @classmethod
    def add_config(cls, node: CfgNode) -> None:
        # psi: the part of the best overlap of a box that an anchor needs.
        node.THRESHOLD = 0.5
        # phi, between student and teacher features: "none", "1x1" or "3x3".
        node.ADAPTATION = "3x3"

    @classmethod
    def validate_config(cls, node: CfgNode) -> None:
        check_choice(cls.CONFIG_NODE, "ADAPTATION", node.ADAPTATION, ADAPTATION_KERNELS)
        if not 0 <= node.THRESHOLD < 1:
            raise UserError(f"MODEL.KD.FGFI.THRESHOLD is {node.THRESHOLD}; it must be from 0 to below 1.")

    @configurable
    def __init__(self, *, weight: float, adaptation: AdaptationLayers, threshold: float = 0.5):
        """
        Args:
            weight: of the loss.
            adaptation: the layers phi; its strides are the levels that are compared.
            threshold: psi.
        """
        super().__init__()
        self.weight = weight
        self.adaptation = adaptation
        self.threshold = threshold

    @classmethod
    def from_config(cls, cfg: CfgNode, student: DetectorSpec, teacher: DetectorSpec) -> dict:
        node = cfg.MODEL.KD.FGFI
        adaptation = AdaptationLayers.from_node(cls.CONFIG_NODE, node, student, teacher)
        without = [] if student.cell_anchors is None else sorted({*adaptation.strides} - student.cell_anchors.keys())
        if without:
            raise UserError(
                f"FGFI reads the student's anchors on every level that is compared, but {student.name} has none at the strides "
                f"{without}: add them to the IN_FEATURES of its anchors."
            )
        return {
            "weight": node.WEIGHT,
            "adaptation": adaptation,
            "threshold": node.THRESHOLD,
        }

    def forward(
        self, student: DetectorOutputs, teacher: DetectorOutputs, targets: list[Instances]
    ) -> dict[str, Tensor]:
        masks, total = [], 0
        for stride, (s, t) in zip(self.adaptation.strides, self.adaptation.pairs(student, teacher), strict=True):
            mask = near_objects(student.anchors[stride], s.shape[-2:], targets, self.threshold)
            total = total + s.shape[1] * masked_squared_error(s, t, mask)
            masks.append(mask)
        count = mean_count_across_ranks(sum(mask.sum() for mask in masks))
        return {"loss_fgfi": self.weight * total / (2 * count)}


@torch.no_grad()
def near_objects(anchors: Boxes, shape: tuple[int, int], targets: list[Instances], threshold: float) -> Tensor:
    """(B, H, W) of zeros and ones: where an anchor overlaps a box more than `threshold` times the best of them does.

    Args:
        anchors: of a level, HWA in order of row, column, anchor.
        shape: H, W.
    """
    masks = []
    for target in targets:
        overlap_NR = pairwise_iou(target.gt_boxes, anchors)
        if len(target):
            is_near_R = (overlap_NR > threshold * overlap_NR.amax(1, keepdim=True)).any(0)
        else:
            is_near_R = overlap_NR.new_zeros(len(anchors), dtype=torch.bool)
        masks.append(is_near_R.view(*shape, -1).any(-1))
    return torch.stack(masks).float()
