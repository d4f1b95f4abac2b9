"""Faster, Mask and Cascade R-CNN of MMDetection."""

from __future__ import annotations

import functools
import logging

from ..imported import Weights, sorted_by_scale
from .backbones import Keys, import_rcnn_fpn
from .boxes import anchor_generator, box_coder, nms_threshold, regression_weights
from .settings import Settings

logger = logging.getLogger(__name__)

STRIDES = (4, 8, 16, 32, 64)
CASCADE_STAGES = 3
STANDARD_HEADS = dict.fromkeys(("StandardRoIHead", "DynamicRoIHead", "PISARoIHead"))
"""Heads that differ only in training."""


def import_rcnn(model: Settings, weights: Weights) -> Keys:
    """Import a Faster or Mask R-CNN.

    Returns:
        Its config keys.
    """
    roi_head = model.node("roi_head")
    roi_head.choose("type", STANDARD_HEADS)
    box_head = roi_head.node("bbox_head")
    regression, keys = _box_head(
        box_head, weights, "roi_head.bbox_head", "roi_heads.box_head", "roi_heads.box_predictor"
    )
    keys |= {"MODEL.ROI_HEADS.NAME": "StandardROIHeads", "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": regression}
    keys |= _common(model, weights) | _pooler(roi_head, "bbox", "BOX")
    return keys | _mask_head(roi_head, weights) if roi_head.read("mask_head", None) else keys


def import_cascade_rcnn(model: Settings, weights: Weights) -> Keys:
    """Import a Cascade R-CNN, without masks: MMDetection's has a mask head for each stage, Detectron2's only one."""
    roi_head = model.node("roi_head")
    roi_head.only(type="CascadeRoIHead", num_stages=CASCADE_STAGES)
    roi_head.read("stage_loss_weights", None)  # training only
    keys, regression = {}, []
    for stage, box_head in enumerate(roi_head.nodes("bbox_head", CASCADE_STAGES)):
        of_this_stage, keys = _box_head(
            box_head,
            weights,
            f"roi_head.bbox_head.{stage}",
            f"roi_heads.box_head.{stage}",
            f"roi_heads.box_predictor.{stage}",
        )
        regression.append(of_this_stage)
    keys |= {
        "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
        "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": tuple(regression),
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": regression[0],
    }
    roi_head.read("mask_roi_extractor", None)
    if roi_head.read("mask_head", None):
        logger.warning(
            "The masks are left out: MMDetection's Cascade R-CNN has a mask head for each stage, Detectron2's only one."
        )
    weights.ignore("roi_head.mask_head")
    return _common(model, weights) | _pooler(roi_head, "bbox", "BOX") | keys


def _common(model: Settings, weights: Weights) -> Keys:
    """Import backbone, RPN and test settings."""
    keys = import_rcnn_fpn(model, weights)
    test = model.node("test_cfg")
    rpn, rcnn = test.node("rpn"), test.node("rcnn")
    for settings in (rpn, rcnn):
        settings.only(min_bbox_size=0)
    rpn.only(nms_across_levels=False)
    rcnn.only(mask_thr_binary=0.5)
    # Names of early versions of MMDetection 2, in which max_num takes precedence:
    post_nms = rpn.read("nms_post", None)
    post_nms = rpn.read("max_num", post_nms)
    nms = {"type": "nms", "iou_threshold": rpn.read("nms_thr", None)}
    return (
        keys
        | _rpn(model.node("rpn_head"), weights, keys["MODEL.FPN.OUT_CHANNELS"])
        | {
            "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
            "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
            "MODEL.RPN.PRE_NMS_TOPK_TEST": rpn.count("nms_pre"),
            "MODEL.RPN.POST_NMS_TOPK_TEST": rpn.count("max_per_img", post_nms),
            "MODEL.RPN.NMS_THRESH": nms_threshold(rpn, nms),
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST": rcnn.number("score_thr"),
            "MODEL.ROI_HEADS.NMS_THRESH_TEST": nms_threshold(rcnn),
            "TEST.DETECTIONS_PER_IMAGE": rcnn.read("max_per_img"),
        }
    )


