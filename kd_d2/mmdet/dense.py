"""RetinaNet, FSAF, GFL, ATSS, FCOS and RepPoints of MMDetection."""

from __future__ import annotations

import functools

from ..imported import Weights, sorted_by_scale
from ..modeling.fsaf import DISTANCE_UNIT
from .backbones import CONV_MODULE, Keys, group_norm, import_dense_fpn
from .boxes import UNIT_STDS, anchor_generator, box_coder, nms_threshold, regression_weights
from .settings import Settings

STRIDES = (8, 16, 32, 64, 128)
GN = {"type": "GN", "num_groups": 32}
TOWERS = {"cls": "cls_subnet", "reg": "bbox_subnet"}
RETINA_HEADS = dict.fromkeys(("RetinaHead", "FreeAnchorRetinaHead", "PISARetinaHead"))
"""Heads that differ only in training."""


def import_retinanet(model: Settings, weights: Weights) -> Keys:
    """Import a RetinaNet.

    Returns:
        Its config keys.
    """
    head = model.node("bbox_head")
    head.choose("type", RETINA_HEADS)
    for name in ("pre_anchor_topk", "bbox_thr", "gamma", "alpha"):
        head.read(name, None)  # training only
    anchors = anchor_generator(head, STRIDES)
    ratios, count = anchors.numbers("ratios"), anchors.count("scales_per_octave")
    scales = [anchors.number("octave_base_scale") * 2 ** (step / count) for step in range(count)]

    reorder = functools.partial(sorted_by_scale, ratios=len(ratios), scales=count)
    keys, norm, convs = _dense(model, head, weights, "RETINANET", norm=None)
    weights.layer("bbox_head.retina_cls", "head.cls_score", reorder)
    weights.layer("bbox_head.retina_reg", "head.bbox_pred", reorder)
    return keys | {
        "MODEL.META_ARCHITECTURE": "RetinaNet",
        "MODEL.ANCHOR_GENERATOR.SIZES": [[scale * stride for scale in scales] for stride in STRIDES],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [ratios],
        "MODEL.RETINANET.NUM_CONVS": convs,
        "MODEL.RETINANET.NORM": norm,
        "MODEL.RETINANET.BBOX_REG_WEIGHTS": regression_weights(box_coder(head)),
    }


def import_gfl(model: Settings, weights: Weights) -> Keys:
    """Import a GFL."""
    head = model.node("bbox_head")
    head.only(type="GFLHead", bbox_coder={"type": "DistancePointBBoxCoder"})
    keys = _single_anchor(model, head, weights, "GFL")
    weights.layer("bbox_head.gfl_cls", "head.cls_score")
    weights.layer("bbox_head.gfl_reg", "head.bbox_pred")
    weights.ignore("bbox_head.integral")  # the constants 0 to reg_max
    return keys | {"MODEL.GFL.REG_MAX": head.read("reg_max", 16)}


def import_atss(model: Settings, weights: Weights) -> Keys:
    """Import an ATSS."""
    head = model.node("bbox_head")
    head.only(type="ATSSHead", pred_kernel_size=3)
    keys = _single_anchor(model, head, weights, "ATSS")
    box_coder(head).choose("target_stds", {(0.1, 0.1, 0.2, 0.2): None}, UNIT_STDS)
    for name, target in {"cls": "cls_score", "reg": "bbox_pred", "centerness": "ctrness"}.items():
        weights.layer(f"bbox_head.atss_{name}", f"head.{target}")
    return keys


def import_fcos(model: Settings, weights: Weights) -> Keys:
    """Import an FCOS."""
    head = model.node("bbox_head")
    head.only(type="FCOSHead", bbox_coder={"type": "DistancePointBBoxCoder"}, cls_predictor_cfg=None)
    head.choose("strides", {STRIDES: None})
    for name in ("regress_ranges", "center_sampling", "center_sample_radius", "conv_bias"):
        head.read(name, None)  # training, and whether there are biases, which the weights show
    keys, norm, convs = _dense(model, head, weights, "FCOS", norm=GN)
    is_deformable = head.choose("dcn_on_last_conv", {True: True, False: False}, False)
    if is_deformable:
        for branch, tower in TOWERS.items():
            offsets = f"bbox_head.{branch}_convs.{convs - 1}.conv.conv_offset"
            weights.layer(offsets, f"head.{tower}.{(3 if norm else 2) * (convs - 1)}.conv_offset")
    weights.scales("bbox_head.scales", "head.scales", len(STRIDES))
    for name, target in {"cls": "cls_score", "reg": "bbox_pred", "centerness": "ctrness"}.items():
        weights.layer(f"bbox_head.conv_{name}", f"head.{target}")
    return keys | {
        "MODEL.META_ARCHITECTURE": "FCOS",
        "MODEL.FCOS.LEVEL_SCALES": True,
        "MODEL.FCOS.BOX_ACTIVATION": head.choose("norm_on_bbox", {True: "relu", False: "exp"}, False),
        "MODEL.FCOS.CENTERNESS_TOWER": head.choose("centerness_on_reg", {True: "box", False: "class"}, False),
        "MODEL.FCOS.DEFORMABLE_TOWERS": is_deformable,
        "MODEL.FCOS.NUM_CONVS": convs,
        "MODEL.FCOS.NORM": norm,
    }


