"""FPNs for any bottom-up network with stages res2 to res5."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from torch import nn


def rcnn_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """Build the FPN of R-CNNs: P2 to P6."""
    return _fpn(cfg, bottom_up, LastLevelMaxPool())


def retinanet_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """Build the FPN of RetinaNet: P3 to P7, with P6 and P7 computed from res5."""
    channels = bottom_up.output_shape()["res5"].channels
    return _fpn(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))


def dense_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """Build the FPN of FCOS, ATSS and GFL: P3 to P7, with P6 and P7 from P5. Only laterals depend on `bottom_up`."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return _fpn(cfg, bottom_up, LastLevelP6P7(channels, channels, in_feature="p5"))


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
