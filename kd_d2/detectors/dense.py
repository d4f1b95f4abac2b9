"""Adapters of dense, one-stage detectors: anything built on Detectron2's DenseDetector, RetinaNet in full."""

from __future__ import annotations

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from .adapter import DETECTOR_ADAPTER_REGISTRY, DetectorAdapter
from .outputs import BACKGROUND, IGNORED, DensePredictions, DetectorOutputs


@DETECTOR_ADAPTER_REGISTRY.register()
class DenseDetectorAdapter(DetectorAdapter):
    """Any DenseDetector: its features, and its losses through its own `forward_training`."""

    model_class = DenseDetector
    composes = ("forward", "preprocess_image")
    family = "one-stage"
    provides = frozenset({"features", "targets"})

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
        """Fill in what the head gives: losses, anchors, dense predictions."""
        if targets is not None:
            features = list(outputs.features.values())
            outputs.losses = self.model.forward_training(outputs.images, features, self.model.head(features), targets)


@DETECTOR_ADAPTER_REGISTRY.register()
class RetinaNetAdapter(DenseDetectorAdapter):
    """RetinaNet: also anchors and dense predictions. Its label assignment is made once, for its loss and distillers."""

    model_class = RetinaNet
    composes = (*DenseDetectorAdapter.composes, "forward_training", "label_anchors")
    provides = frozenset({"features", "anchors", "dense", "targets"})

    def cell_anchors(self) -> dict[int, Tensor]:
        return dict(zip(self._stride_of.values(), self.model.anchor_generator.cell_anchors, strict=True))

    def read_head(self, outputs: DetectorOutputs, want: frozenset[str], targets: list[Instances] | None) -> None:
        model, strides = self.model, list(outputs.features)
        features = list(outputs.features.values())
        need_head = targets is not None or "dense" in want
        if need_head or "anchors" in want:
            outputs.anchors = dict(zip(strides, model.anchor_generator(features), strict=True))
        if not need_head:
            return
        logits, deltas = model.head(features)
        dense = DensePredictions(
            logits={s: permute_to_N_HWA_K(x, model.num_classes) for s, x in zip(strides, logits, strict=True)},
            box_regression={s: permute_to_N_HWA_K(x, 4) for s, x in zip(strides, deltas, strict=True)},
            anchors=outputs.anchors,
            decode=self._decode,
        )
        outputs.dense = dense
        if targets is None:
            return
        anchors = list(outputs.anchors.values())
        dense.assign = lambda: assign_by_iou(Boxes.cat(anchors), targets, model.anchor_matcher)
        labels, boxes = labels_and_boxes(dense.assignment, targets, model.num_classes)
        outputs.losses = model.losses(
            anchors, list(dense.logits.values()), labels, list(dense.box_regression.values()), boxes
        )

    def _decode(self, deltas: Tensor, anchors: Boxes) -> Tensor:
        anchors = anchors.tensor.expand_as(deltas)
        return self.model.box2box_transform.apply_deltas(deltas.flatten(0, -2), anchors.flatten(0, -2)).view_as(deltas)


@torch.no_grad()
def assign_by_iou(anchors: Boxes, targets: list[Instances], matcher: Matcher) -> Tensor:
    """RetinaNet's label assignment that keeps the ground-truth index (Detectron2's `label_anchors` drops it).

    Args:
        anchors: R anchors over all levels.
        targets: per image the ground truth with `gt_boxes`.
        matcher: labels 0 (background), -1 (ignored) and 1 (foreground).

    Returns:
        (B, R) int64: index of the ground-truth box, `BACKGROUND` or `IGNORED`.
    """
    rows = []
    for target in targets:
        matched, label = matcher(pairwise_iou(target.gt_boxes, anchors))
        matched = matched.masked_fill(label == 0, BACKGROUND).masked_fill(label == -1, IGNORED)
        rows.append(matched if len(target) else torch.full_like(matched, BACKGROUND))
    return torch.stack(rows)


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