def _rpn(head: Settings, weights: Weights, channels: int) -> Keys:
    head.only(type="RPNHead", in_channels=channels, feat_channels=channels, num_convs=1)
    anchors = anchor_generator(head, STRIDES)
    scales, ratios = anchors.numbers("scales"), anchors.numbers("ratios")
    reorder = functools.partial(sorted_by_scale, ratios=len(ratios), scales=len(scales))
    weights.layer("rpn_head.rpn_conv", "proposal_generator.rpn_head.conv")
    weights.layer("rpn_head.rpn_cls", "proposal_generator.rpn_head.objectness_logits", reorder)
    weights.layer("rpn_head.rpn_reg", "proposal_generator.rpn_head.anchor_deltas", reorder)
    return {
        "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.RPN.BBOX_REG_WEIGHTS": regression_weights(box_coder(head)),
        "MODEL.ANCHOR_GENERATOR.SIZES": [[scale * stride for scale in scales] for stride in STRIDES],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [ratios],
    }


def _mask_head(roi_head: Settings, weights: Weights) -> Keys:
    head = roi_head.node("mask_head")
    head.only(type="FCNMaskHead", conv_kernel_size=3, class_agnostic=False)
    head.only(upsample_cfg={"type": "deconv", "scale_factor": 2})
    convs, channels = head.count("num_convs", 4), head.count("conv_out_channels", 256)
    for name in ("in_channels", "roi_feat_size", "num_classes"):
        head.read(name, None)  # those of neck, pooler and box head
    for index in range(convs):
        weights.layer(f"roi_head.mask_head.convs.{index}.conv", f"roi_heads.mask_head.mask_fcn{index + 1}")
    weights.layer("roi_head.mask_head.upsample", "roi_heads.mask_head.deconv")
    weights.layer("roi_head.mask_head.conv_logits", "roi_heads.mask_head.predictor")
    return {
        "MODEL.MASK_ON": True,
        "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
        "MODEL.ROI_MASK_HEAD.NUM_CONV": convs,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": channels,
        **_pooler(roi_head, "mask", "MASK"),
    }


def _box_head(
    head: Settings, weights: Weights, source: str, target: str, predictor: str
) -> tuple[tuple[float, ...], Keys]:
    """Import a box head of two fully connected layers.

    Returns:
        The weights of the box deltas, and the other config keys.
    """
    head.only(type="Shared2FCBBoxHead", with_avg_pool=False)
    head.read("reg_decoded_bbox", False)  # training only
    head.read("in_channels", None), head.read("roi_feat_size", None)  # those of neck and pooler
    for layer, name in {"shared_fcs.0": "fc1", "shared_fcs.1": "fc2"}.items():
        weights.layer(f"{source}.{layer}", f"{target}.{name}")
    weights.layer(f"{source}.fc_cls", f"{predictor}.cls_score")
    weights.layer(f"{source}.fc_reg", f"{predictor}.bbox_pred")
    return regression_weights(box_coder(head, (0.1, 0.1, 0.2, 0.2))), {
        "MODEL.ROI_HEADS.NUM_CLASSES": head.count("num_classes"),
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
        "MODEL.ROI_BOX_HEAD.FC_DIM": head.read("fc_out_channels", 1024),
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": head.choose(
            "reg_class_agnostic", {True: True, False: False}, False
        ),
    }


def _pooler(roi_head: Settings, name: str, node: str) -> Keys:
    extractor = roi_head.node(f"{name}_roi_extractor")
    extractor.only(type="SingleRoIExtractor", featmap_strides=STRIDES[:4], finest_scale=56)
    extractor.read("out_channels")  # those of the neck
    layer = extractor.node("roi_layer")
    layer.only(type="RoIAlign", aligned=True, pool_mode="avg")
    layer.read("use_torchvision", False)  # no difference
    # The second names are those of early versions of MMDetection 2.
    return {
        f"MODEL.ROI_{node}_HEAD.POOLER_RESOLUTION": layer.count("output_size", layer.read("out_size", None)),
        f"MODEL.ROI_{node}_HEAD.POOLER_SAMPLING_RATIO": layer.read("sampling_ratio", layer.read("sample_num", 0)),
        f"MODEL.ROI_{node}_HEAD.POOLER_TYPE": "ROIAlignV2",
    }
