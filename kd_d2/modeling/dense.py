"""Common parts of dense detectors: config keys, construction from a config, and a base with one anchor per position."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, batched_nms
from detectron2.modeling import Backbone, build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn

from ..errors import UserError
from ..keys import Above, AtLeast, Below, Keys
from .assignment import Positives, assign_adaptively

GROUPS = 32
"""Number of groups of Detectron2's normalization layer GN."""
FocalAlpha = Annotated[float, "Weight alpha of positives in the focal loss; negatives have weight 1 - alpha."]
FocalGamma = Annotated[float, "Exponent gamma of the focal loss."]


@dataclass(frozen=True)
class DenseKeys(Keys):
    """Config keys of every dense detector, with defaults from the papers."""

    num_classes: Annotated[int, AtLeast(1), "Number of foreground classes."] = 80
    in_features: Annotated[list, "Names of the FPN levels that the head uses, from fine to coarse."] = field(
        default_factory=lambda: ["p3", "p4", "p5", "p6", "p7"]
    )
    num_convs: Annotated[int, AtLeast(1), "Number of convolutions in each of the head's two towers."] = 4
    norm: Annotated[str | None, "Normalization layers of the head's towers; '' for none."] = "GN"
    prior_prob: Annotated[float, Above(0), Below(1), "Initial probability of every class."] = 0.01
    score_thresh_test: Annotated[float, "Score threshold of detections."] = 0.05
    topk_candidates_test: Annotated[int, AtLeast(1), "Maximum number of boxes per level that enter the NMS."] = 1000
    nms_thresh_test: Annotated[float, "IoU threshold of the NMS."] = 0.6
    anchor_offset: Annotated[
        float,
        AtLeast(0),
        Below(1),
        "Offset of the first anchor's center from the image's corner, in strides; 0 in torchvision, and in most detectors of MMDetection.",
    ] = 0.5


@dataclass(frozen=True)
class AdaptiveKeys(DenseKeys):
    """Common config keys of detectors with adaptive label assignment."""

    topk: Annotated[int, AtLeast(1), "Number of candidates per level for an instance."] = 9
    anchor_scale: Annotated[float, Above(0), "Side of the anchor at each position, in strides."] = 8.0


