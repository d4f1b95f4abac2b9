"""Config keys and weights of torchvision's Faster, Mask and Keypoint R-CNN, RetinaNet and FCOS in Detectron2.

Sizes of layers are read from the weights. What the weights do not show, such as anchors and thresholds, is as in
torchvision's functions, such as `torchvision.models.detection.fasterrcnn_resnet50_fpn`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..checkpoint.torchvision import TORCHVISION_INPUT, rename_torchvision_resnet
from ..errors import UserError
from ..imported import Weights, sorted_by_scale

Keys = dict[str, Any]
Choice = Callable[[int], list[int]]
"""Number of outputs for classes -> the outputs of the classes to keep."""

DEPTHS = {
    (2, 2, 2, 2): {False: 18},
    (3, 4, 6, 3): {False: 34, True: 50},
    (3, 4, 23, 3): {True: 101},
    (3, 8, 36, 3): {True: 152},
}
"""Depth of a ResNet by its blocks, and whether they are bottlenecks."""
SEQUENCE = ("0", "1")
"""Names of convolution and normalization in torchvision's Conv2dNormActivation."""
RATIOS = [0.5, 1.0, 2.0]
RETINANET_SIZES = [[size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))] for size in (32, 64, 128, 256, 512)]
COMMON: Keys = {
    "MODEL.ANCHOR_GENERATOR.NAME": "TorchvisionAnchorGenerator",
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [RATIOS],
    "INPUT.MIN_SIZE_TEST": 800,
    "INPUT.MAX_SIZE_TEST": 1333,
    **TORCHVISION_INPUT,
}


def import_retinanet(weights: Weights, keep: Choice) -> Keys:
    """Import a RetinaNet."""
    keys = _dense(weights, "RETINANET")
    anchors = len(RATIOS) * len(RETINANET_SIZES[0])
    outputs = _number_of_classes(weights["head.classification_head.cls_logits.weight"], anchors)
    kept = keep(outputs)
    reorder = functools.partial(sorted_by_scale, ratios=len(RATIOS), scales=len(RETINANET_SIZES[0]))
    weights.layer(
        "head.classification_head.cls_logits",
        "head.cls_score",
        lambda parameters: reorder(parameters.unflatten(0, (anchors, -1))[:, kept].flatten(0, 1)),
    )
    weights.layer("head.regression_head.bbox_reg", "head.bbox_pred", reorder)
    return (
        keys
        | COMMON
        | {
            "MODEL.META_ARCHITECTURE": "RetinaNet",
            "MODEL.ANCHOR_GENERATOR.SIZES": RETINANET_SIZES,
            "MODEL.RETINANET.NUM_CLASSES": len(kept),
            "MODEL.RETINANET.SCORE_THRESH_TEST": 0.05,
            "MODEL.RETINANET.TOPK_CANDIDATES_TEST": 1000,
            "MODEL.RETINANET.NMS_THRESH_TEST": 0.5,
            "TEST.DETECTIONS_PER_IMAGE": 300,
        }
    )


def import_fcos(weights: Weights, keep: Choice) -> Keys:
    """Import an FCOS."""
    keys = _dense(weights, "FCOS")
    kept = keep(len(weights["head.classification_head.cls_logits.weight"]))
    weights.layer("head.classification_head.cls_logits", "head.cls_score", lambda parameters: parameters[kept])
    for name, target in {"reg": "bbox_pred", "ctrness": "ctrness"}.items():
        weights.layer(f"head.regression_head.bbox_{name}", f"head.{target}")
    return (
        keys
        | COMMON
        | {
            "MODEL.META_ARCHITECTURE": "FCOS",
            "MODEL.FCOS.NUM_CLASSES": len(kept),
            "MODEL.FCOS.ANCHOR_OFFSET": 0.0,
            "MODEL.FCOS.SCORE_THRESH_TEST": 0.2,
            "MODEL.FCOS.TOPK_CANDIDATES_TEST": 1000,
            "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
            "TEST.DETECTIONS_PER_IMAGE": 100,
        }
    )


