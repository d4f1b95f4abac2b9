"""MobileNetV2 of any width: torchvision's blocks under torchvision's names, as a bottom-up network of Detectron2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN
from torch import Tensor
from torchvision.models import mobilenet_v2

from ..errors import UserError
from ..keys import Above, AtMost, Keys
from .necks import dense_fpn, rcnn_fpn, retinanet_fpn

# The last of torchvision's blocks in each stage, by the names of Detectron2's stages, with the stage's stride.
LAST_BLOCK = {"stem": 1, "res2": 3, "res3": 6, "res4": 13, "res5": 17}
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


@dataclass(frozen=True)
class MobileNetV2Keys(Keys):
    """Freezing and outputs are MODEL.BACKBONE.FREEZE_AT and MODEL.RESNETS.OUT_FEATURES."""

    width_mult: Annotated[
        float, Above(0), AtMost(2), "Channels, as a part of the full network's: 0.5 is the half-width form."
    ] = 1.0
    norm: Annotated[str | None, "Normalization: 'BN', 'SyncBN' or 'FrozenBN'."] = "BN"


class MobileNetV2(Backbone):
    """MobileNetV2 without its last convolution and classifier (Sandler et al. 2018); parameters are called as torchvision's.

    Args:
        width_mult: channels, as a part of the full network's.
        norm: as of Detectron2's `get_norm`.
        out_features: stages to return, of res2, res3, res4, res5.
    """

    def __init__(self, width_mult: float, norm: str, out_features: list[str]):
        super().__init__()
        blocks = mobilenet_v2(width_mult=width_mult, norm_layer=lambda channels: get_norm(norm, channels)).features
        self.features = blocks[: LAST_BLOCK["res5"] + 1]
        self._out_features = out_features
        self._out_feature_strides = {name: STRIDES[name] for name in out_features}
        self._out_feature_channels = {name: blocks[LAST_BLOCK[name]].out_channels for name in out_features}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) to the stages asked for, by name."""
        outputs, end = {}, 0
        for name, last in LAST_BLOCK.items():
            start, end = end, last + 1
            x = self.features[start:end](x)
            if name in self._out_features:
                outputs[name] = x
        return outputs

    def freeze(self, freeze_at: int) -> MobileNetV2:
        """Freeze the stem (1), res2 too (2), and so on; 0 freezes nothing. Returns itself."""
        if freeze_at:
            last = list(LAST_BLOCK.values())[freeze_at - 1]
            for index, block in enumerate(self.features[: last + 1]):
                self.features[index] = FrozenBatchNorm2d.convert_frozen_batchnorm(block.requires_grad_(False))
        return self


@BACKBONE_REGISTRY.register()
def build_mobilenet_v2_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MobileNetV2:
    """A MobileNetV2 as MODEL.MOBILENET_V2 says."""
    keys = MobileNetV2Keys.read(cfg.MODEL.MOBILENET_V2, "MODEL.MOBILENET_V2")
    if input_shape.channels != 3:
        raise UserError(f"MobileNetV2 reads images of 3 channels; MODEL.PIXEL_MEAN has {input_shape.channels}.")
    unknown = sorted(set(cfg.MODEL.RESNETS.OUT_FEATURES) - STRIDES.keys())
    if unknown:
        raise UserError(f"MODEL.RESNETS.OUT_FEATURES names {', '.join(unknown)}; MobileNetV2 has {', '.join(STRIDES)}.")
    net = MobileNetV2(keys.width_mult, keys.norm, list(cfg.MODEL.RESNETS.OUT_FEATURES))
    return net.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)


@BACKBONE_REGISTRY.register()
def build_mobilenet_v2_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """MobileNetV2 with the FPN of R-CNNs."""
    return rcnn_fpn(cfg, build_mobilenet_v2_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_retinanet_mobilenet_v2_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """MobileNetV2 with the FPN of RetinaNet."""
    return retinanet_fpn(cfg, build_mobilenet_v2_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_dense_mobilenet_v2_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """MobileNetV2 with the FPN of FCOS, ATSS and GFL."""
    return dense_fpn(cfg, build_mobilenet_v2_backbone(cfg, input_shape))
