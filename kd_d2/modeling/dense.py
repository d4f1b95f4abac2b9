"""What dense detectors share: keys, construction from a config, and the detector with one anchor a position."""

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

FocalAlpha = Annotated[float, "Weight of the positives in the focal loss; background has the rest of 1."]
FocalGamma = Annotated[float, "Exponent of the focal loss."]


@dataclass(frozen=True)
class DenseKeys(Keys):
    """The keys that every dense detector has, with the values of the papers."""

    num_classes: Annotated[int, AtLeast(1), "Foreground classes."] = 80
    in_features: Annotated[list, "Levels of the FPN that the head reads, by name."] = field(
        default_factory=lambda: ["p3", "p4", "p5", "p6", "p7"]
    )
    num_convs: Annotated[int, AtLeast(1), "Convolutions of each of the head's two towers."] = 4
    norm: Annotated[str | None, "Normalization of the head's towers, '' for none."] = "GN"
    prior_prob: Annotated[float, Above(0), Below(1), "Probability that every class starts at."] = 0.01
    score_thresh_test: Annotated[float, "Smallest score of a detection."] = 0.05
    topk_candidates_test: Annotated[int, AtLeast(1), "Boxes of a level that enter the NMS."] = 1000
    nms_thresh_test: Annotated[float, "Overlap of the NMS."] = 0.6


@dataclass(frozen=True)
class AdaptiveKeys(DenseKeys):
    """The keys that detectors with adaptive label assignment share."""

    topk: Annotated[int, AtLeast(1), "Candidates of each level for an instance."] = 9
    anchor_scale: Annotated[float, Above(0), "Side of the one anchor of a position, in strides."] = 8.0


def dense_arguments(cfg: CfgNode, name: str, kind: type[DenseKeys]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments that a dense detector's class takes from the keys of its node MODEL.<name>, and those of its head.

    The detector's own keys, which `DenseKeys` does not have, are arguments of the same names.
    """
    keys = kind.read(cfg.MODEL[name], f"MODEL.{name}")
    shared = {key.name for key in fields(DenseKeys)}
    backbone = build_backbone(cfg)
    shapes = backbone.output_shape()
    unknown = [level for level in keys.in_features if level not in shapes]
    if unknown or not keys.in_features:
        raise UserError(f"MODEL.{name}.IN_FEATURES is {keys.in_features}; the backbone gives {', '.join(shapes)}.")
    input_shape = [shapes[name] for name in keys.in_features]
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
        **{key.name: getattr(keys, key.name) for key in fields(keys) if key.name not in shared},
    }
    head = {
        "input_shape": input_shape,
        "num_classes": keys.num_classes,
        "conv_dims": [input_shape[0].channels] * keys.num_convs,
        "norm": keys.norm,
        "prior_prob": keys.prior_prob,
    }
    return detector, head


def adaptive_arguments(cfg: CfgNode, name: str, kind: type[AdaptiveKeys]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments that an `AdaptiveDetector` takes from the keys of its node MODEL.<name>, and those of its head."""
    detector, head = dense_arguments(cfg, name, kind)
    detector["assign_topk"] = detector.pop("topk")
    return detector, head


class SingleAnchorDetector(DenseDetector):
    """A dense detector with one square anchor a position.

    A subclass has `assign`, `losses`, where it has a quality `scores`, and in `dims` the sizes of what its head gives an anchor.
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
            head: levels (B, C, H, W) -> by kind of output, by level: (B, dim, H, W); class logits come first, then boxes.
            box2box_transform: its `apply_deltas(regression (N, D), anchors (N, 4))` gives boxes (N, 4).
            dims: of the head's outputs at a position.
            anchor_scale: side of the anchors in strides.
            focal_loss_alpha, focal_loss_gamma: of `focal_loss`, for subclasses that call it.
            input_format: order of the channels that pixel_mean is in.
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
            sizes=[[anchor_scale * stride] for stride in strides], aspect_ratios=[1.0], strides=strides
        )

    def transpose(self, predictions: list[list[Tensor]]) -> list[list[Tensor]]:
        """What the head gives, by kind and level: (B, HW, dim)."""
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
        """The label assignment (B, R): index of the ground-truth box, `BACKGROUND` or `IGNORED`; without gradient."""
        raise NotImplementedError

    def losses(
        self, anchors: list[Boxes], predictions: list[list[Tensor]], assignment_BR: Tensor, targets: list[Instances]
    ) -> dict[str, Tensor]:
        """The losses of transposed predictions under a label assignment."""
        raise NotImplementedError

    def focal_loss(self, logits: list[Tensor], positives: Positives, class_P: Tensor) -> Tensor:
        """Focal loss (B, R, K) of all anchors and classes, in float32; `class_P` are the classes of the positives."""
        logits_BRK = torch.cat(logits, 1).float()
        is_class_BRK = torch.zeros_like(logits_BRK)
        is_class_BRK[positives.image, positives.anchor, class_P] = 1
        return sigmoid_focal_loss(logits_BRK, is_class_BRK, alpha=self.focal_loss_alpha, gamma=self.focal_loss_gamma)

    def scores(self, predictions: list[list[Tensor]]) -> list[Tensor]:
        """By level the scores (B, HW, K) that boxes are ranked by: the classes' probabilities."""
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
    """With the label assignment of ATSS."""

    def __init__(self, *, assign_topk: int = 9, anchor_scale: float = 8.0, **arguments: Any):
        """
        Args:
            assign_topk: candidates of each level for an instance, see `assign_adaptively`.
            arguments: those of `SingleAnchorDetector`.
        """
        super().__init__(anchor_scale=anchor_scale, **arguments)
        self.assign_topk = assign_topk

    def assign(self, anchors: list[Boxes], predictions: list[list[Tensor]], targets: list[Instances]) -> Tensor:
        return torch.stack([assign_adaptively(anchors, target.gt_boxes, self.assign_topk) for target in targets])
