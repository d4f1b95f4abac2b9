"""ResNets of basic blocks with any number of blocks and any width per stage.

Detectron2's `build_resnet_backbone` supports ResNet-18 and deeper at full width. Students are often smaller: ResNet-10
(one block per stage), or narrower. The networks use Detectron2's blocks and names, so that ResNet-18 weights fill every
block of the same name and shape.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

from ..errors import UserError
from ..keys import AtLeast, Keys
from .necks import register_with_fpns

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlimResNetKeys(Keys):
    """Config keys of slim ResNets; norm, stem width, freezing and outputs are Detectron2's keys."""

    blocks_per_stage: Annotated[
        tuple[int, int, int, int],
        AtLeast(1),
        "Number of basic blocks in res2, res3, res4 and res5: (1, 1, 1, 1) is ResNet-10, (2, 2, 2, 2) is ResNet-18.",
    ] = (1, 1, 1, 1)
    widths: Annotated[
        tuple[int, int, int, int], AtLeast(1), "Channels of the four stages; adjacent stages must differ."
    ] = (64, 128, 256, 512)

    def check(self, name: str) -> None:
        if any(a == b for a, b in pairwise(self.widths)):
            raise UserError(
                f"{name}.WIDTHS is {self.widths}; adjacent stages must differ, because Detectron2's basic block can halve the resolution "
                "only if the width changes."
            )


def add_slim_resnet_config(cfg: CfgNode) -> None:
    """Add the config node MODEL.SLIM_RESNET."""
    cfg.MODEL.SLIM_RESNET = CfgNode()
    SlimResNetKeys.add_to(cfg.MODEL.SLIM_RESNET)


@BACKBONE_REGISTRY.register()
def build_slim_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Build a ResNet of basic blocks from MODEL.SLIM_RESNET."""
    keys = SlimResNetKeys.read(cfg.MODEL.SLIM_RESNET, "MODEL.SLIM_RESNET")
    norm = cfg.MODEL.RESNETS.NORM
    for key, value in {"DEFORM_ON_PER_STAGE": [False] * 4, "RES5_DILATION": 1}.items():
        if cfg.MODEL.RESNETS[key] != value:
            logger.warning(f"MODEL.RESNETS.{key} {cfg.MODEL.RESNETS[key]} has no effect on a slim ResNet.")
    stem = BasicStem(input_shape.channels, cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, norm)
    stages, channels = [], cfg.MODEL.RESNETS.STEM_OUT_CHANNELS
    for index, (count, width) in enumerate(zip(keys.blocks_per_stage, keys.widths, strict=True)):
        strides = [1 if index == 0 else 2] + [1] * (count - 1)
        stages.append(
            ResNet.make_stage(
                BasicBlock, count, stride_per_block=strides, in_channels=channels, out_channels=width, norm=norm
            )
        )
        channels = width
    net = ResNet(stem, stages, out_features=list(cfg.MODEL.RESNETS.OUT_FEATURES))
    return net.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)


(
    build_slim_resnet_fpn_backbone,
    build_retinanet_slim_resnet_fpn_backbone,
    build_dense_slim_resnet_fpn_backbone,
) = register_with_fpns("slim_resnet", build_slim_resnet_backbone)