def import_fsaf(model: Settings, weights: Weights) -> Keys:
    """Import an FSAF."""
    head = model.node("bbox_head")
    head.only(type="FSAFHead")
    head.read("score_threshold", None)  # training only
    anchor_generator(head, STRIDES).only(ratios=[1.0], octave_base_scale=1, scales_per_octave=1)
    head.node("bbox_coder").only(type="TBLRBBoxCoder", normalizer=DISTANCE_UNIT, clip_border=True)
    keys, norm, convs = _dense(model, head, weights, "FSAF", norm=None)
    weights.layer("bbox_head.retina_cls", "head.cls_score")
    left_top_right_bottom = [2, 0, 3, 1]  # of top, bottom, left, right
    weights.layer("bbox_head.retina_reg", "head.bbox_pred", lambda parameters: parameters[left_top_right_bottom])
    return keys | {
        "MODEL.META_ARCHITECTURE": "FSAF",
        "MODEL.FSAF.ANCHOR_OFFSET": 0.0,
        "MODEL.FSAF.NUM_CONVS": convs,
        "MODEL.FSAF.NORM": norm,
    }


REPPOINTS_LAYERS = {
    "pts_init_conv": "first_conv",
    "pts_init_out": "first_points",
    "cls_conv": "class_conv",
    "cls_out": "cls_score",
    "pts_refine_conv": "refine_conv",
    "pts_refine_out": "refined_points",
}


def import_reppoints(model: Settings, weights: Weights) -> Keys:
    """Import a RepPoints whose boxes are the moments of points."""
    head = model.node("bbox_head")
    head.only(
        type="RepPointsHead", point_strides=STRIDES, transform_method="moment", use_grid_points=False, center_init=True
    )
    head.only(dcn_on_last_conv=False)
    head.read("moment_mul", 0.01)  # training only
    keys, norm, convs = _dense(model, head, weights, "REPPOINTS", norm=None)
    head.only(point_feat_channels=keys["MODEL.FPN.OUT_CHANNELS"])
    for name, target in REPPOINTS_LAYERS.items():
        weights.layer(f"bbox_head.reppoints_{name}", f"head.{target}")
    weights.parameter("bbox_head.moment_transfer", "head.moment_transfer")
    return keys | {
        "MODEL.META_ARCHITECTURE": "RepPoints",
        "MODEL.REPPOINTS.ANCHOR_OFFSET": 0.0,
        "MODEL.REPPOINTS.NUM_POINTS": head.count("num_points", 9),
        "MODEL.REPPOINTS.BASE_SCALE": head.number("point_base_scale", 4),
        "MODEL.REPPOINTS.GRADIENT_SHARE": head.number("gradient_mul", 0.1),
        "MODEL.REPPOINTS.NUM_CONVS": convs,
        "MODEL.REPPOINTS.NORM": norm,
    }


def _single_anchor(model: Settings, head: Settings, weights: Weights, name: str) -> Keys:
    anchors = anchor_generator(head, STRIDES)
    anchors.only(ratios=[1.0], scales_per_octave=1)
    keys, norm, convs = _dense(model, head, weights, name, norm=GN)
    weights.scales("bbox_head.scales", "head.scales", len(STRIDES))
    return keys | {
        "MODEL.META_ARCHITECTURE": name,
        f"MODEL.{name}.ANCHOR_SCALE": anchors.number("octave_base_scale"),
        f"MODEL.{name}.ANCHOR_OFFSET": 0.0,
        f"MODEL.{name}.NUM_CONVS": convs,
        f"MODEL.{name}.NORM": norm,
    }


def _dense(model: Settings, head: Settings, weights: Weights, name: str, norm: dict | None) -> tuple[Keys, str, int]:
    """Import what dense detectors have in common.

    Returns:
        Config keys, the normalization of the head's towers, and the number of their convolutions.
    """
    keys = import_dense_fpn(model, weights)
    channels = keys["MODEL.FPN.OUT_CHANNELS"]
    head.only(in_channels=channels, feat_channels=channels, conv_cfg=None)
    head.read("reg_decoded_bbox", False)  # training only
    normalization = group_norm(head, norm)
    convs = head.count("stacked_convs", 4)
    for branch, tower in TOWERS.items():
        weights.tower(f"bbox_head.{branch}_convs", f"head.{tower}", convs, normalization, CONV_MODULE)
    test = model.node("test_cfg")
    test.only(min_bbox_size=0)
    keys |= {
        f"MODEL.{name}.NUM_CLASSES": head.count("num_classes"),
        f"MODEL.{name}.SCORE_THRESH_TEST": test.number("score_thr"),
        f"MODEL.{name}.TOPK_CANDIDATES_TEST": test.count("nms_pre"),
        f"MODEL.{name}.NMS_THRESH_TEST": nms_threshold(test),
        "TEST.DETECTIONS_PER_IMAGE": test.count("max_per_img"),
    }
    return keys, normalization, convs
