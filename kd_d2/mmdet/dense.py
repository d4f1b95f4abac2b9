"""RetinaNet, GFL and ATSS of MMDetection."""

from __future__ import annotations

import functools

from ..imported import Weights, sorted_by_scale
from .backbones import Keys, import_dense_fpn, import_resnet
from .boxes import anchor_generator, box_coder, nms_threshold, regression_weights
from .settings import Settings

STRIDES = (8, 16, 32, 64, 128)
GN = {"type": "GN", "num_groups": 32}


def import_retinanet(model: Settings, weights: Weights) -> Keys:
    """Import a RetinaNet.

    Returns:
        Its config keys.
    """
    head = model.node("bbox_head")
    head.only(type="RetinaHead")
    anchors = anchor_generator(head, STRIDES)
    ratios, count = anchors.numbers("ratios"), anchors.count("scales_per_octave")
    scales = [anchors.number("octave_base_scale") * 2 ** (step / count) for step in range(count)]

    reorder = functools.partial(sorted_by_scale, ratios=len(ratios), scales=count)
    keys, norm, convs = _dense(model, head, weights, "RETINANET", norm=None)
    weights.layer("bbox_head.retina_cls", "head.cls_score", reorder)
    weights.layer("bbox_head.retina_reg", "head.bbox_pred", reorder)
    stds = box_coder(head).numbers("target_stds", (1.0, 1.0, 1.0, 1.0))
    return keys | {
        "MODEL.META_ARCHITECTURE": "RetinaNet",
        "MODEL.ANCHOR_GENERATOR.SIZES": [[scale * stride for scale in scales] for stride in STRIDES],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [ratios],
        "MODEL.RETINANET.NUM_CONVS": convs,
        "MODEL.RETINANET.NORM": norm,
        "MODEL.RETINANET.BBOX_REG_WEIGHTS": regression_weights(stds),
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
    box_coder(head).choose("target_stds", {(0.1, 0.1, 0.2, 0.2): None}, (1.0, 1.0, 1.0, 1.0))
    for name, target in {"cls": "cls_score", "reg": "bbox_pred", "centerness": "ctrness"}.items():
        weights.layer(f"bbox_head.atss_{name}", f"head.{target}")
    return keys


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
    neck = model.node("neck")
    keys = import_resnet(model.node("backbone"), weights) | import_dense_fpn(neck, weights)
    channels = neck.read("out_channels")
    head.only(in_channels=channels, feat_channels=channels, conv_cfg=None, dcn_on_last_conv=False)
    head.read("reg_decoded_bbox", False)  # training only
    normalization = _norm(head, norm)
    convs = head.count("stacked_convs", 4)
    for branch in ("cls", "reg"):
        detectron2 = "cls_subnet" if branch == "cls" else "bbox_subnet"
        weights.tower(f"bbox_head.{branch}_convs", f"head.{detectron2}", convs, normalization)
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


def _norm(head: Settings, default: dict | None) -> str:
    """Return the normalization of a head's convolutions."""
    if head.read("norm_cfg", default) is None:
        return ""
    norm = head.node("norm_cfg", default)
    norm.only(type="GN", num_groups=32, eps=1e-5)
    norm.read("requires_grad", True)  # training only
    return "GN"
