"""Adapters of dense, one-stage detectors: anything on Detectron2's DenseDetector; RetinaNet, FCOS, ATSS and GFL in full."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from torch import Tensor, nn

from ..modeling import ATSS, FSAF, GFL
from ..modeling.assignment import BACKGROUND, IGNORED, Positives, assign_by_iou
from ..modeling.dense import SingleAnchorDetector
from .adapter import DETECTOR_ADAPTER_REGISTRY, DetectorAdapter, reorder_outputs
from .anchors import first_anchors, grid_anchors
from .outputs import DensePredictions, DetectorOutputs, Towers, towers_at
from .towers import channels_of_towers, finish, recorded

FCOS_MATCH_THRESHOLD = 1e-5  # Detectron2's own, of its quality of a match


@DETECTOR_ADAPTER_REGISTRY.register()
class DenseDetectorAdapter(DetectorAdapter):
    """Any DenseDetector: its features, and its losses through its own `forward_training`."""

    model_class = DenseDetector
    composes = ("forward", "preprocess_image")
    family = "one-stage"
    provides = frozenset({"features", "detections", "targets"})

    def neck_shapes(self) -> dict[str, ShapeSpec]:
        shapes = self.model.backbone.output_shape()
        return {name: shapes[name] for name in self.model.head_in_features}

    def run(
        self, batched_inputs: list[dict], want: frozenset[str], targets: list[Instances] | None = None
    ) -> DetectorOutputs:
        images = self.preprocess(batched_inputs)
        outputs = DetectorOutputs(images, self.by_stride(self.model.backbone(images.tensor)))
        self.read_head(outputs, want, targets)
        return outputs

    def read_head(self, outputs: DetectorOutputs, want: frozenset[str], targets: list[Instances] | None) -> None:
        """Fill in what the head gives: losses, anchors, dense predictions, detections."""
        if targets is None and "detections" not in want:
            return
        features = list(outputs.features.values())
        predictions = self.model.head(features)
        if targets is not None:
            outputs.losses = self.model.forward_training(outputs.images, features, predictions, targets)
        if "detections" in want:
            outputs.detections = self.detect(outputs.images, features, predictions)

    def detect(self, images: ImageList, features: list[Tensor], predictions: Any) -> list[Instances]:
        """Final detections of what the head gave."""
        return self.in_input_pixels(self.model.forward_inference(images, features, predictions), images)


class AnchorDetectorAdapter(DenseDetectorAdapter):
    """A dense detector in full: also anchors, dense predictions, and its head cut where it has towers.

    Its label assignment is made once, for its loss and distillers. A subclass says how anchors are assigned, and what the head gives and
    the losses are where these are not as RetinaNet's and FCOS's.
    """

    composes = (*DenseDetectorAdapter.composes, "forward_training")
    provides = DenseDetectorAdapter.provides | {"anchors", "dense"}

    def __init__(self, model: nn.Module):
        super().__init__(model)
        if self.tower_channels:
            self.provides |= {"towers", *map(towers_at, range(len(self.tower_channels)))}

    def reorder_classes(self, order: list[int]) -> None:
        if not isinstance(self.model.head, RetinaNetHead):
            super().reorder_classes(order)
        layer = self.model.head.cls_score
        reorder_outputs(layer, order, groups=layer.out_channels // len(order))

    @property
    def tower_channels(self) -> tuple[int, ...] | None:
        return channels_of_towers(self.model.head)

    def detect(self, images: ImageList, features: list[Tensor], predictions: Any) -> list[Instances]:
        """In float32 under autocast too: half a pixel is a lot for a box that others are to learn.

        Of copies: Detectron2 makes probabilities of the logits in their place.
        """
        with torch.autocast(images.tensor.device.type, enabled=False):
            predictions = [[level.to(torch.float32, copy=True) for level in levels] for levels in predictions]
            return super().detect(images, features, predictions)

    def cell_anchors(self) -> dict[int, Tensor]:
        return first_anchors(self.model.anchor_generator, list(self._stride_of.values()))

    def transpose(self, predictions: Any) -> list[list[Tensor]]:
        """What the head gives: logits, box regression and, where there is one, quality, by level (B, HWA, dim)."""
        dims = (self.model.num_classes, 4, 1)
        return self.model._transpose_dense_predictions(predictions, dims[: len(predictions)])

    def assign(self, anchors: list[Boxes], predictions: list[list[Tensor]], targets: list[Instances]) -> Tensor:
        """The detector's label assignment (B, R), of its transposed predictions where it depends on them."""
        raise NotImplementedError

    def losses(self, dense: DensePredictions, predictions: list[list[Tensor]], targets: list[Instances]) -> dict:
        """The detector's own losses of its transposed predictions."""
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
            if {"dense", "targets"} <= want:  # these losses have waited for the GPU: it is not kept waiting again
                dense.positives = Positives.of(dense.assignment)

    def _dense(self, predictions: list[list[Tensor]], anchors: dict[int, Boxes]) -> DensePredictions:
        logits, regression, *others = (dict(zip(anchors, levels, strict=True)) for levels in predictions)
        quality = others[0] if "quality" in self.provides else None
        return DensePredictions(logits, regression, anchors, self._decode, quality)

    def _finish(
        self, split: int, anchors: dict[int, Boxes], class_features: dict[int, Tensor], box_features: dict[int, Tensor]
    ) -> DensePredictions:
        levels = ([features[stride] for stride in anchors] for features in (class_features, box_features))
        return self._dense(self.transpose(finish(self.model.head, split, *levels)), anchors)

    def _decode(self, regression: Tensor, anchors: Boxes) -> Tensor:
        """In float32 under autocast too, as detections are."""
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
    """FCOS: points, as anchors of one stride's side, and centerness."""

    model_class = FCOS
    composes = (*AnchorDetectorAdapter.composes, "label_anchors")
    provides = AnchorDetectorAdapter.provides | {"quality", "points"}

    @torch.no_grad()
    def assign(self, anchors: list[Boxes], predictions: list[list[Tensor]], targets: list[Instances]) -> Tensor:
        """FCOS's label assignment that keeps the ground-truth index (Detectron2's `label_anchors` drops it)."""
        rows = []
        for target in targets:
            if len(target):
                quality, index = self.model._match_anchors(target.gt_boxes, anchors).max(0)
                rows.append(index.masked_fill(quality < FCOS_MATCH_THRESHOLD, BACKGROUND))
            else:
                rows.append(torch.full((sum(map(len, anchors)),), BACKGROUND, device=anchors[0].device))
        return torch.stack(rows)


