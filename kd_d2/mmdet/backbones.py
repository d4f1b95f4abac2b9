"""ResNets, Swin Transformers and FPNs of MMDetection."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..checkpoint import StateDict
from ..checkpoint.torchvision import rename_torchvision_resnet
from ..imported import Weights
from .settings import Settings

Keys = dict[str, Any]

STAGES = ("res2", "res3", "res4", "res5")
BASIC = (18, 34)
"""Depths of ResNets with basic blocks."""
CONV_MODULE = ("conv", "gn")
"""Names of convolution and normalization in MMDetection's ConvModule."""


@dataclass(frozen=True)
class BottomUp:
    """A network without neck.

    Attributes:
        name: name in the names of Detectron2's builders.
        stages: Detectron2's names of the outputs.
        keys: its config keys.
    """

    name: str
    stages: list[str]
    keys: Keys


def import_bottom_up(backbone: Settings, weights: Weights) -> BottomUp:
    """Import a ResNet, ResNeXt or Swin Transformer."""
    importers = {"ResNet": _import_resnet, "ResNeXt": _import_resnet, "SwinTransformer": _import_swin}
    return backbone.choose("type", importers)(backbone, weights)


def _import_resnet(backbone: Settings, weights: Weights) -> BottomUp:
    is_grouped = backbone.kind() == "ResNeXt"
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
    weights.module("backbone", "backbone.bottom_up", rename_torchvision_resnet)
    keys = deformable | {
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.NUM_GROUPS": groups,
        "MODEL.RESNETS.WIDTH_PER_GROUP": width,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": backbone.read("stem_channels", None) or channels,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": channels if depth in BASIC else 4 * channels,
        "MODEL.RESNETS.STRIDE_IN_1X1": backbone.choose("style", {"pytorch": False, "caffe": True}, "pytorch"),
        "MODEL.RESNETS.NORM": "FrozenBN",
        "MODEL.BACKBONE.FREEZE_AT": backbone.read("frozen_stages", -1) + 1,
    }
    return BottomUp("resnet", list(STAGES), keys)


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


SWIN_RULES = {
    r"^patch_embed\.projection\.": "patch_embed.proj.",
    r"^stages\.": "layers.",
    r"\.attn\.w_msa\.": ".attn.",
    r"\.ffn\.layers\.0\.0\.": ".mlp.fc1.",
    r"\.ffn\.layers\.1\.": ".mlp.fc2.",
}


def _import_swin(backbone: Settings, weights: Weights) -> BottomUp:
    backbone.only(
        in_channels=3,
        patch_size=4,
        strides=(4, 2, 2, 2),
        qkv_bias=True,
        qk_scale=None,
        patch_norm=True,
        use_abs_pos_embed=False,
        act_cfg={"type": "GELU"},
        norm_cfg={"type": "LN"},
    )
    for name in ("drop_rate", "attn_drop_rate", "convert_weights", "pretrain_img_size"):
        backbone.read(name, None)  # training, and the weights that it started with
    outputs = backbone.choose("out_indices", {(0, 1, 2, 3): STAGES, (1, 2, 3): STAGES[1:]}, (0, 1, 2, 3))
    weights.module("backbone", "backbone.bottom_up", _rename_swin)
    keys = {
        "MODEL.SWIN.EMBED_DIM": backbone.count("embed_dims", 96),
        "MODEL.SWIN.DEPTHS": tuple(map(int, backbone.numbers("depths", (2, 2, 6, 2)))),
        "MODEL.SWIN.NUM_HEADS": tuple(map(int, backbone.numbers("num_heads", (3, 6, 12, 24)))),
        "MODEL.SWIN.WINDOW_SIZE": backbone.count("window_size", 7),
        "MODEL.SWIN.MLP_RATIO": backbone.number("mlp_ratio", 4),
        "MODEL.SWIN.DROP_PATH_RATE": backbone.number("drop_path_rate", 0.1),
        "MODEL.BACKBONE.FREEZE_AT": backbone.read("frozen_stages", -1) + 1,
    }
    return BottomUp("swin", list(outputs), keys)


def _rename_swin(weights: StateDict, prefix: str) -> StateDict:
    renamed = {}
    for name, tensor in weights.items():
        if ".downsample." in name:
            tensor = _in_order_of_detectron2(tensor)
        for pattern, replacement in SWIN_RULES.items():
            name = re.sub(pattern, replacement, name)
        renamed[prefix + name] = tensor
    return renamed


def _in_order_of_detectron2(merged: Tensor) -> Tensor:
    """Reorder the inputs (..., 4 * C) of four neighboring positions from (channel, y, x) to (x, y, channel)."""
    return merged.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)


def import_rcnn_fpn(model: Settings, weights: Weights) -> Keys:
    """Import backbone and FPN of R-CNNs: P2 to P6, the last one by pooling.

    Returns:
        Their config keys.
    """
    bottom_up, neck = import_bottom_up(model.node("backbone"), weights), model.node("neck")
    neck.only(add_extra_convs=False)
    neck.read("relu_before_extra_convs", False)  # without such convolutions, no difference
    keys = _fpn(bottom_up, neck, weights, list(STAGES))
    return keys | {"MODEL.BACKBONE.NAME": f"build_{bottom_up.name}_fpn_backbone"}


def import_dense_fpn(model: Settings, weights: Weights) -> Keys:
    """Import backbone and FPN of dense detectors: P3 to P7.

    Returns:
        Their config keys.
    """
    bottom_up, neck = import_bottom_up(model.node("backbone"), weights), model.node("neck")
    source = neck.choose("add_extra_convs", {"on_input": "res5", True: "res5", "on_output": "p5"})
    keys = _fpn(bottom_up, neck, weights, list(STAGES[1:]))
    norm = keys["MODEL.FPN.NORM"]
    for index, level in enumerate((6, 7), start=3):
        weights.conv(f"neck.fpn_convs.{index}", f"backbone.top_block.p{level}", norm, CONV_MODULE)
    return keys | {
        "MODEL.BACKBONE.NAME": f"build_dense_{bottom_up.name}_fpn_backbone",
        "MODEL.DENSE_FPN.P6_SOURCE": source,
        "MODEL.DENSE_FPN.P6_P7_NORM": norm,
        "MODEL.DENSE_FPN.RELU_BEFORE_P7": neck.choose("relu_before_extra_convs", {True: True, False: False}, False),
    }


def _fpn(bottom_up: BottomUp, neck: Settings, weights: Weights, stages: list[str]) -> Keys:
    neck.choose("start_level", {len(bottom_up.stages) - len(stages): None}, 0)
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
    return bottom_up.keys | {
        "MODEL.RESNETS.OUT_FEATURES": bottom_up.stages,
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
