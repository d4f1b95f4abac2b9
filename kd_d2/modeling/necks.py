"""FPNs for any bottom-up network with stages res2 to res5."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn

from ..keys import Keys

BackboneBuilder: TypeAlias = Callable[[CfgNode, ShapeSpec], Backbone]
FPNBuilder: TypeAlias = Callable[[CfgNode, ShapeSpec], FPN]


@dataclass(frozen=True)
class DenseFPNKeys(Keys):
    """Config keys of `dense_fpn`, with defaults as in FCOS."""

    p6_source: Annotated[
        Literal["p5", "res5"], "Feature map from which P6 is computed: 'res5' in RetinaNet, else 'p5'."
    ] = "p5"
    relu_before_p7: Annotated[
        bool, "Compute P7 from the positive part of P6; False in most detectors of MMDetection."
    ] = True
    p6_p7_norm: Annotated[
        str | None, "Normalization layers of P6 and P7; '' for none. MODEL.FPN.NORM is that of the finer levels."
    ] = ""


class P6P7(nn.Module):
    """P6 and P7 by convolutions of stride 2.

    Args:
        in_channels: channels of `in_feature`.
        out_channels: channels of P6 and P7.
        in_feature: name of the feature map from which P6 is computed.
        norm: normalization layers of both; "" for none.
        relu_before_p7: see MODEL.DENSE_FPN.RELU_BEFORE_P7.
    """

    num_levels = 2

    def __init__(self, in_channels: int, out_channels: int, in_feature: str, norm: str | None, relu_before_p7: bool):
        super().__init__()
        self.in_feature = in_feature
        self.relu_before_p7 = relu_before_p7
        self.p6, self.p7 = (
            Conv2d(
                channels, out_channels, 3, stride=2, padding=1, bias=not norm, norm=get_norm(norm or "", out_channels)
            )
            for channels in (in_channels, out_channels)
        )
        for convolution in (self.p6, self.p7):
            c2_xavier_fill(convolution)

    def forward(self, source: Tensor) -> list[Tensor]:
        """Map `in_feature` (B, C, H, W) to P6 and P7."""
        p6 = self.p6(source)
        return [p6, self.p7(F.relu(p6) if self.relu_before_p7 else p6)]


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
    source_channels = bottom_up.output_shape()["res5"].channels if keys.p6_source == "res5" else channels
    top_block = P6P7(source_channels, channels, keys.p6_source, keys.p6_p7_norm, keys.relu_before_p7)
    return _fpn(cfg, bottom_up, top_block)


def _fpn(cfg: CfgNode, bottom_up: Backbone, top_block: nn.Module) -> FPN:
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def register_with_fpns(bottom_up: str, build_bottom_up: BackboneBuilder) -> tuple[FPNBuilder, FPNBuilder, FPNBuilder]:
    """Register a bottom-up network with the FPNs of R-CNNs, of RetinaNet and of dense detectors, and return the three builders.

    With `bottom_up` "swin", they are build_swin_fpn_backbone, build_retinanet_swin_fpn_backbone and build_dense_swin_fpn_backbone.
    """

    def register(prefix: str, add_fpn: Callable[[CfgNode, Backbone], FPN]) -> FPNBuilder:
        def build(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
            return add_fpn(cfg, build_bottom_up(cfg, input_shape))

        build.__name__ = build.__qualname__ = f"build_{prefix}{bottom_up}_fpn_backbone"
        build.__module__ = build_bottom_up.__module__
        BACKBONE_REGISTRY.register(build)
        return build

    return register("", rcnn_fpn), register("retinanet_", retinanet_fpn), register("dense_", dense_fpn)


@BACKBONE_REGISTRY.register()
def build_dense_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build Detectron2's ResNet with the FPN of FCOS, ATSS and GFL."""
    return dense_fpn(cfg, build_resnet_backbone(cfg, input_shape))