@DETECTOR_ADAPTER_REGISTRY.register()
class SingleAnchorAdapter(AnchorDetectorAdapter):
    """The detectors of one anchor a position: RepPoints, and others that have no quality."""

    model_class = SingleAnchorDetector

    def transpose(self, predictions: Any) -> list[list[Tensor]]:
        return self.model.transpose(predictions)

    def assign(self, anchors: list[Boxes], predictions: list[list[Tensor]], targets: list[Instances]) -> Tensor:
        return self.model.assign(anchors, predictions, targets)

    def losses(self, dense: DensePredictions, predictions: list[list[Tensor]], targets: list[Instances]) -> dict:
        return self.model.losses(list(dense.anchors.values()), predictions, dense.assignment, targets)


@DETECTOR_ADAPTER_REGISTRY.register()
class ATSSAdapter(SingleAnchorAdapter):
    """ATSS, which has a centerness."""

    model_class = ATSS
    provides = AnchorDetectorAdapter.provides | {"quality"}


@DETECTOR_ADAPTER_REGISTRY.register()
class GFLAdapter(SingleAnchorAdapter):
    """GFL, whose class probabilities are joint scores already, and whose box regression is distributions."""

    model_class = GFL
    provides = AnchorDetectorAdapter.provides | {"distributions"}

    @property
    def num_bins(self) -> int:
        return self.model.box2box_transform.reg_max + 1


@DETECTOR_ADAPTER_REGISTRY.register()
class FSAFAdapter(SingleAnchorAdapter):
    """FSAF: points, as anchors of one stride's side."""

    model_class = FSAF
    provides = AnchorDetectorAdapter.provides | {"points"}


@torch.no_grad()
def labels_and_boxes(
    assignment_BR: Tensor, targets: list[Instances], num_classes: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The assignment in the form that Detectron2's dense losses take.

    Returns:
        per image the labels (R,): class, `num_classes` for background, -1 ignored; and the matched boxes (R, 4),
        meaningful for foreground alone.
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