def dense_arguments(cfg: CfgNode, name: str, kind: type[DenseKeys]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of a dense detector, from its config node MODEL.<name>, and those of its head.

    Keys that are not in `DenseKeys` become arguments of the same names.
    """
    keys = kind.read(cfg.MODEL[name], f"MODEL.{name}")
    shared = {key.name for key in fields(DenseKeys)}
    backbone = build_backbone(cfg)
    shapes = backbone.output_shape()
    unknown = [level for level in keys.in_features if level not in shapes]
    if unknown or not keys.in_features:
        raise UserError(f"MODEL.{name}.IN_FEATURES is {keys.in_features}; the backbone has {', '.join(shapes)}.")
    ordered = sorted(keys.in_features, key=lambda level: shapes[level].stride)
    if list(keys.in_features) != ordered:
        raise UserError(f"MODEL.{name}.IN_FEATURES is {keys.in_features}; order it from fine to coarse: {ordered}.")
    input_shape = [shapes[level] for level in keys.in_features]
    channels = input_shape[0].channels
    if keys.norm == "GN" and channels % GROUPS:
        raise UserError(
            f"MODEL.{name}.NORM is 'GN', which has {GROUPS} groups, but the neck has {channels} channels (MODEL.FPN.OUT_CHANNELS): "
            f"choose a multiple of {GROUPS}, or another NORM."
        )
    detector = {
        "backbone": backbone,
        "head_in_features": keys.in_features,
        "num_classes": keys.num_classes,
        "test_score_thresh": keys.score_thresh_test,
        "test_topk_candidates": keys.topk_candidates_test,
        "test_nms_thresh": keys.nms_thresh_test,
        "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
        "input_format": cfg.INPUT.FORMAT,
        "anchor_offset": keys.anchor_offset,
        **{key.name: getattr(keys, key.name) for key in fields(keys) if key.name not in shared},
    }
    head = {
        "input_shape": input_shape,
        "num_classes": keys.num_classes,
        "conv_dims": [channels] * keys.num_convs,
        "norm": keys.norm,
        "prior_prob": keys.prior_prob,
    }
    return detector, head


def adaptive_arguments(cfg: CfgNode, name: str, kind: type[AdaptiveKeys]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of an `AdaptiveDetector`, from its config node MODEL.<name>, and those of its head."""
    detector, head = dense_arguments(cfg, name, kind)
    detector["assign_topk"] = detector.pop("topk")
    return detector, head


class SingleAnchorDetector(DenseDetector):
    """Base class of dense detectors with one square anchor per position.

    A subclass defines `assign`, `losses` and, if it predicts a quality, `scores`.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: list[str],
        box2box_transform: Any,
        num_classes: int,
        dims: list[int],
        anchor_scale: float,
        anchor_offset: float = 0.5,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.6,
        max_detections_per_image: int = 100,
        pixel_mean: list[float],
        pixel_std: list[float],
        input_format: str = "BGR",
    ):
        """
        Args:
            head: levels (B, C, H, W) -> outputs (B, dim, H, W) by kind and level; class logits first, then boxes.
            box2box_transform: its `apply_deltas(regression (N, D), anchors (N, 4))` returns boxes (N, 4).
            dims: size of each kind of head output at a position.
            anchor_scale: side of the anchors, in strides.
            anchor_offset: offset of the first anchor's center from the image's corner, in strides.
            focal_loss_alpha, focal_loss_gamma: parameters of `focal_loss`, for subclasses that call it.
            input_format: channel order of the images and of pixel_mean.
        """
        super().__init__(backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.num_classes = num_classes
        self.dims = dims
        self.input_format = input_format
        self.box2box_transform = box2box_transform
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image
        shapes: dict[str, ShapeSpec] = backbone.output_shape()
        strides = [shapes[name].stride for name in self.head_in_features]
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[anchor_scale * stride] for stride in strides],
            aspect_ratios=[1.0],
            strides=strides,
            offset=anchor_offset,
        )

    def transpose(self, predictions: list[list[Tensor]]) -> list[list[Tensor]]:
        """Transpose the outputs of the head, by kind and level, to (B, HW, dim)."""
        return self._transpose_dense_predictions(predictions, self.dims)

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: list[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        anchors = self.anchor_generator(features)
        transposed = self.transpose(predictions)
        return self.losses(anchors, transposed, self.assign(anchors, transposed, gt_instances), gt_instances)

    def assign(self, anchors: list[Boxes], predictions: list[list[Tensor]], targets: list[Instances]) -> Tensor:
        """Return the label assignment (B, R), without gradient: index of the box, `BACKGROUND` or `IGNORED`."""
        raise NotImplementedError

    def losses(
        self, anchors: list[Boxes], predictions: list[list[Tensor]], assignment_BR: Tensor, targets: list[Instances]
    ) -> dict[str, Tensor]:
        """Compute the losses of transposed predictions for a label assignment."""
        raise NotImplementedError

    def focal_loss(self, logits: list[Tensor], positives: Positives, class_P: Tensor) -> Tensor:
        """Compute the focal loss (B, R, K) of all anchors and classes in float32, with `class_P` for the positives."""
        logits_BRK = torch.cat(logits, 1).float()
        is_class_BRK = torch.zeros_like(logits_BRK)
        is_class_BRK[positives.image, positives.anchor, class_P] = 1
        return sigmoid_focal_loss(logits_BRK, is_class_BRK, alpha=self.focal_loss_alpha, gamma=self.focal_loss_gamma)

    def scores(self, predictions: list[list[Tensor]]) -> list[Tensor]:
        """Return the scores (B, HW, K) that rank the boxes, by level: the class probabilities."""
        return [level.sigmoid() for level in predictions[0]]

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: list[list[Tensor]]
    ) -> list[Instances]:
        anchors = self.anchor_generator(features)
        predictions = self.transpose(predictions)
        scores, boxes = self.scores(predictions), predictions[1]
        results = []
        for index, image_size in enumerate(images.image_sizes):
            candidates = self._decode_multi_level_predictions(
                anchors,
                [level[index] for level in scores],
                [level[index] for level in boxes],
                self.test_score_thresh,
                self.test_topk_candidates,
                image_size,
            )
            keep = batched_nms(
                candidates.pred_boxes.tensor, candidates.scores, candidates.pred_classes, self.test_nms_thresh
            )
            results.append(candidates[keep[: self.max_detections_per_image]])
        return results


class AdaptiveDetector(SingleAnchorDetector):
    """Base class of detectors with the label assignment of ATSS."""

    def __init__(self, *, assign_topk: int = 9, anchor_scale: float = 8.0, **arguments: Any):
        """
        Args:
            assign_topk: number of candidates per level for an instance, see `assign_adaptively`.
            arguments: arguments of `SingleAnchorDetector`.
        """
        super().__init__(anchor_scale=anchor_scale, **arguments)
        self.assign_topk = assign_topk

    def assign(self, anchors: list[Boxes], predictions: list[list[Tensor]], targets: list[Instances]) -> Tensor:
        return torch.stack([assign_adaptively(anchors, target.gt_boxes, self.assign_topk) for target in targets])