def import_rcnn(weights: Weights, keep: Choice) -> Keys:
    """Import a Faster, Mask or Keypoint R-CNN."""
    keys = _resnet(weights) | _fpn(weights, [2, 3, 4, 5]) | _rpn(weights) | _box_head(weights)
    outputs = len(weights["roi_heads.box_predictor.cls_score.weight"])
    kept = keep(outputs)
    background_last = [*kept, 0]
    weights.layer(
        "roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.cls_score", lambda p: p[background_last]
    )
    weights.layer(
        "roi_heads.box_predictor.bbox_pred",
        "roi_heads.box_predictor.bbox_pred",
        lambda p: p.unflatten(0, (outputs, 4))[kept].flatten(0, 1),
    )
    keys |= _pooler("BOX", 7) | {
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.ROI_HEADS.NUM_CLASSES": len(kept),
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.05,
        "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.5,
        "TEST.DETECTIONS_PER_IMAGE": 100,
    }
    if "roi_heads.mask_predictor.mask_fcn_logits.weight" in weights:
        keys |= _mask_head(weights, kept)
    if "roi_heads.keypoint_predictor.kps_score_lowres.weight" in weights:
        keys |= _keypoint_head(weights)
    return keys | COMMON


def _resnet(weights: Weights) -> Keys:
    body = "backbone.body"
    if f"{body}.layer1.0.conv1.weight" not in weights:
        raise UserError("The torchvision checkpoint has another backbone than a ResNet, which cannot be imported.")
    blocks = tuple(weights.count(f"{body}.layer{stage}.{{}}.conv1.weight") for stage in (1, 2, 3, 4))
    bottleneck = f"{body}.layer1.0.conv3.weight" in weights
    depth = DEPTHS.get(blocks, {}).get(bottleneck)
    if depth is None:
        raise UserError(f"The torchvision checkpoint has a ResNet of {blocks} blocks, which Detectron2 does not have.")
    width, per_group = weights[f"{body}.layer1.0.conv2.weight"].shape[:2]
    stem = len(weights[f"{body}.conv1.weight"])
    out = len(weights[f"{body}.layer1.0.conv{3 if bottleneck else 2}.weight"])
    weights.module(body, "backbone.bottom_up", rename_torchvision_resnet)
    return {
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.NUM_GROUPS": width // per_group,
        "MODEL.RESNETS.WIDTH_PER_GROUP": per_group,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": stem,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": out,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.RESNETS.NORM": "FrozenBN",
    }


def _fpn(weights: Weights, levels: list[int]) -> Keys:
    norm = "BN" if "backbone.fpn.inner_blocks.0.1.weight" in weights else ""
    if (count := weights.count("backbone.fpn.inner_blocks.{}.0.weight")) != len(levels):
        raise UserError(f"The torchvision checkpoint has an FPN of {count} levels; {len(levels)} are needed.")
    channels = len(weights["backbone.fpn.inner_blocks.0.0.weight"])
    for index, level in enumerate(levels):
        for source, target in {"inner": "lateral", "layer": "output"}.items():
            weights.conv(f"backbone.fpn.{source}_blocks.{index}", f"backbone.fpn_{target}{level}", norm, SEQUENCE)
    stages = [f"res{level}" for level in levels]
    return {
        "MODEL.RESNETS.OUT_FEATURES": stages,
        "MODEL.FPN.IN_FEATURES": stages,
        "MODEL.FPN.OUT_CHANNELS": channels,
        "MODEL.FPN.NORM": norm,
    }


def _dense(weights: Weights, name: str) -> Keys:
    """Import backbone and towers of a dense detector."""
    norm = "GN" if "head.classification_head.conv.0.1.weight" in weights else ""
    convs = weights.count("head.classification_head.conv.{}.0.weight")
    for branch, subnet in {"classification": "cls_subnet", "regression": "bbox_subnet"}.items():
        weights.tower(f"head.{branch}_head.conv", f"head.{subnet}", convs, norm, SEQUENCE)
    keys = _resnet(weights) | _dense_fpn(weights)
    return keys | {f"MODEL.{name}.NUM_CONVS": convs, f"MODEL.{name}.NORM": norm}


def _dense_fpn(weights: Weights) -> Keys:
    keys = _fpn(weights, [3, 4, 5])
    is_p5 = weights["backbone.fpn.extra_blocks.p6.weight"].shape[1] == keys["MODEL.FPN.OUT_CHANNELS"]
    for level in ("p6", "p7"):
        weights.layer(f"backbone.fpn.extra_blocks.{level}", f"backbone.top_block.{level}")
    if is_p5:
        return keys | {"MODEL.BACKBONE.NAME": "build_dense_resnet_fpn_backbone", "MODEL.DENSE_FPN.P6_SOURCE": "p5"}
    return keys | {"MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone"}


