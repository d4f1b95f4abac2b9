"""Residual networks of basic blocks with any number of blocks and any width a stage.

Detectron2's own `build_resnet_backbone` knows ResNet-18 and deeper, at full width. A student often has to be smaller:
ResNet-10 (one block a stage), or narrow. Built of Detectron2's blocks under Detectron2's names, so that ResNet-18
weights fill every block of the same name and shape.
"""

from __future__ import annotations

from itertools import pairwise

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

from ..errors import UserError

STAGES = ("res2", "res3", "res4", "res5")


def add_slim_resnet_config(cfg: CfgNode) -> None:
    """Add MODEL.SLIM_RESNET. Norm, stem width, freezing and outputs are Detectron2's own keys of MODEL.RESNETS."""
    cfg.MODEL.SLIM_RESNET = CfgNode()
    # Basic blocks in res2, res3, res4, res5: (1, 1, 1, 1) is ResNet-10, (2, 2, 2, 2) ResNet-18.
    cfg.MODEL.SLIM_RESNET.BLOCKS_PER_STAGE = (1, 1, 1, 1)
    # Channels of the stages; neighbouring ones must differ.
    cfg.MODEL.SLIM_RESNET.WIDTHS = (64, 128, 256, 512)


@BACKBONE_REGISTRY.register()
def build_slim_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """A ResNet of basic blocks as MODEL.SLIM_RESNET says."""
    blocks, widths = cfg.MODEL.SLIM_RESNET.BLOCKS_PER_STAGE, cfg.MODEL.SLIM_RESNET.WIDTHS
    for key, values in (("BLOCKS_PER_STAGE", blocks), ("WIDTHS", widths)):
        if len(values) != len(STAGES) or not all(isinstance(v, int) and v > 0 for v in values):
            raise UserError(
                f"MODEL.SLIM_RESNET.{key} is {values}; it must be four positive integers, one for each of {STAGES}."
            )
    if any(a == b for a, b in pairwise(widths)):
        raise UserError(
            f"MODEL.SLIM_RESNET.WIDTHS is {widths}; neighbouring stages must differ, since Detectron2's basic block can halve "
            "the map only where the width changes."
        )
    norm = cfg.MODEL.RESNETS.NORM
    stem = BasicStem(input_shape.channels, cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, norm)
    stages, channels = [], cfg.MODEL.RESNETS.STEM_OUT_CHANNELS
    for index, (count, width) in enumerate(zip(blocks, widths, strict=True)):
        strides = [1 if index == 0 else 2] + [1] * (count - 1)
        stages.append(
            ResNet.make_stage(
                BasicBlock, count, stride_per_block=strides, in_channels=channels, out_channels=width, norm=norm
            )
        )
        channels = width
    net = ResNet(stem, stages, out_features=list(cfg.MODEL.RESNETS.OUT_FEATURES))
    return net.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)


def _fpn(cfg: CfgNode, bottom_up: ResNet, top_block) -> FPN:
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_slim_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Slim ResNet with the FPN of R-CNNs: P2 to P6."""
    return _fpn(cfg, build_slim_resnet_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_slim_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Slim ResNet with the FPN of RetinaNet: P3 to P7, the last two from res5."""
    bottom_up = build_slim_resnet_backbone(cfg, input_shape)
    channels = bottom_up.output_shape()["res5"].channels
    return _fpn(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))
