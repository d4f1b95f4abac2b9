"""MobileNetV2 of any width as a Detectron2 bottom-up network, with torchvision's blocks and parameter names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor
from torchvision.models import mobilenet_v2

from ..errors import UserError
from ..keys import Above, AtMost, Keys
from .necks import register_with_fpns

# Index of torchvision's last block in each stage, and stride of the stage, by Detectron2's stage names.
LAST_BLOCK = {"stem": 1, "res2": 3, "res3": 6, "res4": 13, "res5": 17}
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


@dataclass(frozen=True)
class MobileNetV2Keys(Keys):
    """Config keys of MobileNetV2; MODEL.BACKBONE.FREEZE_AT and MODEL.RESNETS.OUT_FEATURES apply too."""

    width_mult: Annotated[
        float, Above(0), AtMost(2), "Width multiplier of the number of channels: 0.5 halves the width."
    ] = 1.0
    norm: Annotated[str | None, "Normalization layers: 'BN', 'SyncBN' or 'FrozenBN'."] = "BN"


class MobileNetV2(Backbone):
    """MobileNetV2 (Sandler et al. 2018) with torchvision's parameter names, without last convolution and classifier.

    Args:
        width_mult: width multiplier of the number of channels.
        norm: normalization, see Detectron2's `get_norm`.
        out_features: stages to return, from res2, res3, res4 and res5.
    """

    def __init__(self, width_mult: float, norm: str, out_features: list[str]):
        super().__init__()
        blocks = mobilenet_v2(width_mult=width_mult, norm_layer=lambda channels: get_norm(norm, channels)).features
        self.features = blocks[: LAST_BLOCK["res5"] + 1]
        self._out_features = out_features
        self._out_feature_strides = {name: STRIDES[name] for name in out_features}
        self._out_feature_channels = {name: blocks[LAST_BLOCK[name]].out_channels for name in out_features}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images (B, 3, H, W) to the outputs of the stages in `out_features`, by name."""
        outputs, end = {}, 0
        for name, last in LAST_BLOCK.items():
            start, end = end, last + 1
            x = self.features[start:end](x)
            if name in self._out_features:
                outputs[name] = x
        return outputs

    def freeze(self, freeze_at: int) -> MobileNetV2:
        """Freeze nothing (0), the stem (1), also res2 (2), and so on, and return the network."""
        if freeze_at > 0:
            last = list(LAST_BLOCK.values())[:freeze_at][-1]
            for index, block in enumerate(self.features[: last + 1]):
                self.features[index] = FrozenBatchNorm2d.convert_frozen_batchnorm(block.requires_grad_(False))
        return self


@BACKBONE_REGISTRY.register()
def build_mobilenet_v2_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MobileNetV2:
    """Build a MobileNetV2 from MODEL.MOBILENET_V2."""
    keys = MobileNetV2Keys.read(cfg.MODEL.MOBILENET_V2, "MODEL.MOBILENET_V2")
    if input_shape.channels != 3:
        raise UserError(f"MobileNetV2 takes images with 3 channels; MODEL.PIXEL_MEAN has {input_shape.channels}.")
    unknown = sorted(set(cfg.MODEL.RESNETS.OUT_FEATURES) - STRIDES.keys())
    if unknown:
        raise UserError(f"MODEL.RESNETS.OUT_FEATURES names {', '.join(unknown)}; MobileNetV2 has {', '.join(STRIDES)}.")
    net = MobileNetV2(keys.width_mult, keys.norm, list(cfg.MODEL.RESNETS.OUT_FEATURES))
    return net.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)


(
    build_mobilenet_v2_fpn_backbone,
    build_retinanet_mobilenet_v2_fpn_backbone,
    build_dense_mobilenet_v2_fpn_backbone,
) = register_with_fpns("mobilenet_v2", build_mobilenet_v2_backbone)
