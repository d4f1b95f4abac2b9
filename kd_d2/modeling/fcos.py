"""Detectron2's FCOS with a YAML config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import ANCHOR_GENERATOR_REGISTRY, META_ARCH_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.modeling.meta_arch import fcos
from detectron2.structures import Boxes
from torch import Tensor, nn

from ..keys import Above
from .deformable import ModulatedDeformableConv
from .dense import DenseKeys, FocalAlpha, FocalGamma, dense_arguments


@dataclass(frozen=True)
class FCOSKeys(DenseKeys):
    center_sampling_radius: Annotated[
        float, Above(0), "Radius around the center of a box, in strides, within which points are positive."
    ] = 1.5
    focal_loss_alpha: FocalAlpha = 0.25
    focal_loss_gamma: FocalGamma = 2.0
    box_activation: Annotated[
        Literal["relu", "exp"],
        "Function of the head's box regression that gives the distances to the sides of the box: 'relu' in strides, 'exp' in pixels. "
        "The authors' first version has 'exp'.",
    ] = "relu"
    level_scales: Annotated[
        bool, "Multiply the box regression of each level by a learned scale, as the authors do."
    ] = False
    centerness_tower: Annotated[
        Literal["box", "class"],
        "Tower of the head that predicts the centerness: 'class' in the authors' first version.",
    ] = "box"
    deformable_towers: Annotated[
        bool, "Make the last convolution of each tower of the head deformable and modulated (Zhu et al. 2019)."
    ] = False


class FCOSHead(fcos.FCOSHead):
    """Detectron2's head of FCOS, with the options of the authors' versions.

    Args:
        level_scales: see MODEL.FCOS.LEVEL_SCALES.
        centerness_tower: see MODEL.FCOS.CENTERNESS_TOWER.
        deformable_towers: see MODEL.FCOS.DEFORMABLE_TOWERS.
        arguments: arguments of Detectron2's head.
    """

    def __init__(
        self,
        *,
        level_scales: bool = False,
        centerness_tower: str = "box",
        deformable_towers: bool = False,
        **arguments: Any,
    ):
        super().__init__(**arguments)
        if deformable_towers:
            _make_deformable(self.cls_subnet)
            _make_deformable(self.bbox_subnet)
        self.centerness_tower = centerness_tower
        self.scales = nn.Parameter(torch.ones(self._num_features)) if level_scales else None

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Map levels (B, C, H, W) to logits (B, K, H, W), deltas (B, 4, H, W) and centerness (B, 1, H, W) by level."""
        logits, deltas, centerness = [], [], []
        for level in features:
            towers = {"class": self.cls_subnet(level), "box": self.bbox_subnet(level)}
            logits.append(self.cls_score(towers["class"]))
            deltas.append(self.bbox_pred(towers["box"]))
            centerness.append(self.ctrness(towers[self.centerness_tower]))
        if self.scales is not None:
            deltas = [level * scale for level, scale in zip(deltas, self.scales, strict=True)]
        return logits, deltas, centerness


def _make_deformable(tower: nn.Sequential) -> None:
    """Replace the last convolution of a tower."""
    last = max(number for number, layer in enumerate(tower) if isinstance(layer, nn.Conv2d))
    convolution = ModulatedDeformableConv(tower[last].out_channels)
    convolution.load_state_dict(tower[last].state_dict(), strict=False)
    tower[last] = convolution


class ExponentialDistances(Box2BoxTransformLinear):
    """Transform of logarithms of distances, in pixels, to boxes; `get_deltas` returns the distances."""

    def __init__(self) -> None:
        super().__init__(normalize_by_size=False)

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Return the boxes (P, 4) of logarithms (P, 4) around the centers of anchors (P, 4)."""
        return super().apply_deltas(deltas.exp(), boxes)


@META_ARCH_REGISTRY.register()
class FCOS(fcos.FCOS):
    """Detectron2's FCOS (Tian et al. 2019), which lacks a YAML config, configured by MODEL.FCOS."""

    @configurable
    def __init__(self, *, input_format: str = "BGR", anchor_generator: nn.Module | None = None, **arguments: Any):
        """
        Args:
            input_format: channel order of the images and of pixel_mean.
            anchor_generator: generator of anchors with a side of one stride; None for Detectron2's.
            arguments: arguments of Detectron2's FCOS.
        """
        super().__init__(**arguments)
        self.input_format = input_format
        if anchor_generator is not None:
            self.anchor_generator = anchor_generator

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
        head |= {name: detector.pop(name) for name in ("level_scales", "centerness_tower", "deformable_towers")}
        if detector.pop("box_activation") == "exp":
            detector["box2box_transform"] = ExponentialDistances()
        strides = [shape.stride for shape in head["input_shape"]]
        detector["anchor_generator"] = ANCHOR_GENERATOR_REGISTRY.get(cfg.MODEL.ANCHOR_GENERATOR.NAME)(
            sizes=[[stride] for stride in strides],
            aspect_ratios=[1.0],
            strides=strides,
            offset=detector.pop("anchor_offset"),
        )
        return {**detector, "head": FCOSHead(**head)}
