"""Adapters for dense, one-stage detectors: any DenseDetector; full support for RetinaNet, FCOS, ATSS, GFL and more."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from torch import Tensor, nn

from ..modeling import ATSS, FSAF, GFL
from ..modeling.assignment import BACKGROUND, IGNORED, Positives, assign_by_iou
from ..modeling.dense import SingleAnchorDetector
from ..modeling.reppoints import RepPointsHead
from .adapter import DETECTOR_ADAPTER_REGISTRY, DetectorAdapter, reorder_outputs
from .anchors import first_anchors, grid_anchors
from .other_features import normalized_by_this_batch
from .outputs import DensePredictions, DetectorOutputs, Towers, towers_at
from .towers import READ_HEADS, channels_of_towers, finish, recorded

CLASSIFIES_BY_ONE_LAYER = READ_HEADS | {RepPointsHead.forward}
"""Forward methods of heads in which only the layer `cls_score` depends on the class."""
FCOS_MATCH_THRESHOLD = 1e-5  # Detectron2's threshold of the match quality


def strides_of_head(model: DenseDetector) -> list[int]:
    """Return the strides of the levels that the head reads, in its order."""
    shapes = model.backbone.output_shape()
    return [shapes[name].stride for name in model.head_in_features]


@DETECTOR_ADAPTER_REGISTRY.register()
class DenseDetectorAdapter(DetectorAdapter):
    """Features, detections and losses of any DenseDetector, with the losses from its `forward_training`."""

    model_class = DenseDetector
    composes = ("forward", "preprocess_image")
    family = "one-stage"
    provides = frozenset({"features", "detections", "losses", "targets"})

    @classmethod
    def supports(cls, model: nn.Module) -> bool:
        """Return whether the forward pass is that of `model_class` and the levels of the head differ in stride."""
        strides = strides_of_head(model)
        return super().supports(model) and len({*strides}) == len(strides)

    def neck_shapes(self) -> dict[str, ShapeSpec]:
        """Return the neck outputs by name, in the head's order."""
        shapes = self.model.backbone.output_shape()
        return {name: shapes[name] for name in self.model.head_in_features}

    def run(
        self, batched_inputs: list[dict], want: frozenset[str], targets: list[Instances] | None = None
    ) -> DetectorOutputs:
        images = self.preprocess(batched_inputs)
        outputs = DetectorOutputs(images, self.by_stride(self.model.backbone(images.tensor)))
        self.read_head(outputs, want, targets)
        if "losses" in want:
            outputs.losses_of = partial(self._losses_of, images)
        return outputs.ascending()

    def _losses_of(self, images: ImageList, features: dict[int, Tensor], targets: list[Instances]) -> dict[str, Tensor]:
        outputs = DetectorOutputs(images, {stride: features[stride] for stride in self._stride_of.values()})
        with normalized_by_this_batch(self.model):
            self.read_head(outputs, frozenset(), targets)
        return outputs.losses

    def read_head(self, outputs: DetectorOutputs, want: frozenset[str], targets: list[Instances] | None) -> None:
        """Fill in the outputs of the head, in its order of levels: losses, anchors, dense predictions and detections."""
        if targets is None and "detections" not in want:
            return
        features = list(outputs.features.values())
        predictions = self.model.head(features)
        if targets is not None:
            outputs.losses = self.model.forward_training(outputs.images, features, predictions, targets)
        if "detections" in want:
            outputs.detections = self.detect(outputs.images, features, predictions)

    def detect(self, images: ImageList, features: list[Tensor], predictions: Any) -> list[Instances]:
        """Return the final detections from the outputs of the head."""
        return self.in_input_pixels(self.model.forward_inference(images, features, predictions), images)


