"""FPNs for any bottom-up network with stages res2 to res5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn

from ..keys import Keys


@dataclass(frozen=True)
class DenseFPNKeys(Keys):
    """Config keys of `dense_fpn`, with defaults as in FCOS."""

    p6_source: Annotated[
        Literal["p5", "res5"], "Feature map from which P6 is computed: 'res5' in RetinaNet, else 'p5'."
    ] = "p5"
    relu_before_p7: Annotated[
        bool, "Compute P7 from the positive part of P6; False in most detectors of MMDetection."
    ] = True


class LinearP6P7(LastLevelP6P7):
    """P6 and P7 by convolutions of stride 2, without a ReLU between them, as in MMDetection."""

    def forward(self, source: Tensor) -> list[Tensor]:
        """Map `in_feature` (B, C, H, W) to P6 and P7."""
        p6 = self.p6(source)
        return [p6, self.p7(p6)]


def rcnn_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """Build the FPN of R-CNNs: P2 to P6."""
    return _fpn(cfg, bottom_up, LastLevelMaxPool())


def retinanet_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """Build the FPN of RetinaNet: P3 to P7, with P6 and P7 computed from res5."""
    channels = bottom_up.output_shape()["res5"].channels
    return _fpn(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))


def dense_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """Build the FPN of FCOS, ATSS and GFL: P3 to P7, with P6 from P5 unless MODEL.DENSE_FPN says otherwise."""
    keys = DenseFPNKeys.read(cfg.MODEL.DENSE_FPN, "MODEL.DENSE_FPN")
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    top_block = LastLevelP6P7 if keys.relu_before_p7 else LinearP6P7
    source_channels = bottom_up.output_shape()["res5"].channels if keys.p6_source == "res5" else channels
    return _fpn(cfg, bottom_up, top_block(source_channels, channels, in_feature=keys.p6_source))


def _fpn(cfg: CfgNode, bottom_up: Backbone, top_block: nn.Module) -> FPN:
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_dense_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build Detectron2's ResNet with the FPN of FCOS, ATSS and GFL."""
    return dense_fpn(cfg, build_resnet_backbone(cfg, input_shape))
