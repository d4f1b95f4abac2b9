"""ResNets and FPNs of MMDetection."""

from __future__ import annotations

from typing import Any

from ..imported import Weights
from .settings import Settings

Keys = dict[str, Any]

BASIC = (18, 34)
"""Depths of ResNets with basic blocks."""
CONV_MODULE = ("conv", "gn")
"""Names of convolution and normalization in MMDetection's ConvModule."""


def import_resnet(backbone: Settings, weights: Weights) -> Keys:
    """Import a ResNet or ResNeXt with four stages.

    Returns:
        Its config keys.
    """
    is_grouped = backbone.choose("type", {"ResNet": False, "ResNeXt": True})
    depth = backbone.choose("depth", {depth: depth for depth in (18, 34, 50, 101, 152)})
    channels = backbone.read("base_channels", 64)
    width = backbone.read("base_width", 4) if is_grouped else channels
    groups = backbone.read("groups", 1) if is_grouped else 1
    backbone.only(
        in_channels=3,
        num_stages=4,
        strides=(1, 2, 2, 2),
        dilations=(1, 1, 1, 1),
        out_indices=(0, 1, 2, 3),
        deep_stem=False,
        avg_down=False,
    )
    backbone.read("norm_eval", True)  # training only
    norm = backbone.node("norm_cfg", {"type": "BN"})
    norm.choose("type", {"BN": "", "SyncBN": ""})
    norm.only(eps=1e-5)
    norm.read("requires_grad", True)  # training only
    deformable = _deformable_convolutions(backbone, weights)
    weights.resnet("backbone", "backbone.bottom_up")
    return deformable | {
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.NUM_GROUPS": groups,
        "MODEL.RESNETS.WIDTH_PER_GROUP": width,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": backbone.read("stem_channels", None) or channels,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": channels if depth in BASIC else 4 * channels,
        "MODEL.RESNETS.STRIDE_IN_1X1": backbone.choose("style", {"pytorch": False, "caffe": True}, "pytorch"),
        "MODEL.RESNETS.NORM": "FrozenBN",
        "MODEL.BACKBONE.FREEZE_AT": backbone.read("frozen_stages", -1) + 1,
    }


def _deformable_convolutions(backbone: Settings, weights: Weights) -> Keys:
    stages = backbone.numbers("stage_with_dcn", [False] * 4)
    if backbone.read("dcn", None) is None:
        return {}
    layer = backbone.node("dcn")
    layer.only(fallback_on_stride=False)
    weights.rename(r"^(backbone\..+\.conv2)\.conv_offset\.", r"\1_offset.")
    return {
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [bool(stage) for stage in stages],
        "MODEL.RESNETS.DEFORM_MODULATED": layer.choose("type", {"DCN": False, "DCNv2": True}),
        "MODEL.RESNETS.DEFORM_NUM_GROUPS": layer.count("deform_groups", layer.read("deformable_groups", 1)),
    }


def import_rcnn_fpn(neck: Settings, weights: Weights) -> Keys:
    """Import the FPN of R-CNNs: P2 to P6, the last one by pooling."""
    neck.only(start_level=0, add_extra_convs=False)
    neck.read("relu_before_extra_convs", False)  # without such convolutions, no difference
    keys = _fpn(neck, weights, ["res2", "res3", "res4", "res5"])
    return keys | {"MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone"}


def import_dense_fpn(neck: Settings, weights: Weights) -> Keys:
    """Import the FPN of dense detectors: P3 to P7."""
    neck.only(start_level=1)
    source = neck.choose("add_extra_convs", {"on_input": "res5", True: "res5", "on_output": "p5"})
    keys = _fpn(neck, weights, ["res3", "res4", "res5"])
    norm = keys["MODEL.FPN.NORM"]
    for index, level in enumerate((6, 7), start=3):
        weights.conv(f"neck.fpn_convs.{index}", f"backbone.top_block.p{level}", norm, CONV_MODULE)
    return keys | {
        "MODEL.BACKBONE.NAME": "build_dense_resnet_fpn_backbone",
        "MODEL.DENSE_FPN.P6_SOURCE": source,
        "MODEL.DENSE_FPN.P6_P7_NORM": norm,
        "MODEL.DENSE_FPN.RELU_BEFORE_P7": neck.choose("relu_before_extra_convs", {True: True, False: False}, False),
    }


def _fpn(neck: Settings, weights: Weights, stages: list[str]) -> Keys:
    neck.only(type="FPN", num_outs=5, end_level=-1, upsample_cfg={"mode": "nearest"})
    norm = group_norm(neck)
    if norm:
        neck.only(no_norm_on_lateral=False)
    neck.read("no_norm_on_lateral", False)  # without normalization, no difference
    neck.read("in_channels")  # those of the stages
    for index, stage in enumerate(stages):
        level = stage.removeprefix("res")
        for source, target in {"lateral_convs": "lateral", "fpn_convs": "output"}.items():
            weights.conv(f"neck.{source}.{index}", f"backbone.fpn_{target}{level}", norm, CONV_MODULE)
    return {
        "MODEL.RESNETS.OUT_FEATURES": stages,
        "MODEL.FPN.IN_FEATURES": stages,
        "MODEL.FPN.OUT_CHANNELS": neck.read("out_channels"),
        "MODEL.FPN.NORM": norm,
    }


def group_norm(part: Settings, default: dict[str, Any] | None = None) -> str:
    """Return Detectron2's name of the normalization layers of a neck or head, which must be GN with 32 groups; "" for none."""
    if part.read("norm_cfg", default) is None:
        return ""
    norm = part.node("norm_cfg", default)
    norm.only(type="GN", num_groups=32, eps=1e-5)
    norm.read("requires_grad", True)  # training only
    return "GN"
