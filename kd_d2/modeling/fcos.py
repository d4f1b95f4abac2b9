"""Detectron2's FCOS with a YAML config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import fcos
from detectron2.structures import Boxes
from torch import Tensor

from ..keys import Above
from .dense import DenseKeys, FocalAlpha, FocalGamma, dense_arguments


@dataclass(frozen=True)
class FCOSKeys(DenseKeys):
    center_sampling_radius: Annotated[
        float, Above(0), "Radius around the center of a box, in strides, within which points are positive."
    ] = 1.5
    focal_loss_alpha: FocalAlpha = 0.25
    focal_loss_gamma: FocalGamma = 2.0


@META_ARCH_REGISTRY.register()
class FCOS(fcos.FCOS):
    """Detectron2's FCOS (Tian et al. 2019), which lacks a YAML config, configured by MODEL.FCOS."""

    @configurable
    def __init__(self, *, input_format: str = "BGR", **arguments: Any):
        """
        Args:
            input_format: channel order of the images and of pixel_mean.
            arguments: arguments of Detectron2's FCOS.
        """
        super().__init__(**arguments)
        self.input_format = input_format

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
        pred_centerness: list[Tensor],
    ) -> dict[str, Tensor]:
        """Compute Detectron2's losses in float32 (it mixes dtypes under autocast); not finite if the boxes are not."""
        with torch.autocast(pred_logits[0].device.type, enabled=False):
            logits, deltas, centerness = (
                [level.float() for level in levels] for levels in (pred_logits, pred_anchor_deltas, pred_centerness)
            )
            try:
                return super().losses(anchors, logits, gt_labels, deltas, gt_boxes, centerness)
            except AssertionError:  # "bad box"; return non-finite losses, which the trainer reports
                mean = torch.cat(deltas, 1).mean()
                if mean.isfinite():
                    raise
                return dict.fromkeys(("loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"), mean)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        detector, head = dense_arguments(cfg, "FCOS", FCOSKeys)
        return {**detector, "head": fcos.FCOSHead(**head)}