class AnchorDetectorAdapter(DenseDetectorAdapter):
    """Full support for a dense detector: also anchors, dense predictions, and `Towers` if its head has them.

    Labels are assigned once, for both losses and distillers. A subclass defines `assign`, and `transpose` and `losses`
    if the head outputs or the losses differ from those of RetinaNet and FCOS.
    """

    composes = (*DenseDetectorAdapter.composes, "forward_training")
    provides = DenseDetectorAdapter.provides | {"anchors", "dense"}

    def __init__(self, model: nn.Module):
        super().__init__(model)
        if self.tower_channels:
            self.provides |= {"towers", *map(towers_at, range(len(self.tower_channels)))}

    def reorder_classes(self, order: list[int]) -> None:
        head = self.model.head
        layer = getattr(head, "cls_score", None)
        if type(head).forward not in CLASSIFIES_BY_ONE_LAYER or not isinstance(layer, nn.Conv2d):
            super().reorder_classes(order)
        reorder_outputs(layer, order, groups=layer.out_channels // len(order))

    @property
    def tower_channels(self) -> tuple[int, ...] | None:
        return channels_of_towers(self.model.head)

    def detect(self, images: ImageList, features: list[Tensor], predictions: Any) -> list[Instances]:
        """Decode in float32 even under autocast, since half a pixel matters for boxes that are training targets.

        The predictions are copied because Detectron2 applies the sigmoid to the logits in place.
        """
        with torch.autocast(images.tensor.device.type, enabled=False):
            predictions = [[level.to(torch.float32, copy=True) for level in levels] for levels in predictions]
            return super().detect(images, features, predictions)

    def cell_anchors(self) -> dict[int, Tensor]:
        return first_anchors(self.model.anchor_generator, list(self._stride_of.values()))

    def transpose(self, predictions: Any) -> list[list[Tensor]]:
        """Return the head's logits, box regression and, if present, quality, each by level as (B, HWA, dim)."""
        dims = (self.model.num_classes, 4, 1)
        return self.model._transpose_dense_predictions(predictions, dims[: len(predictions)])

    def assign(self, anchors: list[Boxes], predictions: list[list[Tensor]], targets: list[Instances]) -> Tensor:
        """Return the detector's label assignment (B, R); it may depend on the transposed predictions."""
        raise NotImplementedError

    def losses(self, dense: DensePredictions, predictions: list[list[Tensor]], targets: list[Instances]) -> dict:
        """Compute the detection losses from the transposed predictions."""
        logits, deltas, *quality = predictions
        labels, boxes = labels_and_boxes(dense.assignment, targets, self.model.num_classes)
        return self.model.losses(list(dense.anchors.values()), logits, labels, deltas, boxes, *quality)

    def read_head(self, outputs: DetectorOutputs, want: frozenset[str], targets: list[Instances] | None) -> None:
        strides, features = list(outputs.features), list(outputs.features.values())
        splits = [split for split in range(len(self.tower_channels or ())) if towers_at(split) in want]
        need_head = targets is not None or splits or not want.isdisjoint({"dense", "detections"})
        if need_head or "anchors" in want:
            outputs.anchors = dict(zip(strides, grid_anchors(self.model.anchor_generator, features), strict=True))
        if not need_head:
            return
        with recorded(self.model.head, features, splits) as cut:
            raw = self.model.head(features)
        for split, towers in cut.items():
            by_stride = (dict(zip(strides, levels, strict=True)) for levels in towers)
            outputs.towers[split] = Towers(*by_stride, partial(self._finish, split, outputs.anchors))
        if "detections" in want:
            outputs.detections = self.detect(outputs.images, features, raw)
        predictions = self.transpose(raw)
        dense = outputs.dense = self._dense(predictions, outputs.anchors)
        if targets is not None:
            dense.assign = lambda: self.assign(list(outputs.anchors.values()), predictions, targets)
            outputs.losses = self.losses(dense, predictions, targets)
            if {"dense", "targets"} <= want:  # here the losses have just synchronized with the GPU
                dense.positives = Positives.of(dense.assignment)

    def _dense(self, predictions: list[list[Tensor]], anchors: dict[int, Boxes]) -> DensePredictions:
        logits, regression, *others = (dict(zip(anchors, levels, strict=True)) for levels in predictions)
        quality = others[0] if "quality" in self.provides else None
        return DensePredictions(logits, regression, anchors, self._decode, quality)

    def _finish(
        self, split: int, anchors: dict[int, Boxes], class_features: dict[int, Tensor], box_features: dict[int, Tensor]
    ) -> DensePredictions:
        levels = ([features[stride] for stride in anchors] for features in (class_features, box_features))
        return self._dense(self.transpose(finish(self.model.head, split, *levels)), anchors).ascending()

    def _decode(self, regression: Tensor, anchors: Boxes) -> Tensor:
        """Decode boxes in float32 even under autocast, like `detect`."""
        anchors = anchors.tensor.expand(*regression.shape[:-1], 4)
        with torch.autocast(regression.device.type, enabled=False):
            regression = regression.float().flatten(0, -2)
            boxes = self.model.box2box_transform.apply_deltas(regression, anchors.flatten(0, -2))
        return boxes.view_as(anchors)


@DETECTOR_ADAPTER_REGISTRY.register()
class RetinaNetAdapter(AnchorDetectorAdapter):
    """RetinaNet."""

    model_class = RetinaNet
    composes = (*AnchorDetectorAdapter.composes, "label_anchors")

    def assign(self, anchors: list[Boxes], predictions: list[list[Tensor]], targets: list[Instances]) -> Tensor:
        everywhere, matcher = Boxes.cat(anchors), self.model.anchor_matcher
        return torch.stack([assign_by_iou(pairwise_iou(target.gt_boxes, everywhere), matcher) for target in targets])


@DETECTOR_ADAPTER_REGISTRY.register()
class FCOSAdapter(AnchorDetectorAdapter):
    """FCOS, with centerness, and with points represented as anchors with a side of one stride."""

    model_class = FCOS
    composes = (*AnchorDetectorAdapter.composes, "label_anchors")
    provides = AnchorDetectorAdapter.provides | {"quality", "points"}

    @torch.no_grad()
    def assign(self, anchors: list[Boxes], predictions: list[list[Tensor]], targets: list[Instances]) -> Tensor:
        """FCOS's label assignment with the ground-truth index, which Detectron2's `label_anchors` drops."""
        rows = []
        for target in targets:
            if len(target):
                quality, index = self.model._match_anchors(target.gt_boxes, anchors).max(0)
                rows.append(index.masked_fill(quality < FCOS_MATCH_THRESHOLD, BACKGROUND))
            else:
                rows.append(torch.full((sum(map(len, anchors)),), BACKGROUND, device=anchors[0].device))
        return torch.stack(rows)

    def losses(self, dense: DensePredictions, predictions: list[list[Tensor]], targets: list[Instances]) -> dict:
        """Compute the detection losses in float32: Detectron2's FCOS mixes dtypes under autocast."""
        with torch.autocast(predictions[0][0].device.type, enabled=False):
            return super().losses(dense, [[level.float() for level in levels] for levels in predictions], targets)


@DETECTOR_ADAPTER_REGISTRY.register()
class SingleAnchorAdapter(AnchorDetectorAdapter):
    """Detectors with one anchor per position and no quality prediction, such as RepPoints."""

    model_class = SingleAnchorDetector

    def transpose(self, predictions: Any) -> list[list[Tensor]]:
        return self.model.transpose(predictions)

    def assign(self, anchors: list[Boxes], predictions: list[list[Tensor]], targets: list[Instances]) -> Tensor:
        return self.model.assign(anchors, predictions, targets)

    def losses(self, dense: DensePredictions, predictions: list[list[Tensor]], targets: list[Instances]) -> dict:
        return self.model.losses(list(dense.anchors.values()), predictions, dense.assignment, targets)


@DETECTOR_ADAPTER_REGISTRY.register()
class ATSSAdapter(SingleAnchorAdapter):
    """ATSS, with centerness."""

    model_class = ATSS
    provides = AnchorDetectorAdapter.provides | {"quality"}


@DETECTOR_ADAPTER_REGISTRY.register()
class GFLAdapter(SingleAnchorAdapter):
    """GFL, with joint scores as class probabilities, and distributions as box regression."""

    model_class = GFL
    provides = AnchorDetectorAdapter.provides | {"distributions"}

    @property
    def num_bins(self) -> int:
        return self.model.box2box_transform.reg_max + 1


@DETECTOR_ADAPTER_REGISTRY.register()
class FSAFAdapter(SingleAnchorAdapter):
    """FSAF, with points represented as anchors with a side of one stride."""

    model_class = FSAF
    provides = AnchorDetectorAdapter.provides | {"points"}


@torch.no_grad()
def labels_and_boxes(
    assignment_BR: Tensor, targets: list[Instances], num_classes: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Convert a label assignment to the format of Detectron2's dense losses.

    Returns:
        Labels (R,) of each image: class, `num_classes` for background, -1 for ignored; and matched boxes (R, 4), valid
        only for foreground.
    """
    labels, boxes = [], []
    for index, target in zip(assignment_BR, targets, strict=True):
        if len(target):
            matched = index.clamp(min=0)
            label, box = target.gt_classes[matched], target.gt_boxes.tensor[matched]
        else:
            label, box = torch.zeros_like(index), target.gt_boxes.tensor.new_zeros(len(index), 4)
        label = label.masked_fill(index == BACKGROUND, num_classes).masked_fill(index == IGNORED, -1)
        labels.append(label)
        boxes.append(box)
    return labels, boxes