def _rpn(weights: Weights) -> Keys:
    convs = weights.count("rpn.head.conv.{}.0.weight")
    if len(weights["rpn.head.cls_logits.weight"]) != len(RATIOS):
        raise UserError(
            f"The torchvision checkpoint has an RPN of {len(weights['rpn.head.cls_logits.weight'])} anchors per cell, not torchvision's {len(RATIOS)}."
        )
    for index in range(convs):
        target = "conv" if convs == 1 else f"conv.conv{index}"
        weights.conv(f"rpn.head.conv.{index}", f"proposal_generator.rpn_head.{target}", "", SEQUENCE)
    weights.layer("rpn.head.cls_logits", "proposal_generator.rpn_head.objectness_logits")
    weights.layer("rpn.head.bbox_pred", "proposal_generator.rpn_head.anchor_deltas")
    return {
        "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.RPN.CONV_DIMS": [-1] * convs,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
        "MODEL.RPN.NMS_THRESH": 0.7,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    }


def _box_head(weights: Weights) -> Keys:
    """Import the box head: two linear layers, or, in the second version, convolutions and one linear layer."""
    head = "roi_heads.box_head"
    keys: Keys = {
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),
    }
    if f"{head}.fc6.weight" in weights:
        dimension = len(weights[f"{head}.fc6.weight"])
        for source, target in {"fc6": "fc1", "fc7": "fc2"}.items():
            weights.layer(f"{head}.{source}", f"{head}.{target}")
        return keys | {"MODEL.ROI_BOX_HEAD.NUM_FC": 2, "MODEL.ROI_BOX_HEAD.FC_DIM": dimension}
    convs = weights.count(f"{head}.{{}}.0.weight")
    linear = f"{head}.{convs + 1}"  # after a layer that flattens
    channels, dimension = len(weights[f"{head}.0.0.weight"]), len(weights[f"{linear}.weight"])
    norm = "BN" if f"{head}.0.1.weight" in weights else ""
    for index in range(convs):
        weights.conv(f"{head}.{index}", f"{head}.conv{index + 1}", norm, SEQUENCE)
    weights.layer(linear, f"{head}.fc1")
    return keys | {
        "MODEL.ROI_BOX_HEAD.NUM_CONV": convs,
        "MODEL.ROI_BOX_HEAD.CONV_DIM": channels,
        "MODEL.ROI_BOX_HEAD.NORM": norm,
        "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
        "MODEL.ROI_BOX_HEAD.FC_DIM": dimension,
    }


def _mask_head(weights: Weights, kept: list[int]) -> Keys:
    head = "roi_heads.mask_head"
    convs = weights.count(f"{head}.{{}}.0.weight")
    channels = len(weights[f"{head}.0.0.weight"])
    norm = "BN" if f"{head}.0.1.weight" in weights else ""
    for index in range(convs):
        weights.conv(f"{head}.{index}", f"{head}.mask_fcn{index + 1}", norm, SEQUENCE)
    weights.layer("roi_heads.mask_predictor.conv5_mask", f"{head}.deconv")
    weights.layer("roi_heads.mask_predictor.mask_fcn_logits", f"{head}.predictor", lambda p: p[kept])
    return _pooler("MASK", 14) | {
        "MODEL.MASK_ON": True,
        "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
        "MODEL.ROI_MASK_HEAD.NUM_CONV": convs,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": channels,
        "MODEL.ROI_MASK_HEAD.NORM": norm,
    }


def _keypoint_head(weights: Weights) -> Keys:
    head = "roi_heads.keypoint_head"
    scores = "roi_heads.keypoint_predictor.kps_score_lowres"
    keypoints = weights[f"{scores}.weight"].shape[1]
    channels = []
    for index in itertools.takewhile(lambda index: f"{head}.{index}.weight" in weights, itertools.count(0, 2)):
        channels.append(len(weights[f"{head}.{index}.weight"]))
        weights.layer(f"{head}.{index}", f"{head}.conv_fcn{len(channels)}")
    weights.layer(scores, f"{head}.score_lowres")
    return _pooler("KEYPOINT", 14) | {
        "MODEL.KEYPOINT_ON": True,
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": keypoints,
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": channels,
    }


def _pooler(node: str, resolution: int) -> Keys:
    return {
        f"MODEL.ROI_{node}_HEAD.POOLER_TYPE": "ROIAlign",
        f"MODEL.ROI_{node}_HEAD.POOLER_RESOLUTION": resolution,
        f"MODEL.ROI_{node}_HEAD.POOLER_SAMPLING_RATIO": 2,
    }


def _number_of_classes(logits: Tensor, anchors: int) -> int:
    if len(logits) % anchors:
        raise UserError(
            f"The torchvision checkpoint has {len(logits)} outputs of classes, not a multiple of torchvision's {anchors} anchors."
        )
    return len(logits) // anchors
